"""Log-probs, entropies and divergences of tokens from hidden states, without ever holding a [B, C, V] tensor."""

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
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """log softmax(lm_head(hidden) / temperature)[token] and that distribution's entropy in nats, both [B, C] float32.

    Peak memory is a few [chunk_size, V] float32: with a gradient, backward computes each chunk again. The entropy
    carries a gradient only where asked to.
    """

    def chunk(h: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = lm_head(h).float() / temperature
        normaliser = logits.logsumexp(dim=-1)
        logprobs = logits.gather(-1, ids[:, None]).squeeze(-1) - normaliser
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropy = normaliser - (logits.softmax(dim=-1) * logits).sum(dim=-1)
        return logprobs, entropy

    return _in_chunks(chunk, chunk_size, token_ids.shape, hidden.flatten(0, 1), token_ids.flatten())


def token_divergence(
    hidden: Tensor,  # [..., H] of the policy, with gradient
    ref_hidden: Tensor,  # [..., H] of the reference
    lm_head: Callable[[Tensor], Tensor],  # [..., H] -> [..., V]
    function: Callable[[Tensor, Tensor], Tensor],  # log-probs [n, V] of the two -> [n]; see kl.py
    *,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> Tensor:
    """A divergence between the two distributions over the whole vocabulary at every place, [...] float32."""

    def chunk(h: Tensor, ref: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            ref_logprobs = (lm_head(ref).float() / temperature).log_softmax(dim=-1)
        return (function((lm_head(h).float() / temperature).log_softmax(dim=-1), ref_logprobs),)

    (values,) = _in_chunks(
        chunk, chunk_size, hidden.shape[:-1], hidden.flatten(0, -2), ref_hidden.detach().flatten(0, -2)
    )
    return values


def _in_chunks(function: Callable, size: int, shape: torch.Size, *inputs: Tensor) -> tuple[Tensor, ...]:
    """`function` on `size` rows at a time, its outputs joined and given `shape`; backward computes each chunk again."""
    chunks = []
    for parts in zip(*(x.split(size) for x in inputs), strict=True):
        if torch.is_grad_enabled():
            chunks.append(checkpoint(function, *parts, use_reentrant=False))
        else:
            chunks.append(function(*parts))
    return tuple(torch.cat(parts).view(shape) for parts in zip(*chunks, strict=True))
