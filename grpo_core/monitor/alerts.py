"""Warn of common failures that show in a run's metrics, each once, with the likely cause and a remedy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from grpo_core.config.precision import resolve_dtype
from grpo_core.config.sections import RunConfig
from grpo_core.counts import name_interval

Row = dict[str, float]
Condition = Callable[[list[Row], list[Row]], bool]  # of the last WINDOW_STEPS and the first FIRST_STEPS rows

WINDOW_STEPS = 10  # last steps that an alert looks at
RECENT_STEPS = 5  # last steps whose mean is compared with a limit or with the beginning
FIRST_STEPS = 5  # steps that stand for the beginning of the run
MIN_FAILED_REWARD_STEPS = 3  # steps before a reward that fails on a part of the completions can end the run
MAX_RATIO_ERROR = 1e-4  # distance from 1 on policy
MAX_LOGPROB_GAP = {"fp32": 0.01, "other": 0.3}  # nats per token


@dataclass(frozen=True)
class Alert:
    """A failure, the condition that detects it, and the sentence that is printed."""

    name: str
    condition: Condition  # rows are rows of metrics.jsonl, the newest last
    sentence: str


def _in_every_step(key: str, test: Callable[[float], bool]) -> Condition:
    """Return the condition that `test` is true in each of the last WINDOW_STEPS steps."""
    return lambda rows, first: len(rows) == WINDOW_STEPS and all(key in row and test(row[key]) for row in rows)


def _in_recent_mean(key: str, test: Callable[[float], bool]) -> Condition:
    """Return the condition that `test` is true for the mean of the last RECENT_STEPS steps."""
    return lambda rows, first: len(rows) >= RECENT_STEPS and key in rows[-1] and test(_mean(rows[-RECENT_STEPS:], key))


def _adapter_is_constant(rows: list[Row], first: list[Row]) -> bool:
    norms = {row["adapter_norm"] for row in rows}
    return len(rows) == WINDOW_STEPS and len(norms) == 1 and not any(row["skipped"] for row in rows)


def _entropy_has_tripled(rows: list[Row], first: list[Row]) -> bool:
    if len(first) < FIRST_STEPS or len(rows) < WINDOW_STEPS:
        return False
    return _mean(rows[-RECENT_STEPS:], "entropy") > max(1.0, 3 * _mean(first, "entropy"))


ALERTS = (
    Alert(
        "adapter",
        _adapter_is_constant,
        f"the adapter has not moved in {WINDOW_STEPS} steps: the gradient or the learning rate is 0; look at "
        f"tied_groups, grad_norm and learning_rate in metrics.jsonl",
    ),
    Alert(
        "learning_rate",
        lambda rows, first: rows[-1].get("learning_rate") == 0,
        "the learning rate is 0, so nothing is learned: its schedule has ended; set engine.schedule=constant, or start "
        "a new run with the full trainer.num_steps",
    ),
    Alert(
        "tied",
        _in_every_step("tied_groups", lambda share: share == 1),
        f"in {WINDOW_STEPS} steps all completions of every prompt had the same reward, so nothing is learned: the task "
        f"is too hard or too easy, or the reward does not distinguish completions; read completions.jsonl",
    ),
    Alert(
        "no_reward",
        _in_every_step("no_reward", lambda value: value == 1),
        f"in {WINDOW_STEPS} steps no completion had a reward, so nothing is learned: every reward returned None, or "
        f"every completion was cut off and truncation.name leaves it out; read completions.jsonl",
    ),
    Alert(
        "truncated",
        _in_every_step("truncated", lambda share: share >= 0.95),
        f"in {WINDOW_STEPS} steps nearly every completion was cut off at sampling.max_new_tokens: raise it, or check "
        f"that the prompt asks for a short answer and that the model's end-of-sequence token is right",
    ),
    Alert(
        "kl",
        _in_recent_mean("kl", lambda kl: kl > 1),
        f"the KL from the reference is above 1 nat a token over {RECENT_STEPS} steps, so training is unstable: lower "
        f"engine.learning_rate, or raise loss.kl_coef",
    ),
    Alert(
        "entropy_high",
        _entropy_has_tripled,
        "the entropy has tripled since the run began, so completions turn into noise: lower engine.learning_rate or "
        "loss.entropy_coef, raise loss.kl_coef, or leave truncated completions out of the loss "
        "(truncation.name=mask_loss)",
    ),
    Alert(
        "entropy_low",
        _in_recent_mean("entropy", lambda entropy: entropy < 1e-3),
        "the entropy is below 0.001 nats a token, so the completions of a prompt are all the same: lower "
        "engine.learning_rate, or raise clip_high in loss.args, loss.entropy_coef or sampling.temperature",
    ),
)
ON_POLICY = Alert(
    "ratio",
    lambda rows, first: abs(rows[-1].get("ratio", 1.0) - 1) > MAX_RATIO_ERROR,
    "the ratio is not 1 although every batch is used once: the loss does not compare with the log-probs it is given",
)


class Alerts:
    """The alerts of one run. Metrics are the same on every rank, and so are the alerts."""

    def __init__(self, config: RunConfig) -> None:
        trainer = config.trainer
        self._max_failed_rewards = trainer.max_failed_rewards
        is_taught = config.teacher.trains  # tied groups, and completions without a reward, are trained
        self._pending = [alert for alert in ALERTS if not (is_taught and alert.name in ("tied", "no_reward"))]
        if trainer.num_minibatches * trainer.num_passes == 1:
            self._pending.append(ON_POLICY)
        precision = "fp32" if resolve_dtype(config.model.precision) is torch.float32 else "other"
        self._pending.append(_make_gap_alert(MAX_LOGPROB_GAP[precision]))
        if any(reward.name == config.evaluation.reward for reward in config.all_rewards):
            self._pending.append(_make_hacking_alert(config.label_reward(config.evaluation.reward)))
        self._rows: deque[Row] = deque(maxlen=WINDOW_STEPS)
        self._first: list[Row] = []

    def update(self, row: Row) -> list[str]:
        """Add a step's row of metrics; return the sentences of the alerts that it raises for the first time."""
        self._rows.append(row)
        if len(self._first) < FIRST_STEPS:
            self._first.append(row)
        raised = [alert for alert in self._pending if alert.condition(list(self._rows), self._first)]
        self._pending = [alert for alert in self._pending if alert not in raised]
        return [alert.sentence for alert in raised]

    def check_failed_rewards(self) -> str | None:
        """Return a sentence if a reward failed on too many completions of the last WINDOW_STEPS steps, else None.

        The limit is the share trainer.max_failed_rewards. Before MIN_FAILED_REWARD_STEPS steps, only a reward that
        failed on all completions counts, because a single bad batch is too little to judge by.
        """
        for key in self._rows[-1]:
            if not key.startswith("failed/"):
                continue
            share = _mean(self._rows, key)
            if share > self._max_failed_rewards and (len(self._rows) >= MIN_FAILED_REWARD_STEPS or share == 1):
                return (
                    f"reward {key.removeprefix('failed/')} failed on {share:.0%} of the completions of the last "
                    f"{name_interval(len(self._rows), 'step')}, more than trainer.max_failed_rewards "
                    f"({self._max_failed_rewards:g}) allows"
                )
        return None


