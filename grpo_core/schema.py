"""Check values that a user wrote against types, and report a wrong one in one sentence."""

import contextlib
import datetime
import difflib
import functools
import inspect
import math
import numbers
import operator
import os
import re
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from grpo_core import trl_names

RAISED = re.compile(r"raised (\w+): .*\(([^()]+, line \d+)\)", re.S)  # as `summarize_error` writes it
RETURNED = re.compile(r"returned .* for completion \d+", re.S)  # a reward's value that is no number

GENERATED = ("builtin:", "reasoning_gym:")  # how a path of data begins that is generated, with a test split
MAX_NAME_BYTES = 255  # of one file or folder; the limit of every common file system
MAX_PATH_BYTES = 4095  # PATH_MAX of Linux without the null byte
MAX_SHOWN_PATH = 60  # characters of a path that is too long


class ConfigError(ValueError):
    """An error in what a user asked for.

    The message is one sentence that names the key, the value and what is allowed. The commands print it without a
    traceback and exit with code 2. Line ends and other control characters in the message are replaced by escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message).replace("\n", "\\n"))


def printable(text: str) -> str:
    r"""Replace control characters and other invisible characters by escapes, except newlines and tabs.

    >>> printable("red: \x1b[31m")
    'red: \\x1b[31m'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


JINJA_FILES = ("<template>", "<unknown>")  # names of a template's own frames in a traceback


def summarize_error(error: BaseException) -> str:
    """Describe an exception in one line: its type, the first line of its message, and the line of code that raised it.

    That line is the innermost one in a user's file, or the innermost one of all if no user's file is involved.
    """
    frames = traceback.extract_tb(error.__traceback__)
    libraries = (sys.prefix, sys.base_prefix, str(Path(__file__).parent), "<")
    own = [frame for frame in frames if not frame.filename.startswith(libraries) and "-packages" not in frame.filename]
    frame = (own or frames)[-1]
    kind, message = type(error).__name__, first_line(error)
    description = kind if message == kind else f"{kind}: {message}"
    file = "the template" if frame.filename in JINJA_FILES else Path(frame.filename).name
    return f"{description} ({file}, line {frame.lineno})"


def find_failure_kind(sentence: str) -> str:
    """Return a sentence about a failure without the values in it, so that the same failure is known again.

    An exception keeps its type and its line, a wrong value nothing.

    >>> find_failure_kind("reward f raised ValueError: no number in 'x' (f.py, line 3)")
    'reward f raised ValueError (f.py, line 3)'
    """
    sentence = RAISED.sub(r"raised \1 (\2)", sentence)
    return RETURNED.sub("returned for completion", sentence)


def describe_eval_rows(path: str, split: str, eval_path: str | None, eval_split: str | None) -> tuple[str, str]:
    """Return the path of a run's evaluation rows, and which of its rows they are, from the keys of `data`."""
    if eval_path is None and eval_split is None:
        return path, "test" if path.startswith(GENERATED) else f"held out of {split}"
    path = eval_path or path
    return path, describe_split(path, eval_split or "train")


def describe_split(path: str, split: str) -> str:
    """Return the name of a split; a file has no splits but those that a column names, else it is the whole file."""
    return "the whole file" if Path(path).is_file() and "=" not in split else split


def describe_impossible_path(path: str | Path, max_bytes: int = MAX_PATH_BYTES) -> str | None:
    """Return why no file system can have `path`, as the end of a sentence that begins with its key, or None."""
    text = str(path)
    try:
        longest = max(len(part.encode()) for part in text.split("/"))
        size = len(text.encode())
    except UnicodeEncodeError as error:  # a byte that is not UTF-8, which config.yaml could not hold
        return f"is {text!a}; a path must not hold {error.object[error.start]!a}, which is not UTF-8"
    if "\0" in text:
        return f"is {text!r}; a path must not hold a null character"
    if longest > MAX_NAME_BYTES:
        return f"is {_cut(text)}; the name of a file or folder may have {MAX_NAME_BYTES} bytes, not {longest:,}"
    if size > max_bytes:
        return f"is {_cut(text)}; a path may have {max_bytes:,} bytes here, not {size:,}"
    return None


def _cut(text: str) -> str:
    return repr(text if len(text) <= MAX_SHOWN_PATH else f"{text[:MAX_SHOWN_PATH]}...")


def describe_exit(code: int) -> str:
    """Return the exit code of a process, or -n for signal n, as a verb phrase."""
    if code >= 0:
        return f"ended with exit code {code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"was ended by {names.get(-code, f'signal {-code}')}"


def read_message(error: BaseException) -> str:
    """Return the message of an exception, which may be a user's class; where it raises one itself, a remark on that."""
    try:
        return str(error)
    except (Exception, SystemExit) as problem:
        return f"its message cannot be read, because __str__ raises {type(problem).__name__}"


