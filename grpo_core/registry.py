"""Registries: names for interchangeable pure functions.

The keyword-only arguments of a function are its configuration schema. Further facts about a function are attributes of
it, which a user's function may set too:

    needs            (module, extra): the function needs a package that only the extra of pyproject.toml installs
    breaks           {law: reason}, the laws that it breaks on purpose (objective/laws.py, objective/advantage_laws.py)
    argument_limits  {argument: function}, which returns what a value must be, or None if it is that
    others           documented in the module of the registry
"""

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from grpo_core import moved, trl_names
from grpo_core.schema import ConfigError, check_arguments, list_known, read_message, unwrap

_folders: list[str] = []  # of users' files that were loaded
_observers: list[Callable[[str], object]] = []  # called with the path of a user's file before it is imported


def _place(function: Callable) -> tuple[str, str]:
    """Return where a function is defined; of an object that is called like a function, where its class is."""
    inner = unwrap(function)
    return tuple(getattr(inner, name, None) or getattr(type(inner), name) for name in ("__module__", "__qualname__"))


class Registry:
    """A registry of pure functions: it finds a function by its name or `file.py:function`, and binds its arguments."""

    def __init__(
        self,
        kind: str,
        *,
        allows_async: bool = False,
        allows_classes: bool = False,
        modules: Mapping[str, str] | None = None,
    ) -> None:
        """Create an empty registry.

        `modules` names, for functions of higher layers, the module that registers them; it is imported when needed.
        """
        self.kind, self.modules = kind, dict(modules or {})
        self.allows_async, self.allows_classes = allows_async, allows_classes
        self._functions: dict[str, Callable] = {}

    @property
    def functions(self) -> dict[str, Callable]:
        """Return all registered functions by name, those of `modules` included."""
        for module in self.modules.values():
            importlib.import_module(module)
        return self._functions

    def register(self, name: str, **facts: Any) -> Callable[[Callable], Callable]:
        """Return a decorator that registers a function as `name` and sets `facts` as its attributes.

        Raises:
            ConfigError: `name` is no text, as where the decorator stands without a name, or names a file or a function
                in a file; what is registered cannot be called; or another function has this name.
        """
        if not isinstance(name, str) or not name or ":" in name or name.endswith(".py"):
            raise ConfigError(
                f"the {self.kind} is registered with a name, as by @register('mine'), which is text without a colon, "
                f"and not {name!r:.60}"
            )

        def decorator(function: Callable) -> Callable:
            if not callable(function):
                raise ConfigError(f"the {self.kind} {name!r} is {function!r:.60}; it must be a function")
            previous, place = self._functions.get(name), _place(function)
            # a notebook may run the cell again, but two functions cannot have one name
            is_taken = self.modules.get(name, place[0]) != place[0]
            if is_taken or (previous is not None and _place(previous) != place):
                raise ConfigError(f"the {self.kind} {name!r} is registered twice; choose another name")
            self._functions[name] = function
            for fact, value in facts.items():
                setattr(function, fact, value)
            return function

        return decorator

    def knows(self, name: str) -> bool:
        """Return True if the name is registered or names a function in a file, whether or not the file exists."""
        return ".py:" in name or name in self._functions or name in self.modules

    def get(self, name: str) -> Callable:
        """Return the function registered as `name`, or load `path/to/file.py:function` from a user's file.

        Raises:
            ConfigError: there is no such name, file or function, or the file cannot be imported, or a package that
                the function needs is not installed.
        """
        if not isinstance(name, str):
            raise ConfigError(f"the name of a {self.kind} is {name!r:.60}; it must be text")
        if ".py:" in name:
            return self._check(name, self._load(name))
        if name.endswith(".py"):
            noun = "class" if self.allows_classes else "function"
            raise ConfigError(f"{self.kind} {name!r} is a file; name a {noun} in it: {name}:{noun}")
        if name in self.modules:
            importlib.import_module(self.modules[name])
        if name not in self._functions:
            hint = trl_names.value_hint(self.kind, name) or f"{list_known(name, self.functions)}, or file.py:function"
            raise ConfigError(f"unknown {self.kind} {name!r}; {hint}")
        module, extra = get_fact(self._functions[name], "needs", (None, None))
        if module and importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"{self.kind} {name!r} needs {module}, which is not installed: pip install -e '.[{extra}]'"
            )
        return self._check(name, self._functions[name])

    def _check(self, name: str, function: Callable) -> Callable:
        """Return `function`, which may be a function, a partial or a callable object.

        Raises:
            ConfigError: it is a class, an async generator, async where that is not allowed, or has no signature.
        """
        inner = unwrap(function)
        if inspect.isclass(inner) and not self.allows_classes:
            raise ConfigError(f"{self.kind} {name!r} is a class; name a function, or an object of the class")
        if inspect.isasyncgenfunction(inner) or (inspect.iscoroutinefunction(inner) and not self.allows_async):
            kind = "generator" if inspect.isasyncgenfunction(inner) else "function"
            raise ConfigError(f"{self.kind} {name!r} is an async {kind}, which is not supported")
        try:
            inspect.signature(function)
        except (ValueError, TypeError):
            raise ConfigError(
                f"{self.kind} {name!r} has no signature that can be read; wrap it in a function defined with def"
            ) from None
        return function

    def build(self, name: str, args: dict[str, Any] | None = None, key: str | None = None) -> Callable:
        """Return the function `name` with `args` bound to its keyword-only arguments.

        Raises:
            ConfigError: as `get`, or the function does not take an argument, or a value has the wrong type or is none
                that the fact `argument_limits` of the function allows; the message names `key`.argument.
        """
        function, key = self.get(name), key or f"{self.kind}.args"
        args = check_arguments(function, args or {}, key)
        for argument in get_fact(function, "required", ()):
            if not args.get(argument):
                raise ConfigError(f"{key}.{argument} is not set, and the {self.kind} {name} needs it")
        for argument, check in (get_fact(function, "argument_limits") or {}).items():
            if argument in args and (must_be := check(args[argument])):
                raise ConfigError(f"{key}.{argument} is {args[argument]!r}; {must_be}")
        return functools.partial(function, **args)

    def _load(self, name: str) -> Callable:
        """Import `path/to/file.py` and return its function."""
        path, _, attribute = os.path.expanduser(name).rpartition(":")
        if not os.path.isfile(path):
            raise ConfigError(f"{self.kind} {name!r}: there is no file {path}")
        spec = importlib.util.spec_from_file_location(f"grpo_core_user_{Path(path).stem}", path)
        assert spec is not None and spec.loader is not None  # because the path ends in .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look up their module there
        try:
            for observe in _observers:
                observe(path)
            with exits_as_errors(), _importing_neighbours(Path(path).resolve().parent):
                spec.loader.exec_module(module)
        except ProcessExit as error:
            raise ConfigError(f"{self.kind} {name!r}: {path} {error} while it was imported") from None
        except Exception as error:
            old_import = moved.describe_old_import(error)
            reason = (
                f"imports {old_import}"
                if old_import
                else f"cannot be loaded: {type(error).__name__}: {read_message(error)}"
            )
            raise ConfigError(f"{self.kind} {name!r}: {path} {reason}") from error
        if not callable(getattr(module, attribute, None)):
            noun = "class" if self.allows_classes else "function"
            raise ConfigError(f"{self.kind} {name!r}: {path} has no {noun} {attribute}")
        return getattr(module, attribute)


