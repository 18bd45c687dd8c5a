"""Check the diagnostics that a loss returns: their names become names of metrics, and their tensors are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

METRICS = frozenset(  # what the loop itself writes to metrics.jsonl; ratio and clip_frac come from losses only
    (
        *("step", "epoch", "reward", "reward_std", "reward_square", "tied_groups", "no_reward", "advantage_abs"),
        *("length", "length_max", "truncated", "tokens", "tokens_sampled", "resampled_groups", "resampling_attempts"),
        *("loss", "entropy", "kl", "kl_exact", "kl_coef", "entropy_coef", "logprob_gap", "logprob_gap_max"),
        *("rollout_weight", "rollout_weight_ess", "rollout_weight_square", "rollout_kl", "rollout_chi2"),
        *("off_policy_kept", "rejected", "selected", "positive_nll"),
        *("routing_mismatch", "router_aux_loss", "echo"),
        *("turns", "given_tokens", "tool_calls", "tool_errors"),
        *("cut_answers", "answers_without_room", "environment_failures"),
        *("grad_norm", "learning_rate", "adapter_norm", "skipped", "micro_batches", "memory_retries"),
        *("teacher_kl", "teacher_kl_exact", "teacher_weights_gb", "resting_prompts"),
        *("tokens_updated", "seconds", "tokens_per_second", "update_mfu", "peak_memory_gb", "reserved_memory_gb"),
    )
)
PREFIXES = ("rewards/", "failed/", "seconds/", "first_draw/", "memory_gb/", "eval/", "evaluation/", "source/")


def describe_wrong_diagnostics(diagnostics: Any, shape: Sequence[int]) -> str | None:
    """Return why the diagnostics of a loss on B completions of C tokens cannot be logged, as a verb phrase, or None.

    `shape` is (B, C).
    """
    if not isinstance(diagnostics, dict):
        return f"returned diagnostics of type {type(diagnostics).__name__}; they must be a dict of name: tensor"
    for name, values in diagnostics.items():
        if problem := _describe_wrong_name(name) or _describe_wrong_values(values, shape):
            return f"returned the diagnostic {name!r}{problem}"
    return None


def find_not_finite(diagnostics: dict[str, Tensor], mask: Tensor) -> str | None:
    """Return the first diagnostic that is NaN or infinite where `mask` is true, as a verb phrase, or None."""
    for name, values in diagnostics.items():
        if not values[mask].isfinite().all():
            return f"returned the diagnostic {name!r} with a value that is not finite at a token of a completion"
    return None


def _describe_wrong_name(name: Any) -> str | None:
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        return "; its name must be a text with at least one letter and no control characters"
    if name in METRICS or name.startswith(PREFIXES):
        return ", but the loop has a metric of that name; choose another name"
    return None


def _describe_wrong_values(values: Any, shape: Sequence[int]) -> str | None:
    if not isinstance(values, Tensor):
        return f" of type {type(values).__name__}; it must be a tensor [B, C]"
    if values.shape != tuple(shape):
        return f" with the shape {list(values.shape)}; it must be [B, C] = {list(shape)}"
    if values.requires_grad:
        return " with a gradient; it must be detached, such as ratio.detach()"
    if values.dtype.is_complex or values.layout is not torch.strided:
        return f" of {values.dtype} ({values.layout}); it must be a dense tensor of real numbers"
    return None
