"""Log-probs and other statistics of tokens from hidden states, without a tensor of logits [B, C, V].

The statistics are the entropy, the sum of the squared probabilities, and divergences from another model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grpo_core.model.trial import is_same

MAX_LOGIT_BYTES = 160e6  # logits, and tensors computed from them, that exist at once

# (logits, token_ids, temperature, with_gradient) -> (logprobs, entropy, sum_p_squared, gradient) of softmax_statistics
Statistics = Callable[[Tensor, Tensor, float, bool], tuple[Tensor, Tensor, Tensor, Tensor | None]]


def softmax_statistics(
    logits: Tensor,  # [n, V]; may be overwritten
    token_ids: Tensor,  # [n]
    temperature: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the tokens' log-probs, entropy and sum of p**2 under p = softmax(logits / temperature), and a gradient.

    The first three are [n] float32, the entropy in nats. The gradient d log-prob / d logits is
    (one-hot - softmax) / temperature, [n, V] in the logits' dtype, or None without `with_gradient`.
    kernels.py has the same function for a GPU.
    """
    x = logits.float()
    if temperature != 1.0:
        x = x.div_(temperature)
    normaliser = x.logsumexp(dim=-1)
    x = x.sub_(normaliser[:, None])
    logprobs = x.gather(1, token_ids[:, None]).squeeze(1)
    p = x.exp()
    entropy, sum_p_squared = -torch.linalg.vecdot(p, x), torch.linalg.vecdot(p, p)
    if not with_gradient:
        return logprobs, entropy, sum_p_squared, None
    p = p.neg_().scatter_add_(1, token_ids[:, None], torch.ones_like(p[:, :1]))
    return logprobs, entropy, sum_p_squared, p.div_(temperature).to(logits.dtype)


@cache
def find_statistics(device: torch.device, dtype: torch.dtype, vocabulary: int) -> Statistics:
    """Return the fastest function for the statistics of such logits: on a GPU the kernel, if it computes the same."""
    if device.type != "cuda":
        return softmax_statistics
    from grpo_core.model.kernels import softmax_statistics as kernel  # needs triton

    return kernel if computes_the_same(kernel, device, dtype, vocabulary) else softmax_statistics


