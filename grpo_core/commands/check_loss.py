"""The `check-loss` command: check a loss against the laws of losses. Takes seconds on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_core.commands.law_table import check_breaks, print_laws, warn_of_fixed_arguments
from grpo_core.config.function_checks import try_loss
from grpo_core.objective.laws import (
    LOSS_LAWS,
    RATIOS,
    Outcome,
    check_loss,
    clip_table,
    gradient_weights_at,
    ranks,
    start_rank_gaps,
)
from grpo_core.registry import get_fact

PLANE_COLUMNS, PLANE_ROWS = 40, 20  # a character is about twice as high as wide


def run_check_loss(name: str, args: dict[str, Any]) -> int:
    """Print which laws the loss obeys, its gradient weight by ratio, and where its gradient stops.

    Returns 0 if all laws pass, otherwise 1.

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
        _print_plane(loss_fn)
    return code


def draw_plane(loss_fn: Callable, sign: int) -> list[str]:
    """Return where the gradient of a token stops, as rows of characters: p to the right, q upwards, A = `sign`.

    # gradient, . none, - against the sign of the advantage.
    """
    columns, rows = _centers(PLANE_COLUMNS), _centers(PLANE_ROWS)
    logprobs, old = columns.log().repeat(PLANE_ROWS), rows.log().repeat_interleave(PLANE_COLUMNS)
    weights = gradient_weights_at(loss_fn, sign, logprobs, old).view(PLANE_ROWS, PLANE_COLUMNS)
    marks = [["." if abs(x) < 1e-9 else "-" if x < 0 else "#" for x in row] for row in weights.flip(0).tolist()]
    return ["".join(row) for row in marks]


def _centers(count: int) -> Tensor:
    """Return the centers of `count` equal parts of the range from 0 to 1."""
    return (torch.arange(count, dtype=torch.double, device="cpu") + 0.5) / count


def _print_plane(loss_fn: Callable) -> None:
    """Print the plane of p and q for A > 0 and A < 0, side by side."""
    print("\np = exp(l) to the right, q = exp(l_old) = exp(l_roll) upwards, both from 0 to 1:")
    print("# gradient, . none, - against the sign of the advantage")
    print("   ".join(f"{title:<{PLANE_COLUMNS}}" for title in ("A > 0", "A < 0")).rstrip())
    with torch.device("cpu"):
        planes = [draw_plane(loss_fn, sign) for sign in (1, -1)]
    for left, right in zip(*planes, strict=True):
        print(f"{left}   {right}")


def _print_gradient_weights(loss_fn: Callable) -> None:
    """Print the gradient weight at several ratios for A > 0 and A < 0, and the range of ratios in which it is not 0."""
    print("\ngradient weight = -(d loss / d log-prob) / A: 1 is REINFORCE's, 0 is clipped")
    print("ratio  " + "".join(f"  {ratio:<7g}" for ratio in RATIOS))
    for sign, gradient_weights, ratio_range in clip_table(loss_fn):
        print(f"{sign:<7}" + "".join(f"  {value:<7.3g}" for value in gradient_weights) + f"  {ratio_range}")
