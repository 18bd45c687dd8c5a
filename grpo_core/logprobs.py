"""Log-probs and entropies of given tokens from hidden states, without ever holding a [B, C, V] tensor."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_logprobs(
    hidden: Tensor,  # [B, C, H] hidden state that predicts each token: already shifted
    lm_head: Callable[[Tensor], Tensor],  # [..., H] -> [..., V]
    token_ids: Tensor,  # [B, C]
    *,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """log softmax(lm_head(hidden) / temperature)[token] and that distribution's entropy in nats, both [B, C] float32.

    Peak memory is a few [chunk_size, V] float32: with a gradient, backward computes each chunk again. The entropy
    carries no gradient.
    """
    flat_hidden, flat_ids = hidden.flatten(0, 1), token_ids.flatten()
    chunks = []
    for h, ids in zip(flat_hidden.split(chunk_size), flat_ids.split(chunk_size), strict=True):
        if torch.is_grad_enabled():
            chunks.append(checkpoint(_chunk, h, lm_head, ids, temperature, use_reentrant=False))
        else:
            chunks.append(_chunk(h, lm_head, ids, temperature))
    logprobs, entropy = (torch.cat(parts).view(token_ids.shape) for parts in zip(*chunks, strict=True))
    return logprobs, entropy


def _chunk(hidden: Tensor, lm_head: Callable, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = lm_head(hidden).float() / temperature
    normaliser = logits.logsumexp(dim=-1)
    logprobs = logits.gather(-1, token_ids[:, None]).squeeze(-1) - normaliser
    with torch.no_grad():
        entropy = normaliser - (logits.softmax(dim=-1) * logits).sum(dim=-1)
    return logprobs, entropy
