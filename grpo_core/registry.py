"""Registries: names for interchangeable pure functions.

The keyword-only arguments of a function are its configuration schema. Further facts about a function are attributes of
it, which a user's function may set too:

    breaks     {law: reason}, the laws that it breaks on purpose (objective/laws.py, objective/advantage_laws.py)
    others     documented in the module of the registry
"""

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_core import moved, trl_names
from grpo_core.schema import ConfigError, check_arguments, list_known


class Registry:
    """A registry of pure functions: it finds a function by its name or `file.py:function`, and binds its arguments."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.functions: dict[str, Callable] = {}

    def register(self, name: str, **facts: Any) -> Callable[[Callable], Callable]:
        """Return a decorator that registers a function as `name` and sets `facts` as its attributes."""

        def decorator(function: Callable) -> Callable:
            previous = self.functions.get(name)
            if previous is not None:  # a notebook may run the cell again, but two functions cannot have one name
                same = (previous.__module__, previous.__qualname__) == (function.__module__, function.__qualname__)
                assert same, f"{self.kind} {name!r} is registered twice"
            self.functions[name] = function
            for fact, value in facts.items():
                setattr(function, fact, value)
            return function

        return decorator

    def knows(self, name: str) -> bool:
        """Return True if the name is registered or names a function in a file, whether or not the file exists."""
        return ".py:" in name or name in self.functions

    def get(self, name: str) -> Callable:
        """Return the function registered as `name`, or load `path/to/file.py:function` from a user's file.

        Raises:
            ConfigError: there is no such name, file or function, or the file cannot be imported.
        """
        if ".py:" in name:
            return self._load(name)
        if name.endswith(".py"):
            raise ConfigError(f"{self.kind} {name!r} is a file; name a function in it: {name}:function")
        if name not in self.functions:
            hint = trl_names.value_hint(self.kind, name) or f"{list_known(name, self.functions)}, or file.py:function"
            raise ConfigError(f"unknown {self.kind} {name!r}; {hint}")
        return self.functions[name]

    def build(self, name: str, args: dict[str, Any] | None = None, key: str | None = None) -> Callable:
        """Return the function `name` with `args` bound to its keyword-only arguments.

        Raises:
            ConfigError: as `get`, or the function does not take an argument, or a value has the wrong type; the message
                names `key`.argument.
        """
        function = self.get(name)
        return functools.partial(function, **check_arguments(function, args or {}, key or f"{self.kind}.args"))

    def _load(self, name: str) -> Callable:
        """Import `path/to/file.py` and return its function."""
        path, _, attribute = name.rpartition(":")
        if not Path(path).is_file():
            raise ConfigError(f"{self.kind} {name!r}: there is no file {path}")
        spec = importlib.util.spec_from_file_location(f"grpo_core_user_{Path(path).stem}", path)
        assert spec is not None and spec.loader is not None  # because the path ends in .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look up their module there
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            old_import = moved.describe_old_import(error)
            reason = f"imports {old_import}" if old_import else f"cannot be loaded: {type(error).__name__}: {error}"
            raise ConfigError(f"{self.kind} {name!r}: {path} {reason}") from error
        if not callable(getattr(module, attribute, None)):
            raise ConfigError(f"{self.kind} {name!r}: {path} has no function {attribute}")
        return getattr(module, attribute)


def get_fact(function: Callable, name: str, default: Any = None) -> Any:
    """Return an attribute of `function`, or of the function whose arguments it binds (functools.partial)."""
    return getattr(getattr(function, "func", function), name, default)
