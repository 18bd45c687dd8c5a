"""Define the panels of a report: their metrics, what each shows, and how it looks in a healthy run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from grpo_core.report.run_reader import Row, RunFolder


@dataclass(frozen=True)
class Panel:
    """One chart. `lines` are keys of metrics.jsonl; NAME/* stands for every key below NAME."""

    id: str
    title: str
    unit: str
    lines: tuple[str, ...]
    what: str  # the sentence above the chart
    healthy: str  # the sentence below it
    kind: str = "line"  # or "stack", "accuracy"
    log: bool = False  # starts with a logarithmic axis


PANELS = (
    Panel(
        "accuracy", "Accuracy", "share of problems", ("accuracy",),
        "Held-out problems solved, with 95 % intervals, against the steps taken before the evaluation.",
        "Rises. Where the intervals of two points overlap widely, their difference is not significant.", "accuracy",
    ),
    Panel(
        "reward", "Reward", "per completion", ("reward",),
        "Mean weighted sum of the rewards. The band is one standard deviation over the completions.",
        "Rises. With a band of width 0 all completions have the same reward, and nothing is learned.",
    ),
    Panel(
        "rewards", "Rewards by name", "per completion", ("rewards/*",),
        "Mean of each reward before its weight is applied.",
        "A reward that rises while accuracy falls is being exploited: read the completions.",
    ),
    Panel(
        "kl", "KL from the reference", "nats per token", ("kl", "kl_exact"),
        "Divergence of the policy from the reference on the sampled tokens.",
        "Rises slowly from 0. Above 1 training is unstable: lower the learning rate or raise loss.kl_coef.",
    ),
    Panel(
        "entropy", "Entropy", "nats per token", ("entropy",),
        "Entropy of the policy's distribution of the next token.",
        "Falls slowly. Below 0.001 the completions of a prompt are all the same; at three times its first value they "
        "are noise.",
    ),
    Panel(
        "length", "Length", "tokens", ("length", "length_max"),
        "Mean and longest completion of a step.",
        "A trend comes from the reward. The longest equals sampling.max_new_tokens while completions are truncated.",
    ),
    Panel(
        "truncated", "Truncated", "share of completions", ("truncated",),
        "Completions cut off at sampling.max_new_tokens.",
        "Near 0. Near 1 the completions do not end, and their reward is mostly chance.",
    ),
    Panel(
        "turns", "Turns", "per completion", ("turns",),
        "Mean number of turns of a completion.",
        "A trend comes from the reward. The most is environment.max_turns.",
    ),
    Panel(
        "given", "Given tokens", "tokens per completion", ("given_tokens",),
        "Tokens that the environment or tools put into a completion. They are not trained.",
        "Follows the number of turns. Together with the length it is at most sampling.max_new_tokens.",
    ),
    Panel(
        "tools", "Tool calls", "per completion", ("tool_calls", "tool_errors"),
        "Mean number of calls of tools, and of those whose answer is an error.",
        "Errors fall. No calls at all: the prompt does not describe the tools, or the policy cannot use them.",
    ),
    Panel(
        "environment", "Troubles of answers", "per completion",
        ("environment_failures", "cut_answers", "answers_without_room"),
        "Completions that the environment failed on; answers cut to environment.max_answer_tokens; completions that "
        "ended because an answer did not fit into them.",
        "0. Answers without room: raise sampling.max_new_tokens, or lower environment.max_answer_tokens.",
    ),
    Panel(
        "echo", "Loss on given tokens", "nats per token", ("echo",),
        "Mean -log-prob of the tokens that the environment gave (loss.echo_coef).",
        "Falls: the policy learns to predict the environment.",
    ),
    Panel(
        "tied", "Tied groups", "share of groups", ("tied_groups", "first_draw/tied_groups"),
        "Groups whose completions all have the same reward. Their advantage is 0.",
        "Well below 1. At 1 nothing is learned: the tasks are too hard or too easy, or the reward does not distinguish "
        "completions.",
    ),
    Panel(
        "teacher", "Distance to the teacher", "nats per token", ("teacher_kl", "teacher_kl_exact"),
        "Mean of l - l_teacher over the policy's own tokens, and the KL over the whole vocabulary (teacher.kl).",
        "Falls towards 0. Where it stays, the policy cannot say what the teacher says.",
    ),
    Panel(
        "ratio", "Ratio", "new over old probability", ("ratio",),
        "Mean of exp(log-prob now - log-prob before the step's first update).",
        "Exactly 1 where a batch is used once. Near 1 with several minibatches or passes.",
    ),
    Panel(
        "clip", "Clip fraction", "share of tokens", ("clip_frac",),
        "Tokens whose ratio is outside the clip range, so that they have no gradient.",
        "0 where a batch is used once, otherwise a few percent. Much more means that the updates are too large.",
    ),
    Panel(
        "loss", "Loss", "", ("loss",),
        "Value of the objective that is minimised.",
        "On policy it is near 0 and shows nothing: a group's advantages sum to 0 and the ratio is 1. "
        "In supervised runs it is the cross-entropy and falls.",
    ),
    Panel(
        "gap", "Sampler to trainer", "nats per token", ("logprob_gap", "logprob_gap_max"),
        "Absolute difference between a token's log-prob in the sampler and in the trainer.",
        "About 1e-6 in fp32, 0.02 in bf16. More means that sampler and trainer disagree.", log=True,
    ),
    Panel(
        "routing", "Routing mismatch", "share of choices", ("routing_mismatch",),
        "Choices of experts, over tokens and routers, that differ between the sampler and the trainer.",
        "0 in fp32, a few percent in bf16, the same in every step. sampling.replay_routing trains with the sampler's.",
    ),
    Panel(
        "grad_norm", "Gradient norm", "before clipping", ("grad_norm",),
        "Euclidean norm of the gradient of all trained weights.",
        "Steady within a factor of ten. Gaps are steps with a gradient that was not finite; they changed no weight.",
    ),
    Panel(
        "learning_rate", "Learning rate", "", ("learning_rate",),
        "Value of the schedule at the end of the step.",
        "Above 0 until the last step.",
    ),
    Panel(
        "adapter_norm", "Adapter norm", "", ("adapter_norm",),
        "Euclidean norm of the trained weights.",
        "Changes in every step; a flat line means that nothing is trained.",
    ),
    Panel(
        "coefficients", "Coefficients", "", ("kl_coef", "entropy_coef"),
        "Coefficients of the KL and of the entropy bonus in the loss.",
        "Constant, or controlled by loss.kl_target and loss.entropy_target.",
    ),
    Panel(
        "time", "Time per phase", "seconds per step", ("seconds/*",),
        "Wall-clock time by phase, stacked. An evaluation or checkpoint counts in the step after it.",
        "Sampling and update take most. If the share of reward or other grows, find out why.", "stack",
    ),
    Panel(
        "speed", "Tokens per second", "tokens / s", ("tokens_per_second",),
        "Sampled tokens over the seconds of the whole step, without evaluation and checkpoints.",
        "Steady. Falls as completions grow longer.",
    ),
    Panel(
        "mfu", "Update's utilisation", "share of peak", ("update_mfu",),
        "Floating-point operations of the update over the peak of the GPU's data sheet.",
        "Steady.",
    ),
    Panel(
        "memory", "Memory", "GB", ("peak_memory_gb", "reserved_memory_gb", "memory_gb/*"),
        "Peak memory of a step: of the GPU, or of the process on a machine without one.",
        "Flat after the first steps, and below the limit.",
    ),
    Panel(
        "skipped", "Skipped updates", "per step", ("skipped",),
        "Optimizer steps left out because the gradient was not finite.",
        "0. In fp16 a few at the start are expected, while the loss scale adapts.",
    ),
    Panel(
        "failed", "Failed rewards", "share of completions", ("failed/*",),
        "Completions on which a reward function failed.",
        "0.",
    ),
)  # fmt: skip
OTHER = Panel("other", "", "", (), "A metric that no other panel shows.", "Compare it with a run that went well.")
HIDDEN_WHEN_QUIET = {
    "skipped",
    "failed",
    "coefficients",
    "tools",
    "environment",
}  # ids of panels left out while 0, or while constant
NOT_DRAWN = {
    "step",
    "seconds",
    "tokens",
    "tokens_updated",
    "micro_batches",
    "memory_retries",
    "epoch",
    "advantage_abs",
    "teacher_weights_gb",
}
MEANINGLESS_IF_SUPERVISED = {"logprob_gap", "logprob_gap_max", "ratio", "clip_frac"}  # they compare with a sampler


def choose_panels(runs: list[RunFolder]) -> list[tuple[Panel, list[str]]]:
    """Return the panels that have values in one of the runs, each with its metrics; metrics of no panel come last."""
    present = {name: None for run in runs for name in collect_curves(run)}
    panels, used = [], set(NOT_DRAWN)
    for panel in PANELS:
        names = [name for line in panel.lines for name in _matching(line, present)]
        used |= set(names)
        if panel.kind == "accuracy":
            panels += _choose_accuracies(panel, runs)
        elif names and not (panel.id in HIDDEN_WHEN_QUIET and all(_is_quiet(run, panel, names) for run in runs)):
            panels.append((panel, names))
    rest = [name for name in present if name not in used and not name.endswith("_std")]
    other = [Panel(f"other-{i}", name, "", (name,), OTHER.what, OTHER.healthy) for i, name in enumerate(rest)]
    return panels + [(panel, list(panel.lines)) for panel in other]


def _choose_accuracies(panel: Panel, runs: list[RunFolder]) -> list[tuple[Panel, list[str]]]:
    """Return one panel for the runs without named evaluation sets, and one for each named set."""
    panels = []
    for name in dict.fromkeys(name for run in runs for name in run.evaluations):
        if not name:
            panels.append((panel, ["accuracy"]))
            continue
        users = [run for run in runs if name in run.evaluations]
        selects = any(run.selecting_set == name for run in users)
        role = (
            "This set selects the best checkpoint, so its best value is too high." if selects else "It does not select."
        )
        own = replace(
            panel, id=f"accuracy-{name}", title=f"Accuracy on {name}", what=f"{panel.what} {role}",
        )  # fmt: skip
        panels.append((own, [f"eval/{name}/accuracy"]))
    return panels


def collect_curves(run: RunFolder) -> dict[str, list[float | None]]:
    """Return metric -> one value per row, without metrics that are always None.

    `seconds/other` is the time of a step that belongs to no phase.
    """
    names = {name: None for row in run.metrics for name, value in row.items() if value is not None}
    hidden = MEANINGLESS_IF_SUPERVISED if run.is_supervised else set()
    curves = {name: [row.get(name) for row in run.metrics] for name in names if name not in hidden}
    if any(name.startswith("seconds/") for name in curves):
        curves["seconds/other"] = [_unaccounted_seconds(row) for row in run.metrics]
    return curves


def thinning_metric(name: str) -> str:
    """Return the metric whose extremes decide which points of `name` are drawn.

    A band has the points of its curve, and all phases have those of the whole step, so that they can be stacked.
    """
    return "seconds" if name.startswith("seconds/") else name.removesuffix("_std")


def thin_curve(values: list[float | None], limit: int) -> list[int]:
    """Return the indices of at most `limit` points to draw.

    These are the first, the last, and of every interval the lowest, the highest and the first gap.

    >>> thin_curve([0, 1, 9, 1, 0, 1, 1, -5, 1, 0], limit=6)
    [0, 2, 7, 9]
    """
    n = len(values)
    if n <= limit:
        return list(range(n))
    indices, intervals = {0, n - 1}, max(1, (limit - 2) // 3)
    for i in range(intervals):
        interval = range(i * n // intervals, (i + 1) * n // intervals)
        present = [k for k in interval if values[k] is not None]
        if present:
            indices |= {min(present, key=values.__getitem__), max(present, key=values.__getitem__)}
        if len(present) < len(interval):
            indices.add(next(k for k in interval if values[k] is None))
    return sorted(indices)


def _matching(line: str, present: Iterable[str]) -> list[str]:
    if not line.endswith("*"):
        return [name for name in present if name == line]
    return [name for name in present if name.startswith(line[:-1]) and not name.endswith("_std")]


def _is_quiet(run: RunFolder, panel: Panel, names: list[str]) -> bool:
    """Return whether the coefficients are constant, or the counts of another panel all 0.

    Of a run with tools, calls are never quiet: without any, nothing is learned of them.
    """
    values = [{row.get(name) for row in run.metrics} - {None} for name in names]
    if panel.id == "tools" and run.settings.get("environment.name", "null") == "null":
        return not any(values)
    if panel.id == "coefficients":
        return all(len(different) <= 1 for different in values)
    return not any(any(different) for different in values)


def _unaccounted_seconds(row: Row) -> float | None:
    if row.get("seconds") is None:
        return None
    return max(0.0, row["seconds"] - sum(v for k, v in row.items() if k.startswith("seconds/") and v is not None))
