"""The built-in environment that calls tools: plain functions in users' files, with type hints and docstrings.

A turn with calls gets their results as its answer, in order; one without ends the completion. A call that cannot be
read, that names no tool, or whose arguments are wrong, and a tool that raises, get a text that begins with "error: ".
Calls of several completions run at the same time, in threads; a tool may be async.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import threading
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

from grpo_core.config.environment_functions import BUILT_IN_TOOLS, ENVIRONMENTS, TOOL_PARSERS, load_tools
from grpo_core.environments.interface import ADDRESS, SURROGATE, Answered, Turn
from grpo_core.environments.tool_calls import Call, check_calls
from grpo_core.schema import ConfigError, coerce, first_line, list_known, list_options, unwrap
from grpo_core.scoring.event_loop import shared_loop

MAX_ERROR_CHARACTERS = 500  # of an error's text, which may quote the policy
KNOWN_TYPES = (bool, int, float, str, list, dict, Any, None, type(None))


@ENVIRONMENTS.register(BUILT_IN_TOOLS)
class Tools:
    """The tools named `tools`; `parser` is a name of tool_calls.PARSERS, or a function in a user's file."""

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
            return Answered((write_error(first_line(error)),), calls=1, errors=1)
        if not calls:
            return Answered(None)
        results = [self._call(call) for call in calls]
        errors = sum(is_error for _, is_error in results)
        # JSON may write half of a character, which a tool may repeat
        texts = tuple(SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text) for text, _ in results)
        return Answered(texts, calls=len(calls), errors=errors)

    def _call(self, call: Call) -> tuple[str, bool]:
        """Return the result of a call as text, and whether it is an error."""
        if isinstance(call, str):
            return write_error(call), True
        name, arguments = call["name"], call["arguments"]
        if name not in self.tools:
            return write_error(f"there is no tool {name:.100}; {list_known(name, self.tools)}"), True
        function = self.tools[name]
        try:
            arguments = check_tool_arguments(name, function, arguments)
            value = function(**arguments)
            if inspect.isawaitable(value):
                value = shared_loop().run(value)
            return write_result(value), False
        except ConfigError as error:
            return write_error(str(error)), True
        except (Exception, SystemExit) as error:  # a program's main function ends with SystemExit
            kind, message = type(error).__name__, first_line(error)
            return write_error(kind if message == kind else f"{kind}: {message}"), True


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
    return {key: _check_value(value, hints.get(key, Any), key) for key, value in arguments.items()}


def _check_value(value: Any, kind: Any, key: str) -> Any:
    """Return a JSON value as the type `kind`, a member of an Enum for its value; unchecked if the type is not known."""
    for option in list_options(kind):
        if isinstance(option, type) and issubclass(option, enum.Enum):
            if value is None and len(list_options(kind)) > 1:
                return None
            literal = Literal[tuple(member.value for member in option)]
            return option(coerce(value, literal, key))
    return coerce(value, kind, key) if _is_known(kind) else value


def _is_known(kind: Any) -> bool:
    """Return whether a JSON value can be checked against a type."""
    if get_origin(kind) is Literal:
        return True
    if len(list_options(kind)) > 1:
        return all(map(_is_known, list_options(kind)))
    if get_origin(kind) in (list, dict):
        return all(map(_is_known, get_args(kind)))
    return kind in KNOWN_TYPES


def write_error(message: str) -> str:
    """Return the text of an error, shortened."""
    text = f"error: {message}"
    return text if len(text) <= MAX_ERROR_CHARACTERS else f"{text[: MAX_ERROR_CHARACTERS - 3]}..."


def write_result(value: Any) -> str:
    """Return the result of a tool as text: JSON, unless it is text already.

    >>> [write_result(value) for value in ("a", 3, {"x": [1.5, None]}, {"b", "a"}, None)]
    ['a', '3', '{"x": [1.5, null]}', '["a", "b"]', '']

    Raises:
        TypeError: its text would have an address in memory, which differs from call to call.
    """
    if isinstance(value, str) or value is None:
        return value or ""
    try:
        return json.dumps(value, ensure_ascii=False, default=_simplify)
    except (TypeError, ValueError, RecursionError):  # such as keys that are no text, or a list that contains itself
        return _write_object(value)


def _simplify(value: Any) -> Any:
    """Return what JSON has for an object of another type."""
    if hasattr(value, "tolist"):  # of NumPy and torch
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return _write_object(value)


def _write_object(value: Any) -> str:
    text = str(value)
    if ADDRESS.search(text):
        raise TypeError(f"the tool returned an object of the type {type(value).__name__}, which is no JSON")
    return text
