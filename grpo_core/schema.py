"""What a user may write: typed values, and one sentence when a value does not fit."""

import difflib
import inspect
import math
import sys
import traceback
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from grpo_core import trl_names


class ConfigError(ValueError):
    """What a user asked for cannot be run.

    The message is one sentence that names the key, the value and what is allowed; the commands print it without a
    traceback and exit with code 2. Where it quotes what holds a line's end, that is shown as an escape.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message).replace("\n", "\\n"))


def printable(text: str) -> str:
    r"""`text` for a terminal: control characters and other invisible ones as escapes, but for newlines and tabs.

    >>> printable("red: \x1b[31m")
    'red: \\x1b[31m'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def summarize_error(error: BaseException) -> str:
    """An exception in one line: its type, its message's first line, and the line of the user's that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    libraries = (sys.prefix, sys.base_prefix, str(Path(__file__).parent), "<")
    own = [frame for frame in frames if not frame.filename.startswith(libraries) and "-packages" not in frame.filename]
    place = (own or frames)[-1]
    kind, message = type(error).__name__, first_line(error)
    named = kind if message == kind else f"{kind}: {message}"
    return f"{named} ({Path(place.filename).name}, line {place.lineno})"


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its type where the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def finite_or_none(value: Any) -> Any:
    """Return `value` for JSON, which has no NaN and no infinity: such floats become None, in dicts and lists too.

    >>> finite_or_none({"loss": float("nan"), "ratio": [1.0, float("inf")]})
    {'loss': None, 'ratio': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: finite_or_none(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite_or_none(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keyword_arguments(function: Callable) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of `function` that have a default: its configuration schema."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def check_arguments(function: Callable, given: dict[str, Any], key: str) -> dict[str, Any]:
    """Check `given` against the schema of `function`.

    Raises:
        ConfigError: an argument that `function` does not take, or a value of the wrong type.
    """
    schema = keyword_arguments(function)
    hints = get_type_hints(function)
    for name in given:
        if name not in schema:
            hint = "; to be one, an argument stands after a * and has a default"
            there = hint if name in inspect.signature(function).parameters else ""
            why = trl_names.key_hint(f"{key}.{name}") or list_known(name, schema)
            raise ConfigError(f"unknown key {key}.{name}; {why}{there}")
    return {name: coerce(value, _kind(schema[name], hints), f"{key}.{name}") for name, value in given.items()}


def list_known(name: str, names: Iterable[str]) -> str:
    """'known: a, b (did you mean a?)' for an error message."""
    names = sorted(names)
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"known: {', '.join(names) or 'none'}" + (f" (did you mean {close[0]}?)" if close else "")


def coerce(value: Any, kind: Any, key: str) -> Any:
    """Return `value` as the type `kind`, or raise.

    Understands bool, int, float, str, None, Literal, unions, list[...], dict and Any. A float may be written as an
    integer or as text such as 5e-5, which YAML 1.1 reads as a string. Nothing else is converted.

    Raises:
        ConfigError: the value is not of that type; the message names the key, the value and the type.
    """
    if kind is Any:
        return value
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for option in options:
            try:
                return coerce(value, option, key)
            except ConfigError:
                continue
    elif origin is Literal:
        if value in options and type(value) in {type(option) for option in options}:
            return value
    elif origin is list:
        if isinstance(value, list):
            return [coerce(item, options[0], f"{key}[{i}]") for i, item in enumerate(value)]
    elif kind is float:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                pass
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif kind in (None, type(None)):
        if value is None:
            return None
    elif isinstance(value, origin or kind):
        return value
    why = trl_names.value_hint(key, value) or f"it must be {describe(kind)}"
    raise ConfigError(f"{key} is {value!r}; {why}")


def describe(kind: Any) -> str:
    """A type in words: 'one of a, b', 'int or null'."""
    origin, options = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ("one of " if len(options) > 1 else "") + ", ".join(str(option) for option in options)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in options)
    if origin is list:
        return f"a list of {describe(options[0])}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", dict: "a mapping"}
    return "null" if kind in (None, type(None)) else names.get(origin or kind, getattr(kind, "__name__", str(kind)))


def _kind(parameter: inspect.Parameter, hints: dict[str, Any]) -> Any:
    """The annotation, or the type of the default where a user's function has no annotation."""
    if parameter.name in hints:
        return hints[parameter.name]
    return Any if parameter.default is None else type(parameter.default)