def observe_imports(observer: Callable[[str], object]) -> None:
    """Call `observer` with the path of every user's file before it is imported, from now on."""
    _observers.append(observer)


class ProcessExit(Exception):
    """A user's code asked for the end of this process. The message is a verb phrase that says by what call."""


@contextlib.contextmanager
def exits_as_errors() -> Iterator[None]:
    """Inside, raise ProcessExit where the user's code would end this process by sys.exit or os._exit.

    This does not affect processes that the code forks, other threads and this package.
    """
    exit_process, pid, thread = os._exit, os.getpid(), threading.get_ident()

    def raise_instead(status: int) -> None:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        is_ours = caller.partition(".")[0] == __package__
        if is_ours or os.getpid() != pid or threading.get_ident() != thread:
            exit_process(status)
        raise ProcessExit(f"called os._exit({status})")

    os._exit = raise_instead  # type: ignore[assignment]
    try:
        yield
    except SystemExit as error:
        raise ProcessExit(f"called sys.exit({'' if error.code is None else repr(error.code)})") from None
    finally:
        os._exit = exit_process


@contextlib.contextmanager
def _importing_neighbours(folder: Path) -> Iterator[None]:
    """Inside, a user's file can import the files beside it, as a script can; a later import finds them last.

    A module of the same name from another user's folder is forgotten first, so that each file gets its own neighbours.
    A neighbour that has the name of an installed module is forgotten afterwards, so that others get the installed one.
    """
    own, others = str(folder), {place for place in _folders if place != str(folder)}
    for name, module in [*sys.modules.items()] if others else []:
        if _folder_of(module) in others and _find_spec(name.partition(".")[0], [own]):
            del sys.modules[name]
    before, path = set(sys.modules), [place for place in sys.path if place not in _folders]
    sys.path.insert(0, own)
    try:
        yield
    finally:
        sys.path.remove(own)
        if own not in _folders:
            _folders.append(own)
            sys.path.append(own)
        for name in set(sys.modules) - before:
            if _folder_of(sys.modules[name]) == own and _find_spec(name.partition(".")[0], path):
                del sys.modules[name]


def _folder_of(module: Any) -> str | None:
    """Return the folder in which the file of a module is, or that holds its top-level package."""
    file = getattr(module, "__file__", None)
    name = getattr(module, "__name__", "") or ""
    if not isinstance(file, str) or name.startswith("grpo_core_user_"):
        return None
    folder, depth = os.path.dirname(file), name.count(".") + os.path.basename(file).startswith("__init__.")
    for _ in range(depth):
        folder = os.path.dirname(folder)
    return _real_path(folder)


@functools.cache
def _real_path(folder: str) -> str:
    return os.path.realpath(folder)


def _find_spec(name: str, path: list[str]) -> Any:
    """Return the specification of a top-level module that is found in `path`, or None."""
    return importlib.machinery.PathFinder.find_spec(name, path)


def get_fact(function: Callable, name: str, default: Any = None) -> Any:
    """Return an attribute of `function`, or of the function whose arguments it binds (functools.partial)."""
    while isinstance(function, functools.partial) and not hasattr(function, name):
        function = function.func
    return getattr(function, name, default)
