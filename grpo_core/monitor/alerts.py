"""What a run's metrics say is going wrong, each once, with the likely cause and what to do about it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from grpo_core.config.sections import RunConfig

Row = dict[str, float]

WINDOW = 10  # steps
RECENT = 5  # of them
ENOUGH = 3  # steps to judge a reward by
FIRST = 5  # steps that are what the run began with


@dataclass(frozen=True)
class Alert:
    """`holds(rows, first)`: of the last WINDOW rows of metrics, newest last, and of the first FIRST of the run."""

    name: str
    holds: Callable[[list[Row], list[Row]], bool]
    sentence: str


def _every(key: str, test: Callable[[float], bool]) -> Callable[[list[Row], list[Row]], bool]:
    """In each of the last WINDOW steps."""
    return lambda rows, first: len(rows) == WINDOW and all(key in row and test(row[key]) for row in rows)


def _recently(key: str, test: Callable[[float], bool]) -> Callable[[list[Row], list[Row]], bool]:
    """On the mean of the last RECENT steps."""
    return lambda rows, first: len(rows) >= RECENT and key in rows[-1] and test(_mean(rows[-RECENT:], key))


def _stands(rows: list[Row], first: list[Row]) -> bool:
    return (
        len(rows) == WINDOW and len({row["adapter_norm"] for row in rows}) == 1 and not any(r["skipped"] for r in rows)
    )


def _rises(rows: list[Row], first: list[Row]) -> bool:
    if len(first) < FIRST or len(rows) < WINDOW:
        return False
    return _mean(rows[-RECENT:], "entropy") > max(1.0, 3 * _mean(first, "entropy"))


ALERTS = (
    Alert(
        "adapter",
        _stands,
        f"the adapter has not moved in {WINDOW} steps: the gradient or the learning rate is 0; look at tied_groups, "
        f"grad_norm and learning_rate in metrics.jsonl",
    ),
    Alert(
        "learning_rate",
        lambda rows, first: rows[-1].get("learning_rate") == 0,
        "the learning rate is 0, so nothing is learned: its schedule has run out; engine.schedule=constant, or a new "
        "run with the number of steps that it shall have",
    ),
    Alert(
        "tied",
        _every("tied_groups", lambda share: share == 1),
        f"in {WINDOW} steps all completions of every prompt had the same reward, so there is nothing to learn from: "
        f"the task is too hard or too easy, or the reward does not tell completions apart; read completions.jsonl",
    ),
    Alert(
        "truncated",
        _every("truncated", lambda share: share >= 0.95),
        f"in {WINDOW} steps nearly every completion was cut off at sampling.max_new_tokens: raise it, or see whether "
        f"the prompt asks for an end and the model's end-of-sequence token is right",
    ),
    Alert(
        "kl",
        _recently("kl", lambda kl: kl > 1),
        f"the KL from the reference is above 1 nat a token over {RECENT} steps: the policy is running away; lower "
        f"engine.learning_rate, or raise loss.kl_coef",
    ),
    Alert(
        "entropy_high",
        _rises,
        "the entropy has tripled since the run began: completions turn into noise; lower engine.learning_rate or "
        "loss.entropy_coef, raise loss.kl_coef, or leave out what is cut off (truncation.name=mask_loss)",
    ),
    Alert(
        "entropy_low",
        _recently("entropy", lambda entropy: entropy < 1e-3),
        "the entropy is below 0.001 nats a token: completions of a prompt are all the same, and there is nothing left "
        "to choose from; lower engine.learning_rate, or raise clip_high in loss.args, loss.entropy_coef or the "
        "temperature",
    ),
)


class Alerts:
    """Watches the rows of a run. The same on every rank, since the rows are."""

    def __init__(self, config: RunConfig) -> None:
        trainer = config.trainer
        self._limit = trainer.max_failed_rewards
        self._alerts = list(ALERTS)
        if trainer.num_minibatches * trainer.num_passes == 1:
            self._alerts.append(ON_POLICY)
        self._alerts.append(_gap(0.01 if config.model.precision == "fp32" else 0.3))
        if any(reward.name == config.evaluation.reward for reward in config.rewards):
            self._alerts.append(_hacked(config.evaluation.reward))
        self._rows: deque[Row] = deque(maxlen=WINDOW)
        self._first: list[Row] = []

    def see(self, row: Row) -> list[str]:
        """What is to be said now and was not before."""
        self._rows.append(row)
        self._first += [row] if len(self._first) < FIRST else []
        found = [alert for alert in self._alerts if alert.holds(list(self._rows), self._first)]
        self._alerts = [alert for alert in self._alerts if alert not in found]
        return [alert.sentence for alert in found]

    def too_many_failed(self) -> str | None:
        """A sentence if a reward has failed on more than trainer.max_failed_rewards of the last steps' completions.

        In the first steps only if it has failed on all: one batch that goes wrong early is no share to go by.
        """
        for key in self._rows[-1]:
            if not key.startswith("failed/"):
                continue
            share = _mean(self._rows, key)
            if share > self._limit and (len(self._rows) >= ENOUGH or share == 1):
                return (
                    f"reward {key.removeprefix('failed/')} failed on {share:.0%} of the completions of the last "
                    f"{len(self._rows)} steps, more than trainer.max_failed_rewards ({self._limit:g}) allows"
                )
        return None


ON_POLICY = Alert(
    "ratio",
    lambda rows, first: abs(rows[-1].get("ratio", 1.0) - 1) > 1e-4,
    "the ratio is not 1 although every batch is used once: the loss does not compare with the log-probs it was given",
)


def _gap(limit: float) -> Alert:
    return Alert(
        "logprob_gap",
        _recently("logprob_gap", lambda gap: gap > limit),
        f"sampler and trainer disagree by more than {limit} nats a token (logprob_gap): with lora.dropout it holds the "
        f"dropout's noise; else compare with sampling.decoder=plain and model.attention=eager, and report it",
    )


def _hacked(name: str) -> Alert:
    """What the evaluation counts, where it is among the rewards (a weight of 0 is enough), beside what is paid for."""
    key = f"rewards/{name}"

    def holds(rows: list[Row], first: list[Row]) -> bool:
        if len(rows) < WINDOW or any(row.get(k) is None for row in (*rows, *first) for k in (key, "reward")):
            return False
        began, now = (_mean(part, key) for part in (first, rows[-RECENT:]))
        return now < min(began / 2, began - 0.1) and _mean(rows[-RECENT:], "reward") > _mean(first, "reward")

    return Alert(
        "hacked",
        holds,
        f"{name} has fallen below half of what it was while the whole reward rose: the policy has found something "
        f"else that is paid for; read completions.jsonl, give the other rewards an upper end or less weight, or raise "
        f"loss.kl_coef",
    )


def _mean(rows: Iterable[Row], key: str) -> float:
    values = [row.get(key, 0.0) for row in rows]
    return sum(values) / len(values)
