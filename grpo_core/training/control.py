"""Adapt the KL and entropy coefficients from step to step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from grpo_core.config.sections import LossConfig, RunConfig


@dataclass(frozen=True)
class Control:
    """The coefficients of one step."""

    kl_coef: float
    entropy_coef: float
    entropy_on: bool = True  # False: no bonus in this step, because the entropy is above its target

    @property
    def active_entropy_coef(self) -> float:
        """Coefficient of the mean entropy in this step's loss: `entropy_coef`, or 0 while there is no bonus."""
        return self.entropy_coef if self.entropy_on else 0.0


def first_control(config: LossConfig) -> Control:
    """Return the coefficients of the first step."""
    return Control(config.kl_coef, config.entropy_coef)


def next_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, completions: int) -> float:
    """Return kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) completions / horizon).

    `kl` is the step's mean per token in nats. Over `horizon` completions the coefficient changes by a factor of 1.22 at
    most. arXiv:1909.08593, in the form of its published code.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * completions / horizon)


def next_entropy_coef(
    entropy_coef: float, entropy: float, *, target: float, delta: float, lowest: float, highest: float
) -> tuple[float, bool]:
    """Return the next entropy coefficient, and whether the bonus is on in the next step.

    The coefficient rises by delta where the entropy is at or below its target, else it falls by delta, within
    [lowest, highest]. The bonus is on only at or below the target. `entropy` is this step's mean per token in nats.
    Skywork-OR1, arXiv:2505.22312.
    """
    below = entropy <= target
    return min(max(entropy_coef + (delta if below else -delta), lowest), highest), below


def adapt(control: Control, config: LossConfig, kl: float | None, entropy: float, completions: int) -> Control:
    """Return the next step's coefficients, from this step's mean KL (None: not measured) and entropy, nats per token.

    A nan, the mean over no tokens, leaves its coefficient unchanged.
    """
    if config.kl_target is not None and kl is not None and not math.isnan(kl):
        kl_coef = next_kl_coef(
            control.kl_coef, kl, target=config.kl_target, horizon=config.kl_horizon, completions=completions
        )
        control = replace(control, kl_coef=kl_coef)
    if config.entropy_target is not None and not math.isnan(entropy):
        entropy_coef, on = next_entropy_coef(
            control.entropy_coef,
            entropy,
            target=config.entropy_target,
            delta=config.entropy_delta,
            lowest=config.entropy_min,
            highest=config.entropy_max,
        )
        control = replace(control, entropy_coef=entropy_coef, entropy_on=on)
    return control


def next_control(control: Control, config: RunConfig, row: dict[str, float]) -> Control:
    """Return the coefficients after the step with this `row` of metrics; a skipped optimizer step leaves them alone."""
    if row["skipped"]:
        return control
    return adapt(control, config.loss, row.get("kl"), row["entropy"], config.trainer.completions_per_step)
