"""`check-loss` and `check-advantage`: is a function sound? Seconds on a CPU, before any GPU is booked."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from grpo_core.config.checks import try_advantage, try_loss
from grpo_core.objective.advantage_laws import ADVANTAGE_LAWS, check_advantage
from grpo_core.objective.laws import LOSS_LAWS, RATIOS, Outcome, check_loss, clip_table, ranks, start_rank_gaps
from grpo_core.registry import fact
from grpo_core.schema import ConfigError, list_known

HINTS = {
    "finite": "a wholly masked row has 0 tokens; losses.token_ratio is exp(l - l_old) with the difference clamped",
    "on_policy": "a factor changes the learning rate, a wrong sign its direction; averaging is the trainer's",
    "clip": "is the sign right? the loss of a good token falls as its log-prob rises",
    "ties": "advantages.center is r - mean, exactly 0 in a tied group",
    "unscored": "advantages.center is r - mean over the scored, 0 for the others",
    "gradcheck": "if something is detached on purpose, declare it: my_loss.breaks = {'gradcheck': 'why'}",
}


def run_check_loss(name: str, args: dict[str, Any]) -> int:
    """Print the laws that the loss holds and breaks, with the numbers; 0 if all are as they should be, else 1.

    Raises:
        ConfigError: no such loss, or arguments that it does not take.
    """
    loss_fn = try_loss(name, args)
    _check_breaks(name, loss_fn, [*LOSS_LAWS, "ranks"])
    _note_arguments(loss_fn)
    gaps = start_rank_gaps([(name, args)])  # they start while the rest runs
    outcomes = check_loss(loss_fn)
    holds, shown = ranks(gaps()[0])
    outcomes.append(Outcome("ranks", holds, shown, (fact(loss_fn, "breaks") or {}).get("ranks")))
    code = _table(name, args, outcomes, {**LOSS_LAWS, "ranks": ranks})
    if not next(outcome.holds for outcome in outcomes if outcome.law == "shape"):
        return code
    print("\nwhere it pulls: -(d loss / d log-prob) / A; 1 is REINFORCE's, 0 is clipped")
    print("ratio  " + "".join(f"  {ratio:<7g}" for ratio in RATIOS))
    for sign, pulls, where in clip_table(loss_fn):
        print(f"{sign:<7}" + "".join(f"  {pull:<7.3g}" for pull in pulls) + f"  pulls {where}")
    return code


def run_check_advantage(name: str, args: dict[str, Any]) -> int:
    """As `run_check_loss`, for an advantage."""
    advantage_fn = try_advantage(name, args)
    _check_breaks(name, advantage_fn, [*ADVANTAGE_LAWS])
    _note_arguments(advantage_fn)
    return _table(name, args, check_advantage(advantage_fn), ADVANTAGE_LAWS)


def _note_arguments(function: Callable) -> None:
    """Say which arguments no YAML can set."""
    parameters = inspect.signature(getattr(function, "func", function)).parameters.values()
    hidden = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty]
    if hidden:
        print(f"note: no configuration can set {', '.join(hidden)}: an argument to be set stands after a *\n")


def _check_breaks(name: str, function: Callable, laws: list[str]) -> None:
    for law in fact(function, "breaks") or {}:
        if law not in laws:
            raise ConfigError(f"{name}: its attribute `breaks` names {law!r}; {list_known(law, laws)}")


def _table(name: str, args: dict[str, Any], outcomes: list[Outcome], laws: dict[str, Callable]) -> int:
    given = f"  {', '.join(f'{key} = {value}' for key, value in args.items())}" if args else ""
    print(f"{name}{given}\n")
    for outcome in outcomes:
        verdict = "holds" if outcome.holds else "FAILS"
        if outcome.declared is not None:
            verdict = "HOLDS" if outcome.holds else "breaks"
        shown = outcome.shown if len(outcome.shown) <= 16 else ""
        print(f"{verdict:<7} {outcome.law:<15} {shown:<16} {laws[outcome.law].__doc__}")
        if not shown:
            print(f"{'':<40} {outcome.shown}")
        if not outcome.ok and outcome.law in HINTS:
            print(f"{'':<40} ({HINTS[outcome.law]})")
        if outcome.declared is not None:
            said = "declared as broken, but it holds: take it out of `breaks`" if outcome.holds else "as declared"
            print(f"{'':<40} ({said}: {outcome.declared})")
    failed = [outcome.law for outcome in outcomes if not outcome.ok]
    print(
        f"\n{len(outcomes)} laws, "
        + (f"not as it should be: {', '.join(failed)}" if failed else "all as they should be")
    )
    return 1 if failed else 0
