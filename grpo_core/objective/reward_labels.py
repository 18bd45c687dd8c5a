"""The names of rewards in metrics, completions and `other_rewards`.

A reward in a file is called by the name of the file and the function, whatever folder the configuration or the command
names, so that a run has the same names wherever it is started and evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def label_rewards(names: Iterable[str]) -> dict[str, str]:
    """Return the name in metrics of every reward, by its name in a configuration.

    >>> label_rewards(["correct_answer", "/home/me/my_rewards.py:short", "x/a/mine.py:f", "x/b/mine.py:f"]).values()
    dict_values(['correct_answer', 'my_rewards.py:short', 'a/mine.py:f', 'b/mine.py:f'])

    A file loses its folders, but for as many as tell it from the files of the others.
    """
    names = [*dict.fromkeys(names)]
    labels = {}
    for name in names:
        depth, others = 1, [other for other in names if other != name]
        while _cut(name, depth) != name and any(_cut(other, depth) == _cut(name, depth) for other in others):
            depth += 1
        labels[name] = _cut(name, depth)
    return labels


def find_label(name: str, labels: Iterable[str]) -> str | None:
    """Return the one of `labels` that is `name`, or that names the same file with more or fewer folders; else None."""
    labels = [*labels]
    if name in labels:
        return name
    parts = _split(name)
    if not parts:
        return None
    similar = [label for label in labels if (own := _split(label)) and _have_one_end(own, parts)]
    return similar[0] if len(similar) == 1 else None


class OtherRewards(dict[str, Any]):
    """The values of the other rewards by label; a reward in a file is also found by a name with other folders."""

    def __missing__(self, name: str) -> Any:
        label = find_label(name, self) if isinstance(name, str) else None
        if label is None:
            raise KeyError(name)
        return self[label]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and find_label(name, self) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """Return the values of a reward, or `default` if there is none of the name."""
        try:
            return self[name]
        except KeyError:
            return default


def _cut(name: str, depth: int) -> str:
    """Return the name of a reward with the last `depth` parts of its file's path."""
    parts = _split(name)
    return f"{'/'.join(parts[:-1][-depth:])}:{parts[-1]}" if 0 < depth < len(parts) - 1 else name


def _split(name: str) -> list[str]:
    """Return the parts of the file's path and the function; [] for a reward in no file."""
    file, _, function = name.rpartition(":")
    return [*Path(file).parts, function] if file.endswith(".py") else []


def _have_one_end(left: list[str], right: list[str]) -> bool:
    length = min(len(left), len(right))
    return left[-length:] == right[-length:]
