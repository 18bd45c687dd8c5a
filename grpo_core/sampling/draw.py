"""Draw one token from next-token logits: the most probable one, or by inverse CDF from one uniform number.

A token needs one number of noise, so the noise can come from a counter-based generator without a table over the
vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_core.batch import SamplingParams

CHUNK = 512  # tokens of the vocabulary whose probabilities are summed first: exact enough, and ten times fewer terms


def draw(logits: Tensor, temperature: float, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Draw one token per row of logits [B, V]. Return the tokens and their log-probs at `temperature`, both [B].

    With `uniform` [B] float64 in [0, 1), the token is the first whose cumulative probability exceeds `uniform`;
    with None it is the argmax.
    """
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    probabilities = logits.softmax(dim=-1)
    token = logits.argmax(dim=-1, keepdim=True) if uniform is None else _invert_cdf(probabilities, uniform[:, None])
    return token.squeeze(1), probabilities.gather(1, token).log().squeeze(1)


def _invert_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return the first token of each row [B, V] whose cumulative sum exceeds `uniform` [B, 1] of the total, [B, 1].

    A large vocabulary is searched in two steps: for the chunk, then for the token within the chunk.
    """
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
    tokens = chunk * CHUNK + torch.arange(CHUNK, device=probabilities.device)
    inside = probabilities.gather(1, tokens.clamp(max=width - 1)).masked_fill(tokens >= width, 0.0)
    return chunk * CHUNK + _search(inside.double(), rest)[0]


def _search(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first column with a weight whose cumulative sum exceeds `target` [B, 1], and the rest of the target.

    Without such a column it is the last one with a weight. The rest is `target` minus the sum of the columns before.
    """
    cumulative = weights.cumsum(dim=-1)
    last = (weights > 0).long() * torch.arange(weights.shape[1], device=weights.device)
    column = torch.searchsorted(cumulative, target, right=True).minimum(last.amax(dim=-1, keepdim=True))
    before = cumulative.gather(1, (column - 1).clamp(min=0)).masked_fill(column == 0, 0.0)
    return column, target - before


def restrict(logits: Tensor, settings: SamplingParams) -> Tensor:
    """Return logits [B, V] with -inf for the tokens that top_k, top_p or min_p exclude at the settings' temperature."""
    logits = logits.float()
    if settings.top_k is not None and settings.top_k < logits.shape[1]:
        least = logits.topk(settings.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if settings.min_p is not None:
        scaled = logits / settings.temperature
        improbable = scaled < scaled.amax(dim=-1, keepdim=True) + math.log(settings.min_p)
        logits = logits.masked_fill(improbable, -torch.inf)
    if settings.top_p is not None and settings.top_p < 1:
        ordered, order = (logits / settings.temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        beyond = ordered.double().cumsum(dim=-1) - ordered >= settings.top_p  # never true for the most probable token
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return logits