def computes_the_same(statistics: Statistics, device: torch.device, dtype: torch.dtype, vocabulary: int) -> bool:
    """Return whether `statistics` equals `softmax_statistics` on made-up logits; False if it fails.

    The logits come from a generator of their own, so that the random generators stay as they are.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    logits = 3 * torch.randn(3, vocabulary, generator=generator, device="cpu")
    logits = logits.to(device, dtype)
    ids = torch.tensor([0, vocabulary // 2, vocabulary - 1], device=device)
    try:
        for temperature, with_gradient in ((1.0, False), (0.7, True)):
            expected = softmax_statistics(logits.clone(), ids, temperature, with_gradient)
            values = statistics(logits.clone(), ids, temperature, with_gradient)
            for value, right in zip(values, expected, strict=True):
                if right is not None and (value is None or not is_same(value, right)):
                    return False
    except Exception:  # a kernel that does not compile on this GPU
        return False
    return True


def token_logprobs(
    hidden: Tensor,  # [..., H] hidden state that predicts each token: already shifted
    lm_head: Callable[[Tensor], Tensor],  # [..., H] -> [..., V]
    token_ids: Tensor,  # [...]
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,  # tokens whose logits exist at once; None: as many as MAX_LOGIT_BYTES allows
    entropy_gradient: bool = False,
    statistics: Statistics = softmax_statistics,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p[token], the entropy in nats, and the sum of p**2, p = softmax(lm_head(hidden) / temperature).

    Each is [...] float32; the last has no gradient.

    If `lm_head` is a frozen nn.Linear, the gradient d log-prob / d hidden of every token is computed together with the
    log-prob, so the backward pass neither stores logits nor recomputes them. Otherwise, and with `entropy_gradient`,
    the backward pass recomputes each chunk.
    """
    flat, ids = hidden.flatten(0, -2), token_ids.flatten()
    if is_frozen_linear(lm_head) and not entropy_gradient:
        bytes_per_logit = getattr(statistics, "bytes_per_logit", 12)
        size = chunk_size or _max_tokens(lm_head.out_features, bytes_per_logit)
        values = _FrozenHead.apply(flat, lm_head.weight, ids, temperature, size, statistics)
        logprobs, entropy, sum_p_squared = (x.view(token_ids.shape) for x in values)
        return logprobs, entropy, sum_p_squared

    def compute_chunk(h: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = lm_head(h).float() / temperature
        normaliser = logits.logsumexp(dim=-1)
        logprobs = logits.gather(-1, ids[:, None]).squeeze(-1) - normaliser
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            p = logits.softmax(dim=-1)
            entropy = normaliser - (p * logits).sum(dim=-1)
        return logprobs, entropy, p.detach().square().sum(dim=-1)

    size = chunk_size or _checkpointed_chunk_size(lm_head, flat)
    logprobs, entropy, sum_p_squared = _compute_in_chunks(compute_chunk, size, token_ids.shape, flat, ids)
    return logprobs, entropy, sum_p_squared


def token_divergence(
    hidden: Tensor,  # [..., H] of the policy, with gradient
    ref_hidden: Tensor,  # [..., H] of the reference
    lm_head: Callable[[Tensor], Tensor],  # [..., H] -> [..., V]
    function: Callable[[Tensor, Tensor], Tensor],  # log-probs of policy and reference [n, V] -> [n]; see kl.py
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    ref_lm_head: Callable[[Tensor], Tensor] | None = None,  # head of the reference; default: lm_head
    ref_temperature: float | None = None,  # default: temperature
) -> Tensor:
    """Return a divergence between policy and reference over the whole vocabulary for every token, [...] float32.

    Of a reference with more logits, those beyond the policy's are left out: no token has their ids.
    """

    def compute_chunk(h: Tensor, ref: Tensor) -> tuple[Tensor]:
        logprobs = (lm_head(h).float() / temperature).log_softmax(dim=-1)
        with torch.no_grad():
            ref_logits = (ref_lm_head or lm_head)(ref)[..., : logprobs.shape[-1]]
            ref_logprobs = (ref_logits.float() / (ref_temperature or temperature)).log_softmax(dim=-1)
        return (function(logprobs, ref_logprobs),)

    flat, ref = hidden.flatten(0, -2), ref_hidden.detach().flatten(0, -2)
    size = chunk_size or _checkpointed_chunk_size(lm_head, flat)
    (values,) = _compute_in_chunks(compute_chunk, size, hidden.shape[:-1], flat, ref)
    return values


@dataclass(frozen=True)
class TeacherStates:
    """A teacher's distributions of the next token at b rows of C completion tokens, and a divergence from them."""

    hidden: Tensor  # [b, C, H'] that predict each completion token
    lm_head: Callable[[Tensor], Tensor]  # [..., H'] -> [..., V]
    temperature: float
    function: Callable[[Tensor, Tensor], Tensor]  # see kl.py

    def divergence(
        self,
        hidden: Tensor,  # [n, H] of the policy, with gradient
        lm_head: Callable[[Tensor], Tensor],
        places: Tensor,  # [n] of these tokens among the b * C
        *,
        temperature: float,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Return the divergence of policy and teacher at some tokens, [n] float32."""
        return token_divergence(
            hidden,
            self.hidden.flatten(0, 1)[places],
            lm_head,
            self.function,
            temperature=temperature,
            chunk_size=chunk_size,
            ref_lm_head=self.lm_head,
            ref_temperature=self.temperature,
        )


def is_frozen_linear(lm_head: object) -> TypeGuard[nn.Linear]:
    """Return whether the head is a linear layer without bias that is not trained."""
    return type(lm_head) is nn.Linear and lm_head.bias is None and not lm_head.weight.requires_grad


class _FrozenHead(torch.autograd.Function):
    """Log-probs and other statistics whose forward already computes d log-prob / d hidden, [n, H]."""

    @staticmethod
    def forward(
        context: Any,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        temperature: float,
        size: int,
        statistics: Statistics,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with_gradient = context.needs_input_grad[0]
        gradients = torch.empty_like(hidden) if with_gradient else None
        logprobs, entropy, sum_p_squared = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logprobs[part], entropy[part], sum_p_squared[part], logit_gradient = statistics(
                F.linear(hidden[part], weight), ids[part], temperature, with_gradient
            )
            if gradients is not None and logit_gradient is not None:
                torch.mm(logit_gradient, weight, out=gradients[part])
        context.save_for_backward(gradients)
        context.mark_non_differentiable(entropy, sum_p_squared)
        return logprobs, entropy, sum_p_squared

    @staticmethod
    def backward(context: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradients,) = context.saved_tensors
        return (gradients * grad[:, None]).to(gradients.dtype), None, None, None, None, None


def _max_tokens(vocabulary: int, bytes_per_logit: int) -> int:
    """Return the number of tokens whose logits fit into MAX_LOGIT_BYTES, at least one."""
    return max(1, int(MAX_LOGIT_BYTES / (vocabulary * bytes_per_logit)))


def _checkpointed_chunk_size(lm_head: Callable[[Tensor], Tensor], hidden: Tensor) -> int:
    with torch.no_grad():
        vocabulary = lm_head(hidden[:1]).shape[-1] if len(hidden) else 1
    return _max_tokens(vocabulary, 24)


def _compute_in_chunks(function: Callable, size: int, shape: torch.Size, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Apply `function` to `size` rows at a time and return its joined outputs in `shape`.

    The backward pass recomputes each chunk instead of storing it.
    """
    chunks = []
    for parts in zip(*(x.split(size) for x in inputs), strict=True):
        if torch.is_grad_enabled():
            chunks.append(checkpoint(function, *parts, use_reentrant=False))
        else:
            chunks.append(function(*parts))
    return tuple(torch.cat(parts).view(shape) for parts in zip(*chunks, strict=True))
