"""What a report draws: which metrics stand in which panel, what they are, and what is healthy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from grpo_core.report.run_reader import Row, RunFolder


@dataclass(frozen=True)
class Panel:
    """`lines` are the metrics of metrics.jsonl; NAME/* stands for every metric below NAME."""

    id: str
    title: str
    unit: str
    lines: tuple[str, ...]
    what: str
    healthy: str
    kind: str = "line"  # or "stack", "accuracy"
    log: bool = False  # begins with a logarithmic axis


PANELS = (
    Panel(
        "accuracy", "Accuracy", "share of problems", ("accuracy",),
        "Held-out problems solved, with 95 % intervals, by the number of steps taken before.",
        "Rises. Two points whose intervals overlap widely do not differ by this test.", "accuracy",
    ),
    Panel(
        "reward", "Reward", "per completion", ("reward",),
        "Mean weighted sum of the rewards. The band is one standard deviation of the completions.",
        "Rises. A band of width 0 means that completions do not differ, so nothing is learned.",
    ),
    Panel(
        "rewards", "Rewards by name", "per completion", ("rewards/*",),
        "Mean of each reward before its weight.",
        "A reward that rises while accuracy falls is being gamed: read the completions.",
    ),
    Panel(
        "kl", "KL from the reference", "nats per token", ("kl", "kl_exact"),
        "How far the policy has moved from the reference, on the sampled tokens.",
        "Rises slowly from 0. Above 1 the policy is running away: lower the learning rate or raise loss.kl_coef.",
    ),
    Panel(
        "entropy", "Entropy", "nats per token", ("entropy",),
        "How undecided the policy is about the next token.",
        "Falls slowly. Below 0.001 there is nothing left to choose from; three times the first steps' is noise.",
    ),
    Panel(
        "length", "Length", "tokens", ("length", "length_max"),
        "Mean and longest completion of a step.",
        "Any trend is the reward's. The longest stands at sampling.max_new_tokens while anything is cut off.",
    ),
    Panel(
        "truncated", "Truncated", "share of completions", ("truncated",),
        "Completions cut off at sampling.max_new_tokens.",
        "Near 0. Near 1 the completions never end, and their reward is mostly chance.",
    ),
    Panel(
        "tied", "Tied groups", "share of groups", ("tied_groups", "first_draw/tied_groups"),
        "Groups whose completions all have the same reward. Their advantage is 0.",
        "Well below 1. At 1 there is nothing to learn from: too hard, too easy, or a reward that does not distinguish.",
    ),
    Panel(
        "ratio", "Ratio", "new over old probability", ("ratio",),
        "Mean of exp(log-prob now - log-prob before the step's first update).",
        "Exactly 1 where a batch is used once. Near 1 with several minibatches or passes.",
    ),
    Panel(
        "clip", "Clip fraction", "share of tokens", ("clip_frac",),
        "Tokens whose ratio left the clip range, so that they pull no more.",
        "0 where a batch is used once. A few percent otherwise; much more says that the steps are too large.",
    ),
    Panel(
        "loss", "Loss", "", ("loss",),
        "The value of the objective that is minimised.",
        "On policy it is near 0 and says nothing: a group's advantages sum to 0 and the ratio is 1. "
        "In supervised runs it is the cross-entropy and falls.",
    ),
    Panel(
        "gap", "Sampler to trainer", "nats per token", ("logprob_gap", "logprob_gap_max"),
        "Absolute difference of the log-probs with which a token was drawn and trained.",
        "About 1e-6 in fp32, 0.02 in bf16. More means that sampler and trainer disagree.", log=True,
    ),
    Panel(
        "grad_norm", "Gradient norm", "before clipping", ("grad_norm",),
        "Length of the gradient of all trained weights.",
        "Steady within a factor of ten. Gaps are steps whose gradient was not finite; they changed nothing.",
    ),
    Panel(
        "learning_rate", "Learning rate", "", ("learning_rate",),
        "As the schedule gave it at the end of the step.",
        "Above 0 until the last step.",
    ),
    Panel(
        "adapter_norm", "Adapter norm", "", ("adapter_norm",),
        "Length of the trained weights.",
        "Moves in every step; a flat line means that nothing is trained.",
    ),
    Panel(
        "coefficients", "Coefficients", "", ("kl_coef", "entropy_coef"),
        "What the KL and the entropy bonus weigh in the loss.",
        "Constant, or following loss.kl_target and loss.entropy_target.",
    ),
    Panel(
        "time", "Time per phase", "seconds per step", ("seconds/*",),
        "Wall-clock time by phase, one on top of the other. An evaluation or checkpoint belongs to the step after it.",
        "Sampling and update take most. A growing share of reward or other is worth a look.", "stack",
    ),
    Panel(
        "speed", "Tokens per second", "tokens / s", ("tokens_per_second",),
        "Tokens sampled over the seconds of the whole step, without evaluation and checkpoints.",
        "Steady. Falls as completions grow longer.",
    ),
    Panel(
        "mfu", "Update's utilisation", "share of peak", ("update_mfu",),
        "Operations of the update over what the GPU's data sheet promises.",
        "Steady.",
    ),
    Panel(
        "memory", "Memory", "GB", ("peak_memory_gb", "reserved_memory_gb", "memory_gb/*"),
        "Most memory held in a step: the GPU's, or the process's where there is none.",
        "Flat after the first steps, with room below the limit.",
    ),
    Panel(
        "skipped", "Skipped updates", "per step", ("skipped",),
        "Optimizer steps left out because the gradient was not finite.",
        "0. In fp16 a few at the start are the loss scale finding its place.",
    ),
    Panel(
        "failed", "Failed rewards", "share of completions", ("failed/*",),
        "Completions that a reward went wrong on.",
        "0.",
    ),
)  # fmt: skip
OTHER = Panel(
    "other", "", "", (), "A metric of this run that has no note of its own.", "Compare it with a run that went well."
)
QUIET = {"skipped", "failed", "coefficients"}  # drawn only where something happened: not 0, or not constant
HIDDEN = {"step", "seconds", "tokens", "tokens_updated", "micro_batches", "memory_retries", "epoch", "advantage_abs"}
MEANINGLESS = {"logprob_gap", "logprob_gap_max", "ratio", "clip_frac"}  # of a supervised run: nothing was sampled


def chosen(runs: list[RunFolder]) -> list[tuple[Panel, list[str]]]:
    """The panels that these runs have something for, each with its metrics; what no panel names comes last."""
    present = {name: None for run in runs for name in curves(run)}
    panels, used = [], set(HIDDEN)
    for panel in PANELS:
        names = [name for line in panel.lines for name in _matching(line, present)]
        used |= set(names)
        if panel.kind == "accuracy":
            if any(row.get("accuracy") is not None for run in runs for row in run.evaluation):
                panels.append((panel, ["accuracy"]))
        elif names and not (panel.id in QUIET and all(_quiet(run, panel, names) for run in runs)):
            panels.append((panel, names))
    rest = [name for name in present if name not in used and not name.endswith("_std")]
    other = [Panel(f"other-{i}", name, "", (name,), OTHER.what, OTHER.healthy) for i, name in enumerate(rest)]
    return panels + [(panel, list(panel.lines)) for panel in other]


def curves(run: RunFolder) -> dict[str, list[float | None]]:
    """metric -> one value a row; `seconds/other` is what no phase accounts for. Never a metric that is all None."""
    names = {name: None for row in run.metrics for name, value in row.items() if value is not None}
    hidden = MEANINGLESS if run.is_supervised else set()
    found = {name: [row.get(name) for row in run.metrics] for name in names if name not in hidden}
    if any(name.startswith("seconds/") for name in found):
        found["seconds/other"] = [_unaccounted(row) for row in run.metrics]
    return found


def leader(name: str) -> str:
    """The metric whose shape decides which points of `name` are kept: a band has its curve's, phases have the sum's."""
    return "seconds" if name.startswith("seconds/") else name.removesuffix("_std")


def thin(values: list[float | None], limit: int) -> list[int]:
    """Which places to draw, at most `limit`: the first, the last, and of every stretch the lowest, highest and a gap.

    >>> thin([0, 1, 9, 1, 0, 1, 1, -5, 1, 0], limit=6)
    [0, 2, 7, 9]
    """
    n = len(values)
    if n <= limit:
        return list(range(n))
    kept, stretches = {0, n - 1}, max(1, (limit - 2) // 3)
    for i in range(stretches):
        places = range(i * n // stretches, (i + 1) * n // stretches)
        there = [p for p in places if values[p] is not None]
        if there:
            kept |= {min(there, key=values.__getitem__), max(there, key=values.__getitem__)}
        if len(there) < len(places):
            kept.add(next(p for p in places if values[p] is None))
    return sorted(kept)


def _matching(line: str, present: Iterable[str]) -> list[str]:
    if not line.endswith("*"):
        return [name for name in present if name == line]
    return [name for name in present if name.startswith(line[:-1]) and not name.endswith("_std")]


def _quiet(run: RunFolder, panel: Panel, names: list[str]) -> bool:
    seen = [{row.get(name) for row in run.metrics} - {None} for name in names]
    return all(len(values) <= 1 if panel.id == "coefficients" else not any(values) for values in seen)


def _unaccounted(row: Row) -> float | None:
    if row.get("seconds") is None:
        return None
    return max(0.0, row["seconds"] - sum(v for k, v in row.items() if k.startswith("seconds/") and v is not None))
