"""One token from next-token logits: by inverse CDF from one uniform number, or the most probable.

A token's noise is one number, so it can come from a counter-based generator and needs no table over the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_core.batch import SamplingParams

CHUNK = 512  # tokens of the vocabulary that are summed together first: exact enough, and ten times fewer terms


@dataclass(frozen=True)
class Draws:
    """What a decoder returns: B rows, C the longest."""

    ids: Tensor  # [B, C] int64, padded on the right
    logprobs: Tensor  # [B, C] float32; 0 where padded
    lengths: Tensor  # [B] int64
    ended: Tensor  # [B] bool, by an end-of-sequence token, which is the last of the row


def draw(logits: Tensor, temperature: float, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token a row from logits [B, V] and its log-prob at `temperature`, both [B].

    With `uniform` [B] float64 in [0, 1) the first token whose cumulative probability exceeds it; without, the argmax.
    """
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    probabilities = logits.softmax(dim=-1)
    token = logits.argmax(dim=-1, keepdim=True) if uniform is None else _first_above(probabilities, uniform[:, None])
    return token.squeeze(1), probabilities.gather(1, token).log().squeeze(1)


def _first_above(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Where the cumulative sum of each row [B, V] exceeds `uniform` [B, 1] of its total, [B, 1]: first among chunks."""
    rows, width = probabilities.shape
    if width <= 4 * CHUNK:
        exact = probabilities.double()
        return _search(exact, uniform * exact.sum(dim=-1, keepdim=True))[0]
    whole = width // CHUNK * CHUNK
    parts = [probabilities[:, :whole].view(rows, whole // CHUNK, CHUNK).sum(dim=-1, dtype=torch.double)]
    if whole < width:
        parts.append(probabilities[:, whole:].sum(dim=-1, dtype=torch.double, keepdim=True))
    sums = torch.cat(parts, dim=1)
    chunk, rest = _search(sums, uniform * sums.sum(dim=-1, keepdim=True))
    places = chunk * CHUNK + torch.arange(CHUNK, device=probabilities.device)
    inside = probabilities.gather(1, places.clamp(max=width - 1)).masked_fill(places >= width, 0.0)
    return chunk * CHUNK + _search(inside.double(), rest)[0]


def _search(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first place with a weight whose cumulative sum exceeds `target` [B, 1] (else the last), and what is left."""
    cumulative = weights.cumsum(dim=-1)
    last = (weights > 0).long() * torch.arange(weights.shape[1], device=weights.device)
    found = torch.searchsorted(cumulative, target, right=True).minimum(last.amax(dim=-1, keepdim=True))
    before = cumulative.gather(1, (found - 1).clamp(min=0)).masked_fill(found == 0, 0.0)
    return found, target - before


def restrict(logits: Tensor, settings: SamplingParams) -> Tensor:
    """Logits [B, V] with -inf where the settings, read at their temperature, allow no token."""
    logits = logits.float()
    if settings.top_k is not None and settings.top_k < logits.shape[1]:
        least = logits.topk(settings.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if settings.min_p is not None:
        scaled = logits / settings.temperature
        far = scaled < scaled.amax(dim=-1, keepdim=True) + math.log(settings.min_p)
        logits = logits.masked_fill(far, -torch.inf)
    if settings.top_p is not None and settings.top_p < 1:
        ordered, order = (logits / settings.temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        beyond = ordered.double().cumsum(dim=-1) - ordered >= settings.top_p  # the first is never beyond
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return logits
