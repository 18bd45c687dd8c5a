"""Names for interchangeable pure functions. A function's keyword-only arguments are its configuration schema.

What else is to be known of a function stands on it as attributes, which a user's function may set too:

    breaks     {law: reason}, the laws of laws.py that it breaks knowingly
    others     what its registry's module documents
"""

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_core import trl_names
from grpo_core.schema import ConfigError, check_arguments, list_known

USER_MODULE = "grpo_core_user_"  # begins the name of a module that was loaded from a user's own file


class Registry:
    """Maps a name in the YAML, or `file.py:function`, to a pure function, and binds its keyword-only arguments."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.functions: dict[str, Callable] = {}

    def register(self, name: str, **facts: Any) -> Callable[[Callable], Callable]:
        """Decorator: make a function known as `name`, with `facts` as its attributes."""

        def decorator(function: Callable) -> Callable:
            before = self.functions.get(name)  # a notebook's cell may be run again
            again = before is None or (before.__module__, before.__qualname__) == (
                function.__module__,
                function.__qualname__,
            )
            assert again, f"{self.kind} {name!r} is registered twice"
            self.functions[name] = function
            for fact, value in facts.items():
                setattr(function, fact, value)
            return function

        return decorator

    def knows(self, name: str) -> bool:
        """Whether `get` would look for a function: the name is registered, or one of a file."""
        return ".py:" in name or name in self.functions

    def get(self, name: str) -> Callable:
        """The function called `name`; `path/to/file.py:function` loads it from a user's own file.

        Raises:
            ConfigError: no such name, file or function; the message lists what is known.
        """
        if ".py:" in name:
            return self._load(name)
        if name.endswith(".py"):
            raise ConfigError(f"{self.kind} {name!r} is a file; name a function in it: {name}:function")
        if name not in self.functions:
            why = trl_names.value_hint(self.kind, name) or f"{list_known(name, self.functions)}, or file.py:function"
            raise ConfigError(f"unknown {self.kind} {name!r}; {why}")
        return self.functions[name]

    def build(self, name: str, args: dict[str, Any] | None = None, key: str | None = None) -> Callable:
        """Return `name` with `args` bound to its keyword-only arguments.

        Raises:
            ConfigError: as `get`; or an argument it does not take, or of the wrong type, named as `key`.argument.
        """
        function = self.get(name)
        return functools.partial(function, **check_arguments(function, args or {}, key or f"{self.kind}.args"))

    def _load(self, name: str) -> Callable:
        path, _, attribute = name.rpartition(":")
        if not Path(path).is_file():
            raise ConfigError(f"{self.kind} {name!r}: there is no file {path}")
        spec = importlib.util.spec_from_file_location(f"{USER_MODULE}{Path(path).stem}", path)
        assert spec is not None and spec.loader is not None  # of a file that ends in .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ConfigError(
                f"{self.kind} {name!r}: {path} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
        if not callable(getattr(module, attribute, None)):
            raise ConfigError(f"{self.kind} {name!r}: {path} has no function {attribute}")
        return getattr(module, attribute)


def fact(function: Callable, name: str, default: Any = None) -> Any:
    """An attribute of `function`, or of the function that it binds arguments to."""
    return getattr(getattr(function, "func", function), name, default)
