"""Log-probs, entropies and divergences of tokens from hidden states, without ever holding a [B, C, V] tensor."""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MEMORY = 160e6  # bytes of logits, and of what is made of them, that are held at once

Statistics = Callable[[Tensor, Tensor, float, bool], tuple[Tensor, Tensor, Tensor | None]]


def softmax_statistics(
    logits: Tensor,  # [n, V]; may be overwritten
    token_ids: Tensor,  # [n]
    temperature: float,
    slope: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of softmax(logits / temperature): the tokens' log-probs and the entropy, [n] float32; d log-prob / d logits.

    The last, (one-hot - softmax) / temperature, is [n, V] in the logits' dtype, or None if not asked for. A replacement
    on a GPU: logprob_kernels.py.
    """
    x = logits.float()
    if temperature != 1.0:
        x = x.div_(temperature)
    normaliser = x.logsumexp(dim=-1)
    x = x.sub_(normaliser[:, None])
    logprobs = x.gather(1, token_ids[:, None]).squeeze(1)
    p = x.exp()
    entropy = -torch.linalg.vecdot(p, x)
    if not slope:
        return logprobs, entropy, None
    p = p.neg_().scatter_add_(1, token_ids[:, None], torch.ones_like(p[:, :1]))
    return logprobs, entropy, p.div_(temperature).to(logits.dtype)


def token_logprobs(
    hidden: Tensor,  # [..., H] hidden state that predicts each token: already shifted
    lm_head: Callable[[Tensor], Tensor],  # [..., H] -> [..., V]
    token_ids: Tensor,  # [...]
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,  # tokens whose logits are held at once; None: as many as MEMORY allows
    entropy_gradient: bool = False,
    statistics: Statistics = softmax_statistics,
) -> tuple[Tensor, Tensor]:
    """log softmax(lm_head(hidden) / temperature)[token] and that distribution's entropy in nats, both [...] float32.

    Where lm_head is a frozen nn.Linear, the slope d log-prob / d hidden, a vector of every token, is computed beside
    the log-prob, so backward has neither logits to keep nor to compute again. Otherwise, and for an entropy that is to
    carry a gradient, backward computes each chunk again.
    """
    flat, ids = hidden.flatten(0, -2), token_ids.flatten()
    if is_frozen_linear(lm_head) and not entropy_gradient:
        size = chunk_size or rows_within(MEMORY, lm_head.out_features, getattr(statistics, "bytes_per_logit", 12))
        logprobs, entropy = _FrozenHead.apply(flat, lm_head.weight, ids, temperature, size, statistics)
        return logprobs.view(token_ids.shape), entropy.view(token_ids.shape)

    def chunk(h: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = lm_head(h).float() / temperature
        normaliser = logits.logsumexp(dim=-1)
        logprobs = logits.gather(-1, ids[:, None]).squeeze(-1) - normaliser
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropy = normaliser - (logits.softmax(dim=-1) * logits).sum(dim=-1)
        return logprobs, entropy

    logprobs, entropy = _in_chunks(chunk, chunk_size or _generic_size(lm_head, flat), token_ids.shape, flat, ids)
    return logprobs, entropy


def token_divergence(
    hidden: Tensor,  # [..., H] of the policy, with gradient
    ref_hidden: Tensor,  # [..., H] of the reference
    lm_head: Callable[[Tensor], Tensor],  # [..., H] -> [..., V]
    function: Callable[[Tensor, Tensor], Tensor],  # log-probs [n, V] of the two -> [n]; see kl.py
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    ref_lm_head: Callable[[Tensor], Tensor] | None = None,  # the reference's, where it is another
) -> Tensor:
    """A divergence between the two distributions over the whole vocabulary at every place, [...] float32."""

    def chunk(h: Tensor, ref: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            ref_logprobs = ((ref_lm_head or lm_head)(ref).float() / temperature).log_softmax(dim=-1)
        return (function((lm_head(h).float() / temperature).log_softmax(dim=-1), ref_logprobs),)

    flat, ref = hidden.flatten(0, -2), ref_hidden.detach().flatten(0, -2)
    (values,) = _in_chunks(chunk, chunk_size or _generic_size(lm_head, flat), hidden.shape[:-1], flat, ref)
    return values


def is_frozen_linear(lm_head: object) -> TypeGuard[nn.Linear]:
    """Whether the head is a plain matrix that is not trained."""
    return type(lm_head) is nn.Linear and lm_head.bias is None and not lm_head.weight.requires_grad


def rows_within(memory: float, vocabulary: int, bytes_per_logit: int) -> int:
    """Tokens whose logits fit into `memory` bytes, at least one."""
    return max(1, int(memory / (vocabulary * bytes_per_logit)))


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        temperature: float,
        size: int,
        statistics: Statistics,
    ) -> tuple[Tensor, Tensor]:
        wanted = context.needs_input_grad[0]
        slopes = torch.empty_like(hidden) if wanted else None
        logprobs, entropy = [hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2)]
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logprobs[part], entropy[part], slope = statistics(
                F.linear(hidden[part], weight), ids[part], temperature, wanted
            )
            if slopes is not None and slope is not None:
                torch.mm(slope, weight, out=slopes[part])
        context.save_for_backward(slopes)
        context.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(context: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (slopes,) = context.saved_tensors
        return (slopes * grad[:, None]).to(slopes.dtype), None, None, None, None, None


def _generic_size(lm_head: Callable[[Tensor], Tensor], hidden: Tensor) -> int:
    with torch.no_grad():
        vocabulary = lm_head(hidden[:1]).shape[-1] if len(hidden) else 1
    return rows_within(MEMORY, vocabulary, 24)


def _in_chunks(function: Callable, size: int, shape: torch.Size, *inputs: Tensor) -> tuple[Tensor, ...]:
    """`function` on `size` rows at a time, its outputs joined and given `shape`; backward computes each chunk again."""
    chunks = []
    for parts in zip(*(x.split(size) for x in inputs), strict=True):
        if torch.is_grad_enabled():
            chunks.append(checkpoint(function, *parts, use_reentrant=False))
        else:
            chunks.append(function(*parts))
    return tuple(torch.cat(parts).view(shape) for parts in zip(*chunks, strict=True))