def show_value(value: Any, limit: int = 40) -> str:
    """Return the beginning of the `repr` of a value of any class, or its type if that raises an exception."""
    try:
        return repr(value)[:limit]
    except (Exception, SystemExit):
        return f"a {type(value).__name__} without a repr"


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, with the next if it ends with a colon; or its type's name."""
    lines = [line.strip() for line in read_message(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


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
    """Return the keyword-only parameters of `function` that have a default, which are its configuration schema."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def argument_types(function: Callable) -> dict[str, Any]:
    """Return the types of the keyword arguments of `function`, which may be a partial, a callable object or a class.

    The type of an argument without an annotation is that of its default.
    """
    inner = unwrap(function)
    try:
        hints = get_type_hints(inner.__init__ if inspect.isclass(inner) else inner)
    except Exception:  # an annotation may name a type that exists for a type checker only
        hints = {}
    return {
        name: hints.get(name, Any if p.default is None else type(p.default))
        for name, p in keyword_arguments(function).items()
    }


def unwrap(function: Callable) -> Callable:
    """Return the function of a `functools.partial` or of a callable object, which has the annotations."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if inspect.isroutine(function) or inspect.isclass(function) else type(function).__call__


def check_arguments(function: Callable, args: dict[str, Any], key: str) -> dict[str, Any]:
    """Check `args` against the schema of `function`, and return them with converted values.

    Raises:
        ConfigError: `function` does not take an argument, or a value has the wrong type; `key`.argument is named.
    """
    schema = argument_types(function)
    for name in args:
        if name not in schema:
            hint = trl_names.key_hint(f"{key}.{name}") or list_known(name, schema)
            if name in inspect.signature(function).parameters:
                hint += f"; a configuration can set {name} only if it stands after a * and has a default"
            raise ConfigError(f"unknown key {key}.{name}; {hint}")
    return {name: coerce(value, schema[name], f"{key}.{name}") for name, value in args.items()}


def list_known(name: str, names: Iterable[str]) -> str:
    """Return 'known: a, b (did you mean a?)' for an error message."""
    names = sorted(names)
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"known: {', '.join(names) or 'none'}" + (f" (did you mean {close[0]}?)" if close else "")


def coerce(value: Any, kind: Any, key: str) -> Any:
    """Check that `value` has the type `kind`, and return it.

    `kind` may be bool, int, float, str, None, Literal, a union, list[...], dict, dict[...] or Any. For a float, an
    integer and text such as 5e-5, which YAML 1.1 reads as text, are converted; NaN is refused. Nothing else is
    converted.

    Raises:
        ConfigError: the value has another type; the message names the key, the value and the type.
    """
    if kind in (Any, dict, list):
        _check_plain(value, key)
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
    elif origin is dict:
        if isinstance(value, dict):
            return {coerce(k, options[0], key): coerce(x, options[1], f"{key}.{k}") for k, x in value.items()}
    elif kind is float:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            with contextlib.suppress(ValueError, OverflowError):
                number = float(value)
                if not math.isnan(number):
                    return number
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif kind in (None, type(None)):
        if value is None:
            return None
    elif isinstance(value, origin or kind):
        return value
    hint = trl_names.value_hint(key, value) or f"it must be {describe(kind)}"
    if str in list_options(kind) and isinstance(value, (bool, int, float, datetime.date)):
        hint += ", so put quotes around it"
    text = str(value) if isinstance(value, datetime.date) else repr(value)
    raise ConfigError(f"{key} is {text}; {hint}")


def _check_plain(value: Any, key: str) -> None:
    """Refuse what YAML has and JSON has not, at any depth: dates, sets and bytes."""
    if isinstance(value, (dict, list)):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_plain(inner, f"{key}.{name}" if isinstance(value, dict) else f"{key}[{name}]")
    elif isinstance(value, (datetime.date, set, bytes)):
        if isinstance(value, datetime.date):
            raise ConfigError(f"{key} is {value}; it must be text, so put quotes around it")
        raise ConfigError(
            f"{key} is {value!r}, of the type {type(value).__name__}; it must be text, a number, true, false, null, a "
            f"list or a mapping"
        )


def check_integer(value: Any, name: str) -> int:
    """Return `value`, an integer of Python or NumPy that a program gave for the argument `name`.

    Raises:
        ConfigError: it is of another type, as booleans are.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ConfigError(f"{name} is {value!r}; it must be an integer")


def check_number(value: Any, name: str) -> float:
    """Return `value`, a number of Python or NumPy that a program gave for the argument `name`.

    Raises:
        ConfigError: it is of another type, as booleans are, or NaN.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)
    if not is_number:
        raise ConfigError(f"{name} is {value!r}; it must be a number")
    return float(value)


def check_path(value: Any, name: str) -> str:
    """Return the path `value` that a program gave as text or as a Path; `name` describes it in an error.

    Raises:
        ConfigError: it is neither, or empty.
    """
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise ConfigError(f"{name} is {value!r:.60}; it must be a path or a name, as text")
    return str(value)


def list_options(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def describe(kind: Any) -> str:
    """Return a type in words, as in 'one of a, b' or 'an integer or null'."""
    origin, options = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ("one of " if len(options) > 1 else "") + ", ".join(str(option) for option in options)
    if origin in (Union, types.UnionType):
        *others, last = [describe(option) for option in options]
        is_enumerated = any(get_origin(option) is Literal for option in options)  # which has commas of its own
        return f"{(' or ' if is_enumerated else ', ').join(others)} or {last}"
    if origin is list:
        plural = {int: "integers", float: "numbers"}.get(options[0])
        return f"a list of {plural or describe(options[0])}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", dict: "a mapping"}
    return "null" if kind in (None, type(None)) else names.get(origin or kind, getattr(kind, "__name__", str(kind)))
