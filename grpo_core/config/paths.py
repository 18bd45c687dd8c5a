"""The rule for paths: a file named in a configuration file is looked for beside that file, then in the shell's folder.

A path on the command line is relative to the shell's folder. `~` is the home folder in both. A path that is written to
(output_dir, sft.output) and the folder of `resume` are relative to the shell's folder wherever they are named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

READ = (  # beside the file, or in the shell's folder
    *(("model", "path"), ("data", "path"), ("data", "eval_path")),
    *(("teacher", "path"), ("teacher", "adapter"), ("lora", "path")),
)
WRITTEN = (("output_dir",), ("resume",), ("sft", "output"))  # in the shell's folder
CHECKPOINT = re.compile(r"step-\d+")  # name of a checkpoint's folder
FUNCTIONS = (  # file.py:function
    *(("loss", "name"), ("loss", "kl"), ("loss", "average"), ("loss", "rollout_correction", "name")),
    ("loss", "rejection", "name"),
    *(("advantage", "name"), ("truncation", "name"), ("evaluation", "reward")),
    *(("environment", "name"), ("tool_parser",)),
)


def resolve_paths(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the keys of a configuration file in `folder` with their paths as seen from the shell's folder."""
    for keys in READ:
        data = _change(data, keys, lambda text: resolve_path(text, folder))
    for keys in WRITTEN:
        data = _change(data, keys, os.path.expanduser)
    for keys in FUNCTIONS:
        data = _change(data, keys, lambda text: resolve_function(text, folder))
    rewards = data.get("rewards")
    if isinstance(rewards, (str, dict)):
        rewards = [rewards]
    if isinstance(rewards, list):
        data = {**data, "rewards": [_resolve_reward(reward, folder) for reward in rewards]}
    if isinstance(data.get("tools"), list):
        tools = [resolve_function(name, folder) if isinstance(name, str) else name for name in data["tools"]]
        data = {**data, "tools": tools}
    section = data.get("data")
    if isinstance(section, dict) and isinstance(section.get("sources"), list):
        data = {**data, "data": {**section, "sources": [_resolve_source(x, folder) for x in section["sources"]]}}
    evaluation = data.get("evaluation")
    if isinstance(evaluation, dict) and isinstance(evaluation.get("sets"), list):
        sets = [_resolve_set(part, folder) for part in evaluation["sets"]]
        data = {**data, "evaluation": {**evaluation, "sets": sets}}
    return data


def resolve_path(text: str, folder: Path) -> str:
    """Return a path, or the name of something that is no file, as seen from the shell's folder."""
    text = os.path.expanduser(text)
    if folder == Path() or not text or os.path.isabs(text) or not os.path.exists(folder / text):
        return text
    return str(folder / text)


def split_resume(resume: str) -> tuple[Path, Path | None] | None:
    """Return the run folder and the checkpoint that `resume` names, which is None for the folder of a run.

    Return None if it names neither. A link such as checkpoints/best stands for the checkpoint that it names.
    """
    path = Path(os.path.expanduser(resume))
    if os.path.isfile(path / "config.yaml"):
        return path, None
    if path.name in ("", ".."):
        path = Path(os.path.abspath(path))
    if os.path.islink(path):
        path = path.parent / os.readlink(path)
    folder = path.parent.parent
    is_checkpoint = CHECKPOINT.fullmatch(path.name) and os.path.isdir(path) and os.path.isfile(folder / "config.yaml")
    return (folder, path) if is_checkpoint else None


def resolve_function(name: str, folder: Path) -> str:
    """Return `file.py:function` with the file as seen from the shell's folder, and any other name as it is."""
    file, colon, function = name.rpartition(":")
    return f"{resolve_path(file, folder)}:{function}" if colon and file.endswith(".py") else name


def _resolve_reward(reward: Any, folder: Path) -> Any:
    if isinstance(reward, str):
        return resolve_function(reward, folder)
    return (
        _change(reward, ("name",), lambda name: resolve_function(name, folder)) if isinstance(reward, dict) else reward
    )


def _resolve_source(source: Any, folder: Path) -> Any:
    if isinstance(source, str):
        return resolve_path(source, folder)
    if not isinstance(source, dict):
        return source
    for key in ("path", "eval_path"):
        source = _change(source, (key,), lambda text: resolve_path(text, folder))
    source = _change(source, ("eval_reward",), lambda name: resolve_function(name, folder))
    rewards = source.get("rewards")
    if isinstance(rewards, (str, dict)):
        rewards = [rewards]
    return {**source, "rewards": [_resolve_reward(x, folder) for x in rewards]} if isinstance(rewards, list) else source


def _resolve_set(part: Any, folder: Path) -> Any:
    return _change(part, ("path",), lambda text: resolve_path(text, folder)) if isinstance(part, dict) else part


def _change(data: dict[str, Any], keys: tuple[str, ...], function: Callable[[str], str]) -> dict[str, Any]:
    """Return nested mappings with the text at `keys` replaced by `function` of it, if there is one."""
    key, *inner = keys
    value = data.get(key)
    if inner and isinstance(value, dict):
        return {**data, key: _change(value, tuple(inner), function)}
    return {**data, key: function(value)} if not inner and isinstance(value, str) else data
