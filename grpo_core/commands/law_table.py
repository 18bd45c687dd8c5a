"""The table of laws that `check-loss` and `check-advantage` print."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from grpo_core.objective.laws import Outcome
from grpo_core.registry import get_fact
from grpo_core.schema import ConfigError, list_known

MAX_SHORT_RESULT = 16  # characters of a law's result that fit into its column; longer ones get a line of their own
INDENT = " " * 40  # of every line below a law
HINTS = {  # law -> advice when it fails
    "finite": "a masked row has 0 tokens; grpo_core.token_ratio is exp(l - l_old) with the difference clamped",
    "on_policy": "a factor changes the learning rate, a wrong sign the direction; loss.average does the averaging",
    "clip": "check the sign: the loss of a token with A > 0 falls as its log-prob rises",
    "ties": "grpo_core.center returns r - mean, exactly 0 in a tied group",
    "unscored": "grpo_core.center returns r - mean over the completions with a reward, 0 for the others",
    "gradcheck": "if a part is detached on purpose, declare it: my_loss.breaks = {'gradcheck': 'the reason'}",
}


def check_breaks(name: str, function: Callable, laws: list[str]) -> None:
    """Raise ConfigError if the function's attribute `breaks` names a law that does not exist."""
    for law in get_fact(function, "breaks") or {}:
        if law not in laws:
            raise ConfigError(f"{name}: the attribute `breaks` names {law!r}, which is no law; {list_known(law, laws)}")


def warn_of_fixed_arguments(function: Callable) -> None:
    """Print a note about arguments with a default that the configuration cannot set."""
    parameters = inspect.signature(getattr(function, "func", function)).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty]
    if names:
        print(f"note: the configuration cannot set {', '.join(names)}; make it keyword-only (put it after a *)\n")


def print_laws(name: str, args: dict[str, Any], outcomes: list[Outcome], laws: dict[str, Callable]) -> int:
    """Print a line per law, with advice for those that fail.

    Returns 0 if every law holds or is broken as the function declares, otherwise 1.
    """
    values = ", ".join(f"{key} = {value}" for key, value in args.items())
    print(f"{name}  {values}".rstrip() + "\n")
    for outcome in outcomes:
        short_result = outcome.result if len(outcome.result) <= MAX_SHORT_RESULT else ""
        print(f"{_verdict(outcome):<7} {outcome.law:<15} {short_result:<16} {laws[outcome.law].__doc__}")
        if not short_result:
            print(f"{INDENT} {outcome.result}")
        if not outcome.ok and outcome.law in HINTS:
            print(f"{INDENT} ({HINTS[outcome.law]})")
        if outcome.declared is not None:
            state = "in `breaks`, but the law holds: remove it there" if outcome.holds else "as declared in `breaks`"
            print(f"{INDENT} ({state}: {outcome.declared})")
    failed = [outcome.law for outcome in outcomes if not outcome.ok]
    summary = f"{len(failed)} failed: {', '.join(failed)}" if failed else "all passed"
    print(f"\n{len(outcomes)} laws, {summary}")
    return 1 if failed else 0


def _verdict(outcome: Outcome) -> str:
    """Return the verdict on a law; in capitals if it is not the expected one."""
    if outcome.declared is None:
        return "holds" if outcome.holds else "FAILS"
    return "HOLDS" if outcome.holds else "breaks"
