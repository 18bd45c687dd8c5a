"""Laws that every policy loss must obey, checked on small batches in seconds.

`check-loss` applies them to a user's loss, and the tests to every registered loss. A law is fn(loss function) ->
(True where the law holds, the measured result as text); the loss function has its arguments bound. A loss that breaks a
law on purpose declares it in its attribute `breaks`, {law: reason}, and then the check fails if the law holds.

The docstring of a law is the statement that `check-loss` prints beside the result.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_core.distributed.ranks import all_sum
from grpo_core.objective.advantages import grpo_advantages
from grpo_core.objective.diagnostics import describe_wrong_diagnostics
from grpo_core.objective.inputs import LOSS_INPUTS, SELECTION_INPUTS, select_tokens
from grpo_core.objective.losses import LOSSES, PolicyLoss
from grpo_core.objective.token_weights import Totals, token_weights
from grpo_core.registry import exits_as_errors, get_fact
from grpo_core.schema import first_line

B, C = 6, 7
LENGTHS = [7, 1, 4, 3, 7, 2]
RATIOS = [0.05, 0.5, 1.0, 2.0, 20.0]  # columns of the clip table
LOG_RATIO_GRID = torch.linspace(
    -math.log(20), math.log(20), 6001, dtype=torch.double, device="cpu"
)  # where the clip law is checked


@dataclass(frozen=True)
class Outcome:
    """The outcome of checking one law."""

    law: str
    holds: bool
    result: str  # the measured number, or the error that the function raised
    declared: str | None = None  # the reason in the function's `breaks`; None where it does not declare this law

    @property
    def ok(self) -> bool:
        """True if the law holds, or is broken as the function declares."""
        return self.holds == (self.declared is None)


def check_loss(loss_fn: Callable) -> list[Outcome]:
    """Check every law except `ranks`, which needs two processes (`start_rank_gaps`)."""
    return run_laws(loss_fn, LOSS_LAWS)


def run_laws(function: Callable, laws: dict[str, Callable[[Callable], tuple[bool, str]]]) -> list[Outcome]:
    """Check the laws one by one; a law does not hold if the function raises."""
    outcomes = []
    for name, law in laws.items():
        try:
            with torch.device("cpu"), exits_as_errors():
                holds, result = law(function)
        except Exception as error:
            holds, result = False, f"{type(error).__name__}: {first_line(error)}"
        outcomes.append(Outcome(name, holds, result, (get_fact(function, "breaks") or {}).get(name)))
    return outcomes


def shape(loss_fn: Callable) -> tuple[bool, str]:
    """the loss is unreduced, [B, C]; its diagnostics, if any, are [B, C] and detached"""
    logprobs, old, advantages, mask = batch()
    out = call(loss_fn, logprobs.requires_grad_(), old, advantages, mask)
    if problem := describe_wrong_diagnostics(out.diagnostics, (B, C)):
        return False, problem
    return out.per_token_loss.shape == (B, C), str(list(out.per_token_loss.shape))


def pure(loss_fn: Callable) -> tuple[bool, str]:
    """two calls return the same, and the inputs are not changed"""
    inputs = batch()
    copies = [x.clone() for x in inputs]
    first, second = (call(loss_fn, *inputs).per_token_loss for _ in range(2))
    gap = float((first - second).abs().max())
    return gap == 0 and all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True)), f"{gap:.1g}"


def finite(loss_fn: Callable) -> tuple[bool, str]:
    """value and gradient are finite in float32, with a fully masked row and with log-ratios of +-100"""
    old = torch.full((4, 3), -101.0)
    logprobs = (old + torch.tensor([[100.0], [-100.0], [100.0], [-100.0]])).requires_grad_()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 0]]).bool()
    bad = 0
    for sign in (1.0, -1.0):
        advantages = torch.tensor([[sign], [-sign], [sign], [sign]])
        out = call(loss_fn, logprobs, old, advantages, mask).per_token_loss
        (gradient,) = torch.autograd.grad((out * weights(mask)).sum(), logprobs)
        bad += int((~out.isfinite()).sum() + (~gradient.isfinite()).sum())
    return bad == 0, f"{bad} not finite"


def zero_advantage(loss_fn: Callable) -> tuple[bool, str]:
    """an advantage of 0 gives a gradient of exactly 0"""
    logprobs, old, advantages, mask = batch()
    largest = float(loss_gradient(loss_fn, logprobs, old, 0 * advantages, mask).abs().max())
    return largest == 0, f"{largest:.1g}"


def padding(loss_fn: Callable) -> tuple[bool, str]:
    """masked tokens get no gradient, and their log-probs have no effect"""
    logprobs, old, advantages, mask = batch()
    gradient = loss_gradient(loss_fn, logprobs, old, advantages, mask)
    padded, padded_old = logprobs.masked_fill(~mask, -30.0), old.masked_fill(~mask, -2.0)
    gap = float((gradient - loss_gradient(loss_fn, padded, padded_old, advantages, mask)).abs().max())
    holds = gap < 1e-12 and bool((gradient[~mask] == 0).all()) and bool((gradient[mask] != 0).any())
    return holds, f"{gap:.1g}"


def splits(loss_fn: Callable) -> tuple[bool, str]:
    """the gradient does not depend on how the step is cut into micro-batches"""
    inputs = batch()
    average, gap = default_average(loss_fn), 0.0
    whole, selected = loss_gradient(loss_fn, *inputs, w=weights(inputs[3], average)), select(loss_fn, *inputs)
    for sizes in ([1, 5], [2, 2, 2], [1] * B):
        parts = [
            loss_gradient(loss_fn, *part, w=weights(part[3], average, of=inputs[3]), selected=chosen)
            for *part, chosen in zip(*(x.split(sizes) for x in (*inputs, selected)), strict=True)
        ]
        gap = max(gap, float((torch.cat(parts) - whole).abs().max()))
    return gap < 1e-12, f"{gap:.1g}"


def on_policy(loss_fn: Callable) -> tuple[bool, str]:
    """before the first update the gradient is that of REINFORCE, -A * weight"""
    logprobs, _, advantages, mask = batch()
    w = weights(mask, default_average(loss_fn))
    gap = float(
        (loss_gradient(loss_fn, logprobs, logprobs.clone(), advantages, mask, w=w) + advantages * w).abs().max()
    )
    return gap < 1e-12, f"{gap:.1g}"


def sampler(loss_fn: Callable) -> tuple[bool, str]:
    """a loss that reads the sampler's log-probs is exactly REINFORCE where they are the policy's own"""
    if "rollout_logprobs" not in LOSS_INPUTS.requested(loss_fn):
        return True, "not read"
    return on_policy(loss_fn)


def spread(loss_fn: Callable) -> tuple[bool, str]:
    """an advantage for each token, equal in a row, gives the gradient of one advantage for the row"""
    logprobs, old, advantages, mask = batch()
    whole = loss_gradient(loss_fn, logprobs, old, advantages, mask)
    gap = float((loss_gradient(loss_fn, logprobs, old, advantages.expand(B, C), mask) - whole).abs().max())
    return gap == 0, f"{gap:.1g}"


def gradcheck(loss_fn: Callable) -> tuple[bool, str]:
    """the gradient is the derivative of the value, by finite differences in float64"""
    logprobs, old, advantages, mask = batch()
    w = mask * torch.rand(B, C, generator=torch.Generator().manual_seed(1), dtype=torch.double)

    def value(x: Tensor) -> Tensor:
        return (call(loss_fn, x, old, advantages, mask).per_token_loss * w).sum()

    gradient, step, gap = loss_gradient(loss_fn, logprobs, old, advantages, mask, w=w), 1e-6, 0.0
    for i, j in mask.nonzero().tolist():
        offset = torch.zeros_like(logprobs)
        offset[i, j] = step
        slope = (value(logprobs + offset) - value(logprobs - offset)) / (2 * step)
        gap = max(gap, abs(float(slope - gradient[i, j])))
    return gap < 1e-7, f"{gap:.1g}"


def clip(loss_fn: Callable) -> tuple[bool, str]:
    """no ratio moves a token against the sign of its advantage, and on policy the token moves with it"""
    lowest = min(float(compute_gradient_weights(loss_fn, sign, LOG_RATIO_GRID).min()) for sign in (1, -1))
    on_policy = min(float(compute_gradient_weights(loss_fn, sign, torch.zeros(1))) for sign in (1, -1))
    return lowest >= 0 and on_policy > 0, f"{lowest + 0.0:.2g} at least"  # + 0.0 turns -0 into 0


def learns(loss_fn: Callable) -> tuple[bool, str]:
    """a bandit is learned in 60 steps of two passes: one of 8 tokens is rewarded, another ends the completion"""
    torch.manual_seed(0)
    logits = torch.zeros(C, 8, requires_grad=True)
    optimizer, rewards = torch.optim.Adam([logits], lr=0.1), []
    for _ in range(60):
        with torch.no_grad():
            drawn = torch.distributions.Categorical(logits=logits).sample((64,))  # [B, C]
            mask = (drawn == 0).cumsum(dim=1) - (drawn == 0).int() == 0
            rewards.append(((drawn == 3) & mask).sum(dim=1) / C)
            advantages = grpo_advantages(rewards[-1].view(8, 8)).view(-1, 1)
            old = logits.log_softmax(dim=-1).expand(64, C, 8).gather(2, drawn[..., None]).squeeze(2)
        w = weights(mask, default_average(loss_fn))
        for _ in range(2):
            logprobs = logits.log_softmax(dim=-1).expand(64, C, 8).gather(2, drawn[..., None]).squeeze(2)
            optimizer.zero_grad()
            (call(loss_fn, logprobs, old, advantages, mask).per_token_loss * w).sum().backward()
            optimizer.step()
    first, last = (float(torch.cat(part).mean()) for part in (rewards[:5], rewards[-5:]))
    return last > 0.6 > 3 * first, f"{first:.2f} -> {last:.2f}"


LOSS_LAWS: dict[str, Callable[[Callable], tuple[bool, str]]] = {
    law.__name__: law
    for law in (
        shape,
        pure,
        finite,
        zero_advantage,
        padding,
        splits,
        on_policy,
        sampler,
        spread,
        gradcheck,
        clip,
        learns,
    )
}


def compute_gradient_weights(loss_fn: Callable, sign: int, log_ratios: Tensor) -> Tensor:
    """Return the gradient weight of single tokens, -(d loss / d log-prob) / A, [n], at `log_ratios` [n], A = `sign`.

    It is 1 for REINFORCE and 0 for a clipped token.
    """
    old = torch.full_like(log_ratios.double(), -6.0)
    return gradient_weights_at(loss_fn, sign, old + log_ratios, old)


def gradient_weights_at(loss_fn: Callable, sign: int, logprobs: Tensor, old: Tensor) -> Tensor:
    """Return the gradient weight of single tokens, [n], at log-probs and old log-probs [n]; l_roll is l_old."""
    logprobs, old = logprobs[:, None], old[:, None]
    mask, advantages = torch.ones_like(old, dtype=torch.bool), torch.full_like(old, float(sign))
    nothing = torch.zeros_like(mask)
    gradient = loss_gradient(loss_fn, logprobs, old, advantages, mask, w=torch.ones_like(old), selected=nothing)
    return -gradient.squeeze(1) / sign


def clip_table(loss_fn: Callable) -> list[tuple[str, list[float], str]]:
    """Return a row for A > 0 and one for A < 0: the sign, the gradient weights at RATIOS, and where they are not 0."""
    table, log_ratios = [], torch.tensor(RATIOS, dtype=torch.double, device="cpu").log()
    for sign in (1, -1):
        at_ratios = compute_gradient_weights(loss_fn, sign, log_ratios) + 0.0
        table.append((f"A {'>' if sign > 0 else '<'} 0", at_ratios.tolist(), _describe_gradient_range(loss_fn, sign)))
    return table


def _describe_gradient_range(loss_fn: Callable, sign: int) -> str:
    """Return the range of ratios in which the gradient weight is not 0, in words."""
    gradient_weights = compute_gradient_weights(loss_fn, sign, LOG_RATIO_GRID)
    nonzero = (gradient_weights.abs() > 1e-9).nonzero().squeeze(1).tolist()
    if not nonzero:
        return "zero everywhere"
    if float(gradient_weights.min()) < -1e-9:
        return "negative at some ratios"
    first, last = nonzero[0], nonzero[-1]
    low, high = "0", "any"
    if first > 0:
        low = f"{_find_clip_ratio(loss_fn, sign, LOG_RATIO_GRID[first], LOG_RATIO_GRID[first - 1]):.6g}"
    if last < len(LOG_RATIO_GRID) - 1:
        high = f"{_find_clip_ratio(loss_fn, sign, LOG_RATIO_GRID[last], LOG_RATIO_GRID[last + 1]):.6g}"
    return "nonzero everywhere" if (low, high) == ("0", "any") else f"nonzero from ratio {low} to {high}"


def _find_clip_ratio(loss_fn: Callable, sign: int, inside: Tensor, outside: Tensor) -> float:
    """Return the ratio at which the gradient weight becomes 0, by bisection between two log-ratios."""
    for _ in range(40):
        middle = (inside + outside) / 2
        if abs(float(compute_gradient_weights(loss_fn, sign, middle[None]))) > 1e-9:
            inside = middle
        else:
            outside = middle
    return math.exp(float(inside))


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the laws' batch in float64: log-probs and old log-probs [6, 7] with ratios around 1, advantages, mask.

    The advantages are [6, 1], and the rows have different lengths.
    """
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(C) < torch.tensor(LENGTHS)[:, None]
    logprobs = -torch.rand(B, C, generator=generator, dtype=torch.double) * 3 - 0.5
    old = logprobs + 0.3 * torch.sin(torch.arange(1, B * C + 1).view(B, C))
    return logprobs, old, torch.randn(B, 1, generator=generator, dtype=torch.double), mask


