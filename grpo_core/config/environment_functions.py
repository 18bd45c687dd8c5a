"""The registries of environments, tools and parsers of tool calls, which are built in or in users' files.

An environment is a class (environments/interface.py); a tool and a parser are functions (environments/tools.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from grpo_core.registry import Registry
from grpo_core.schema import ConfigError, unwrap

BUILT_IN_TOOLS = "tools"  # the environment that calls tools
CALCULATOR = "calculator"  # the environment that completes calculations
ENVIRONMENTS = Registry(
    "environment",
    allows_classes=True,
    modules={BUILT_IN_TOOLS: "grpo_core.environments.tools", CALCULATOR: "grpo_core.environments.calculator"},
)
TOOLS = Registry("tool", allows_async=True)
TOOL_PARSERS = Registry(
    "tool_parser", modules=dict.fromkeys(("tagged_json", "llama_3_json"), "grpo_core.environments.tool_calls")
)


def build_environment(name: str, args: dict[str, Any]) -> Callable[..., Any]:
    """Return what makes the environment of a completion from its row and seed, with `args` bound.

    Raises:
        ConfigError: there is no such class, it does not take a row, a seed and `args`, or it has no method step.
    """
    make = ENVIRONMENTS.build(name, args, "environment.args")
    try:
        inspect.signature(make).bind({}, 0)
    except TypeError as error:
        raise ConfigError(
            f"environment.name is {name}, which cannot be made from a row and a seed ({error}); it must begin with "
            f"def __init__(self, row, seed), and further arguments stand after a * and have defaults"
        ) from None
    inner = unwrap(make)
    if inspect.isclass(inner):
        _check_step(name, inner)
    return make


def _check_step(name: str, kind: type) -> None:
    """Check that the class `kind`, which is called `name`, has a method step that can be called with a turn."""
    if not callable(step := getattr(kind, "step", None)):
        raise ConfigError(f"environment.name is {name}, a class without the method step(self, turn)")
    if inspect.isgeneratorfunction(step) or inspect.isasyncgenfunction(step):
        raise ConfigError(f"environment.name is {name}, whose method step yields; it must return the answer")
    given = (None, None) if inspect.isfunction(inspect.getattr_static(kind, "step")) else (None,)  # self and a turn
    try:
        inspect.signature(step).bind(*given)
    except TypeError as error:
        raise ConfigError(
            f"environment.name is {name}, whose method step cannot be called with a turn ({error}); it must be "
            f"def step(self, turn)"
        ) from None
    except ValueError:  # it has no signature
        return


def load_tools(names: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Return the tools of a configuration by the names under which they are called.

    Raises:
        ConfigError: a name is not that of a function in a file, or two functions have the same name.
    """
    tools: dict[str, Callable[..., Any]] = {}
    for i, name in enumerate(names):
        function = TOOLS.get(name)
        own = name.rpartition(":")[2]
        _check_tool(f"tools[{i}] is {name!r}", function)
        if own in tools:
            raise ConfigError(f"tools[{i}] is {name!r}, and an earlier tool has the name {own}, too; rename one")
        tools[own] = function
    return tools


def _check_tool(key: str, function: Callable[..., Any]) -> None:
    """Check that a call, which gives every argument by its name, can give all arguments of a tool."""
    if inspect.isgeneratorfunction(unwrap(function)):
        raise ConfigError(f"{key}, which yields; a tool must return its result")
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(
                f"{key}, whose argument {str(parameter).partition(':')[0]} has no name for a call; a call gives every "
                f"argument by its name, so list them one by one (in a decorator, use functools.wraps)"
            )