def _make_gap_alert(limit: float) -> Alert:
    return Alert(
        "logprob_gap",
        _in_recent_mean("logprob_gap", lambda gap: gap > limit),
        f"sampler and trainer disagree by more than {limit} nats a token (logprob_gap): with lora.dropout above 0 that "
        f"is the noise of dropout; in a mixture of experts it comes with routing_mismatch, and sampling.replay_routing "
        f"lowers it; otherwise compare with sampling.decoder=plain and model.attention=eager, and report "
        f"it as a bug",
    )


def _make_hacking_alert(name: str) -> Alert:
    """Return the alert for reward hacking: the evaluation's reward falls while the total reward rises.

    The evaluation's reward must be among the rewards of the run; a weight of 0 is enough.
    """
    key = f"rewards/{name}"

    def is_hacked(rows: list[Row], first: list[Row]) -> bool:
        if len(rows) < WINDOW_STEPS or any(row.get(k) is None for row in (*rows, *first) for k in (key, "reward")):
            return False
        recent = rows[-RECENT_STEPS:]
        began, now = _mean(first, key), _mean(recent, key)
        return now < min(began / 2, began - 0.1) and _mean(recent, "reward") > _mean(first, "reward")

    return Alert(
        "hacked",
        is_hacked,
        f"{name} has fallen below half of what it was while the total reward rose, so the policy is rewarded for "
        f"something else: read completions.jsonl, bound the other rewards or lower their weights, or raise "
        f"loss.kl_coef",
    )


def _mean(rows: Iterable[Row], key: str) -> float:
    values = [row.get(key, 0.0) for row in rows]
    return sum(values) / len(values)