def call(
    loss_fn: Callable,
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    selected: Tensor | None = None,
) -> PolicyLoss:
    """Call a loss; what it asks for by name is made up of these, and sampler and trainer agree: l_roll = l_old.

    `selected` is what the loss chose among the tokens of the step, of which these rows are a part; by default they are
    the whole step.
    """
    made_up = {
        "selected": select(loss_fn, logprobs.detach(), old, advantages, mask) if selected is None else selected,
        "rollout_logprobs": old,
        "ref_logprobs": old - 0.1,
        "teacher_logprobs": old + 0.1,
        "entropy": -old.detach(),
        "sum_p_squared": old.detach().exp(),
        "rewards": (advantages[:, :1] > 0).to(old.dtype),
    }
    inputs = {"logprobs": logprobs, "old_logprobs": old, "advantages": advantages, "completion_mask": mask}
    return LOSS_INPUTS.call(loss_fn, {**inputs, **made_up})


def select(loss_fn: Callable, logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Return what a loss chooses among the tokens of a step, [B, C] bool; nothing if it has no function for that."""
    generator = torch.Generator().manual_seed(2)
    draws = torch.rand(mask.shape, generator=generator, dtype=logprobs.dtype)
    inputs = (logprobs, old, advantages.expand_as(logprobs), mask, draws)
    values = dict(zip(SELECTION_INPUTS.positional, inputs, strict=True))
    chosen = select_tokens(loss_fn, {**values, "rollout_logprobs": old})
    return torch.zeros_like(mask) if chosen is None else chosen


def weights(mask: Tensor, average: str = "sequence", of: Tensor | None = None, scale: int = 1) -> Tensor:
    """Return the token weights for `mask`, which is a part of the step's mask `of`, [b, C] and [B, C].

    The totals are those of `scale` ranks with `of` each.
    """
    step_mask = mask if of is None else of
    completions = torch.tensor(len(step_mask) * scale)
    totals = Totals(tokens=step_mask.sum() * scale, completions=completions, max_new_tokens=C)
    return token_weights(mask, average=average, totals=totals, dtype=torch.double)


def default_average(loss_fn: Callable) -> str:
    """Return the first average that the loss is defined with, or "sequence"."""
    return (get_fact(loss_fn, "averages") or ("sequence",))[0]


def loss_gradient(
    loss_fn: Callable,
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    w: Tensor | None = None,
    selected: Tensor | None = None,
) -> Tensor:
    """Return d (per_token_loss * w).sum() / d logprobs, [B, C]; by default w is that of the average "sequence"."""
    x = logprobs.clone().requires_grad_()
    loss = call(loss_fn, x, old, advantages, mask, selected).per_token_loss
    loss = (loss * (weights(mask) if w is None else w)).sum()
    return torch.autograd.grad(loss, x)[0] if loss.requires_grad else torch.zeros_like(logprobs)


def start_rank_gaps(losses: Sequence[tuple[str, dict[str, Any]]]) -> Callable[[], list[float]]:
    """Start two gloo processes that compute the gradient of each loss (name, args) with half of the rows each.

    Returns a function that waits for the processes and returns, for each loss, the largest difference to the gradient
    of one process; infinity where the processes failed.
    """
    folder = tempfile.TemporaryDirectory()
    out = Path(folder.name) / "gaps.pt"
    context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload([__name__])  # one import of torch, for this call and those to come
    processes = [
        context.Process(target=_run_rank, args=(rank, folder.name, list(losses)), daemon=True) for rank in (0, 1)
    ]
    for process in processes:
        process.start()

    def wait_for_gaps() -> list[float]:
        for process in processes:
            process.join()
        gaps = torch.load(out) if out.exists() else [math.inf] * len(losses)
        folder.cleanup()
        return gaps

    return wait_for_gaps


def ranks(gap: float) -> tuple[bool, str]:
    """two processes with half of the rows each, and totals over both, give the gradient of one process"""
    return gap < 1e-12, f"{gap:.1g}"


def _run_rank(rank: int, folder: str, losses: list[tuple[str, dict[str, Any]]]) -> None:
    """Run one of two processes, with half of the rows and the totals of all rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    inputs, gaps = batch(), []
    own = [x[rank::2] for x in inputs]
    for name, args in losses:
        loss_fn = LOSSES.build(name, args)
        average = default_average(loss_fn)
        tokens, rows = all_sum(torch.tensor([own[3].sum(), len(own[3])]))
        w = token_weights(own[3], average=average, totals=Totals(tokens, rows, C), dtype=torch.double)
        gradient = torch.zeros(B, C, dtype=torch.double)
        gradient[rank::2] = loss_gradient(loss_fn, *own, w=w, selected=select(loss_fn, *inputs)[rank::2])
        whole = loss_gradient(loss_fn, *inputs, w=weights(inputs[3], average))
        gaps.append(float((all_sum(gradient) - whole).abs().max()))
    if rank == 0:
        torch.save(gaps, Path(folder) / "gaps.pt")
    dist.barrier()
    dist.destroy_process_group()
