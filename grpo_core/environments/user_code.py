"""A digest of the code and settings that answer the turns of a run; answers recorded under another one are not read."""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_core.config.sections import RunConfig


def digest_environment(config: RunConfig) -> str:
    """Return a digest of what the answers to a turn depend on: the environment or the tools, and their settings.

    It covers the content of users' files and of the files beside them that they import, and no folder's name.
    """
    settings = config.environment
    names = [name for name in (settings.name, *config.tools, config.tool_parser) if name is not None]
    parts: list[Any] = [settings.args, settings.timeout]
    for name in names:
        path, _, attribute = os.path.expanduser(name).rpartition(":")
        file = Path(path)
        parts.append([file.name, attribute, _digest_files(file) if file.suffix == ".py" else {}])
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _digest_files(file: Path) -> dict[str, str]:
    """Return the digests of a file and of the files in its folder that it imports, directly or not, by their place."""
    folder, digests, waiting = file.parent, dict[str, str](), [file]
    while waiting:
        path = waiting.pop()
        place = path.relative_to(folder).as_posix()
        if place in digests:
            continue
        try:
            content = path.read_bytes()
        except OSError:
            digests[place] = ""
            continue
        digests[place] = hashlib.sha256(content).hexdigest()
        waiting += _list_imports(content, path, folder)
    return digests


def _list_imports(content: bytes, path: Path, folder: Path) -> Iterator[Path]:
    """Yield the files in `folder` that Python code in the file `path` imports."""
    try:
        nodes = list(ast.walk(ast.parse(content)))
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            modules = [(folder, alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1] if 0 < node.level <= len(path.parents) else folder
            parts = node.module.split(".") if node.module else []
            modules = [(base, [*parts, alias.name]) for alias in node.names]  # a name may be a module of a package
        else:
            continue
        for base, parts in modules:
            for end in range(1, len(parts) + 1):
                place = base.joinpath(*parts[:end])
                yield from filter(Path.is_file, (place.with_suffix(".py"), place / "__init__.py"))
