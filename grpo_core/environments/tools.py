"""The built-in environment that calls tools: plain functions in users' files, with type hints and docstrings.

A turn with calls gets their results as its answer, in order; one without ends the completion. A call that cannot be
read, that names no tool, or whose arguments are wrong, and a tool that raises, get a text that begins with "error: ".
Calls of several completions run at the same time, in threads; a tool may be async.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

from grpo_core.config.environment_functions import BUILT_IN_TOOLS, ENVIRONMENTS, TOOL_PARSERS, load_tools
from grpo_core.environments.interface import Answered, Turn
from grpo_core.environments.tool_calls import Call, check_calls
from grpo_core.schema import ConfigError, coerce, first_line, list_known, list_options, unwrap
from grpo_core.scoring.event_loop import shared_loop

KNOWN_TYPES = (bool, int, float, str, list, dict, Any, None, type(None))


@ENVIRONMENTS.register(BUILT_IN_TOOLS)
class Tools:
    """The tools named `tools`; `parser` is the form of the calls (tool_calls.py), or a function in a user's file."""

    def __init__(
        self, row: dict[str, Any], seed: int, *, tools: list[str] | None = None, parser: str = "tagged_json"
    ) -> None:
        self.tools = _load_tools_once(tuple(tools or ()))
        self.parse = TOOL_PARSERS.get(parser)

    def step(self, turn: Turn) -> Answered:
        """Call what the turn calls, and return the results."""
        try:
            calls = check_calls(self.parse(turn.text))
        except Exception as error:  # of a user's parser: the turn is no call that it can read
            return Answered((f"error: {first_line(error)}",), calls=1, errors=1)
        if not calls:
            return Answered(None)
        results = [self._call(call) for call in calls]
        errors = sum(is_error for _, is_error in results)
        return Answered(tuple(text for text, _ in results), calls=len(calls), errors=errors)

    def _call(self, call: Call) -> tuple[str, bool]:
        """Return the result of a call as text, and whether it is an error."""
        if isinstance(call, str):
            return f"error: {call}", True
        name, arguments = call["name"], call["arguments"]
        if name not in self.tools:
            return f"error: there is no tool {name}; {list_known(name, self.tools)}", True
        function = self.tools[name]
        try:
            arguments = check_tool_arguments(name, function, arguments)
            value = function(**arguments)
            if inspect.isawaitable(value):
                value = shared_loop().run(value)
        except ConfigError as error:
            return f"error: {error}", True
        except Exception as error:
            return f"error: {type(error).__name__}: {first_line(error)}", True
        return write_result(value), False


_lock = threading.Lock()
_loaded: dict[tuple[str, ...], dict[str, Callable[..., Any]]] = {}


def _load_tools_once(names: tuple[str, ...]) -> dict[str, Callable[..., Any]]:
    """Return the tools, whose files are imported once in this process."""
    with _lock:
        if names not in _loaded:
            _loaded[names] = load_tools(names)
        return _loaded[names]


def check_tool_arguments(name: str, function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call, whose types are those of the function.

    Raises:
        ConfigError: the function does not take one of them, needs another one, or needs another type.
    """
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"the arguments of {name} are wrong: {error}") from None
    try:
        hints = get_type_hints(unwrap(function))
    except Exception:  # an annotation may name a type that exists for a type checker only
        hints = {}
    return {
        key: coerce(value, hints[key], key) if key in hints and _is_known(hints[key]) else value
        for key, value in arguments.items()
    }


def _is_known(kind: Any) -> bool:
    """Return whether a JSON value can be checked against a type."""
    if get_origin(kind) is Literal:
        return True
    if len(list_options(kind)) > 1:
        return all(map(_is_known, list_options(kind)))
    if get_origin(kind) in (list, dict):
        return all(map(_is_known, get_args(kind)))
    return kind in KNOWN_TYPES


def write_result(value: Any) -> str:
    """Return the result of a tool as text: JSON, unless it is text already.

    >>> [write_result(value) for value in ("a", 3, {"x": [1.5, None]}, None)]
    ['a', '3', '{"x": [1.5, null]}', '']
    """
    if isinstance(value, str) or value is None:
        return value or ""
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):  # such as keys that are no text
        return str(value)
