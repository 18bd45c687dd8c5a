"""Coefficients that adapt: the only state of a run besides its weights. Two numbers, carried from step to step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from grpo_core.config.sections import LossConfig


@dataclass(frozen=True)
class Control:
    kl_coef: float
    entropy_coef: float
    entropy_on: bool = True  # False: the bonus rests, because the policy's entropy is above its target

    @property
    def entropy_bonus(self) -> float:
        """The coefficient that the loss uses."""
        return self.entropy_coef if self.entropy_on else 0.0


def first_control(config: LossConfig) -> Control:
    """What a run starts with."""
    return Control(config.kl_coef, config.entropy_coef)


def next_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, completions: int) -> float:
    """kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) completions / horizon). arXiv:1909.08593, in its code's form.

    `kl` is the step's mean per token. Over `horizon` completions the coefficient changes by a factor of 1.22 at most.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * completions / horizon)


def next_entropy_coef(
    entropy_coef: float, entropy: float, *, target: float, delta: float, lowest: float, highest: float
) -> tuple[float, bool]:
    """entropy_coef + delta where the entropy is at or below its target, else - delta, within [lowest, highest].

    Also whether the bonus is on in the next step, which it is only at or below the target. `entropy` is the step's mean
    per token in nats, so the bonus goes by the step before. Skywork-OR1, arXiv:2505.22312.
    """
    below = entropy <= target
    return min(max(entropy_coef + (delta if below else -delta), lowest), highest), below


def adapt(control: Control, config: LossConfig, kl: float | None, entropy: float, completions: int) -> Control:
    """The coefficients of the next step, from this step's mean KL (None: not measured) and entropy per token.

    A mean over no token is nan, and steers nothing.
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
