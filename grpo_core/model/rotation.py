"""Rotary position embeddings that depend on the length of the longest row of a forward: longrope and dynamic NTK.

Rows that share a forward must have the same rotation, or a row's log-probs would depend on its neighbours. So rows are
grouped by the rotation that their own length asks for, and a rotation keeps nothing of earlier forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grpo_core.counts import quantify
from grpo_core.schema import ConfigError


@dataclass(frozen=True)
class LengthRule:
    """The rotation of a row as a function of its length: one up to `limit` tokens; above it another, or one each."""

    limit: int
    each_length: bool  # above the limit every length has its own rotation

    def key(self, length: int) -> int:
        """Return a number that is equal for lengths with the same rotation; 0 up to the limit."""
        if length <= self.limit:
            return 0
        return length if self.each_length else 1


@dataclass(frozen=True)
class Rotations:
    """All length-dependent rotations of a model, of which each kind of layer may have its own."""

    rules: tuple[LengthRule, ...]

    def __bool__(self) -> bool:
        return bool(self.rules)

    def key(self, length: int) -> tuple[int, ...]:
        """Return a key that is equal for row lengths with the same rotations."""
        return tuple(rule.key(length) for rule in self.rules)

    def check_lengths(self, lengths: Sequence[int], max_new_tokens: int) -> None:
        """Check that the rotation of no prompt's completion changes while the completion is drawn.

        The tokens before the change were drawn with another rotation than the trainer computes for the whole row.

        Raises:
            ConfigError: names the prompt's length and the length at which the rotation changes.
        """
        for length in sorted(set(lengths)) if self else ():
            longest = length + max_new_tokens - 1  # the last token is not an input
            if self.key(length) != self.key(longest):
                limit = min(rule.limit for rule in self.rules if rule.key(length) != rule.key(longest))
                raise ConfigError(
                    f"sampling.max_new_tokens is {max_new_tokens}, and a prompt has {quantify(length, 'token')}, but "
                    f"the model's rotary embedding changes above {quantify(limit, 'token')}, so the log-probs of a "
                    f"completion that grows past them would change with its length; prompt and completion must "
                    f"have at most {quantify(limit + 1, 'token')} together"
                )


def find_rotations(config: Any) -> Rotations:
    """Return the length-dependent rotations that a model's configuration names."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    rules = (_find_rule(text, each) for each in (nested or [parameters]))
    return Rotations(tuple(dict.fromkeys(rule for rule in rules if rule is not None)))


def _find_rule(config: Any, parameters: dict[str, Any]) -> LengthRule | None:
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    positions = getattr(config, "max_position_embeddings", None)
    original = parameters.get("original_max_position_embeddings")
    original = original or getattr(config, "original_max_position_embeddings", None) or positions
    if kind in ("longrope", "su"):
        return LengthRule(int(original), each_length=False)
    return LengthRule(int(positions), each_length=True) if "dynamic" in kind else None


def forget_lengths(model: nn.Module) -> None:
    """Let every rotation of `model` that grows with the length start each forward as it was loaded."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        names = kinds.values() if isinstance(kinds, dict) else [kinds]
        if (
            any("dynamic" in str(name) for name in names)
            and _restore_rotation not in module._forward_pre_hooks.values()
        ):
            module.register_forward_pre_hook(_restore_rotation)


@torch.no_grad()
def _restore_rotation(module: Any, inputs: Any) -> None:
    kinds = module.rope_type
    for prefix in [f"{name}_" for name in kinds] if isinstance(kinds, dict) else [""]:
        original: Tensor | None = getattr(module, f"{prefix}original_inv_freq", None)
        present: Tensor | None = getattr(module, f"{prefix}inv_freq", None)
        if original is not None and present is not None:
            setattr(module, f"{prefix}inv_freq", original.to(present.device).clone())
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def split_by_rotation(
    rows: Sequence[int], lengths: Sequence[int] | np.ndarray, key: Callable[[int], tuple[int, ...]]
) -> Iterator[list[int]]:
    """Yield the rows of each rotation, in their order; `lengths` are those of all rows."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        groups.setdefault(key(int(lengths[row])), []).append(row)
    yield from groups.values()
