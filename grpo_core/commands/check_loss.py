"""The `check-loss` command: check a loss against the laws of losses. Takes seconds on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grpo_core.commands.law_table import check_breaks, print_laws, warn_of_fixed_arguments
from grpo_core.config.checks import try_loss
from grpo_core.objective.laws import LOSS_LAWS, RATIOS, Outcome, check_loss, clip_table, ranks, start_rank_gaps
from grpo_core.registry import get_fact


def run_check_loss(name: str, args: dict[str, Any]) -> int:
    """Print which laws the loss obeys, and its gradient weight by ratio. Returns 0 if all laws pass, otherwise 1.

    Raises:
        ConfigError: there is no such loss, or it does not take these arguments.
    """
    loss_fn = try_loss(name, args)
    check_breaks(name, loss_fn, [*LOSS_LAWS, "ranks"])
    warn_of_fixed_arguments(loss_fn)
    rank_gaps = start_rank_gaps([(name, args)])  # two processes, which start while the other laws are checked
    outcomes = check_loss(loss_fn)
    holds, result = ranks(rank_gaps()[0])
    outcomes.append(Outcome("ranks", holds, result, (get_fact(loss_fn, "breaks") or {}).get("ranks")))
    code = print_laws(name, args, outcomes, {**LOSS_LAWS, "ranks": ranks})
    if next(outcome.holds for outcome in outcomes if outcome.law == "shape"):
        _print_gradient_weights(loss_fn)
    return code


def _print_gradient_weights(loss_fn: Callable) -> None:
    """Print the gradient weight at several ratios for A > 0 and A < 0, and the range of ratios in which it is not 0."""
    print("\ngradient weight = -(d loss / d log-prob) / A: 1 is REINFORCE's, 0 is clipped")
    print("ratio  " + "".join(f"  {ratio:<7g}" for ratio in RATIOS))
    for sign, gradient_weights, ratio_range in clip_table(loss_fn):
        print(f"{sign:<7}" + "".join(f"  {value:<7.3g}" for value in gradient_weights) + f"  {ratio_range}")
