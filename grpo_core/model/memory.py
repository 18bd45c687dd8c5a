"""How many tokens a forward and backward may hold on this GPU: found by trying the longest completions there can be.

What is tried bounds the completions that are sampled: a micro-batch holds at most as many tokens, and at most as many
places of attention's padded rows. No collective runs while a rank tries, so one that runs out of memory stops nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from grpo_core.batch import Rollouts, take
from grpo_core.config.sections import RunConfig
from grpo_core.distributed import ranks
from grpo_core.model.packing import Budget, Packing
from grpo_core.model.policy import Policy, checkpoint_gradients
from grpo_core.monitor.progress import show_elapsed
from grpo_core.objective.kl import KLS
from grpo_core.registry import fact
from grpo_core.schema import ConfigError

ON_CPU = 2048  # tokens: 512 and 8,192 are 5 to 15 % slower on two cores
MOST = 65536  # more at once gain little, and hold all memory of a large card
MARGIN = 0.9  # the share of the free memory that is used; the rest is for fragments
LATER = 0.4e9  # bytes that are taken only afterwards: the sampler's graphs and buffers, a step's batch


@dataclass(frozen=True)
class Budgets:
    """How much one rank computes at once."""

    update: Budget  # forward and backward
    forward: Budget  # forward only


def find_budgets(
    config: RunConfig, policy: Policy, longest: tuple[int, int], rows: int, say: Callable[[str], None]
) -> Budgets:
    """The budgets of `rows` completions on every rank; switches gradient checkpointing on where auto needs it.

    `longest`: the tokens that a prompt and a completion may have.

    A collective.

    Raises:
        ConfigError: not even one completion of the greatest length fits.
    """
    if policy.layout == "grid":  # tried here, in evaluation mode, whatever comes
        say("the model's attention cannot be packed: rows are padded to the longest of their micro-batch")
    fixed, checkpointing = config.trainer.tokens_per_micro_batch, config.model.gradient_checkpointing
    if not torch.cuda.is_available():
        tokens = ON_CPU if fixed == "auto" else fixed
        return Budgets(Budget(tokens), Budget(max(tokens, ON_CPU)))
    trial = _Trial(config, policy, longest, rows)
    with show_elapsed("trying what fits into memory"):
        update = trial.most_rows(backward=True)
    if ranks.all_max(torch.tensor(float(update == 0))) and checkpointing == "auto":
        checkpoint_gradients(policy.causal_lm)
        checkpointing, update = True, trial.most_rows(backward=True)
    forward = trial.most_rows(backward=False)
    update, forward = (-int(x) for x in ranks.all_max(torch.tensor([-update, -forward])).tolist())
    if update == 0:
        raise ConfigError(
            f"not even one completion of {longest[1]} tokens after a prompt of {longest[0]} fits into the GPU's "
            f"memory; lower sampling.max_new_tokens or data.max_prompt_tokens"
        )
    budgets = Budgets(*(trial.budget(count) for count in (update, forward)))
    if fixed != "auto":
        budgets = Budgets(Budget(fixed), budgets.forward)
    why = "what fits" if fixed == "auto" else "as configured"
    say(
        f"micro-batches of up to {budgets.update.tokens:,} tokens ({why}), "
        f"gradient checkpointing {'on' if checkpointing is True else 'off'}, "
        f"forwards alone of up to {budgets.forward.tokens:,}"
    )
    return budgets


class _Trial:
    """Rollouts of the greatest length, more and more of them."""

    def __init__(self, config: RunConfig, policy: Policy, longest: tuple[int, int], rows: int) -> None:
        self.policy, (longest_prompt, self.width) = policy, longest
        self.group, device = config.sampling.group_size, policy.causal_lm.device
        ids = torch.ones(1, 1, dtype=torch.long, device=device)
        prompts = torch.arange(-(-rows // self.group), device=device).repeat_interleave(self.group)[:rows]
        prompt_ids = prompts[:, None].expand(-1, longest_prompt) % policy.causal_lm.config.vocab_size
        completion_ids = ids.expand(rows, self.width)
        self.rollouts = Rollouts(
            prompt_ids,
            torch.ones_like(prompt_ids, dtype=torch.bool),
            completion_ids,
            torch.ones_like(completion_ids, dtype=torch.bool),
            torch.zeros(completion_ids.shape, device=device),
            torch.ones(rows, dtype=torch.bool, device=device),
        )
        kl = KLS.get(config.loss.kl)
        whole = config.loss.kl_coef > 0 and config.loss.kl_in == "loss" and fact(kl, "full_vocabulary")
        self.divergence = kl if whole else None
        self.entropy = config.loss.entropy_coef > 0 or config.loss.entropy_target is not None

    def budget(self, rows: int) -> Budget:
        """What `rows` rows hold."""
        packing = self._packing(rows)
        places = packing.tokens if packing.attention is None else len(packing.attention.spread.index)
        return Budget(packing.tokens, places)

    def most_rows(self, *, backward: bool) -> int:
        """The most rows that fit, 0 if not even one does."""
        free, total = _free(sum(p.numel() for p in self.policy.parameters())), len(self.rollouts)
        most = max(1, min(total, next((n for n in range(1, total + 1) if self._tokens(n) >= MOST), total)))
        one = self._peak(1, backward)
        if one is None or one > free:
            return 0
        two = self._peak(min(2, most), backward)
        if most == 1 or two is None or two > free:
            return 1
        rows = most if two <= one else min(most, 1 + int((free * MARGIN - one) / (two - one)))
        while rows > 1:
            peak = self._peak(rows, backward)
            if peak is not None and peak <= free * (1 + MARGIN) / 2:
                break
            rows = max(1, int(rows * 0.85))
        return max(1, rows)

    def _tokens(self, rows: int) -> int:
        return -(-rows // self.group) * self.rollouts.prompt_ids.shape[1] + rows * (self.width - 1)

    def _packing(self, rows: int):
        return next(iter(self.policy.plan(take(self.rollouts, torch.arange(rows)))))

    def _peak(self, rows: int, backward: bool) -> int | None:
        """Bytes that a forward (and backward) over `rows` rows takes beside what is held already; None: too many."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            self._compute(rows, backward)
        except torch.OutOfMemoryError:
            return None
        finally:
            torch.cuda.empty_cache()
        return torch.cuda.max_memory_allocated() - before

    def _compute(self, rows: int, backward: bool) -> None:
        packing = self._packing(rows)
        rollouts = take(self.rollouts, packing.rows)
        if not backward:
            with torch.no_grad():
                self.policy.forward(rollouts, packing)
            return
        with self.policy.training():
            tokens = self.policy.forward(rollouts, packing, entropy_gradient=self.entropy, divergence=self.divergence)
            wanted = [tokens.logprobs, tokens.entropy if self.entropy else None, tokens.divergence]
            loss = sum(values.sum() for values in wanted if values is not None)
            torch.autograd.grad(loss, self.policy.parameters(), allow_unused=True)


def _free(trained: int) -> float:
    """Bytes that micro-batches may take, beside what is allocated now and will be (Adam's state comes in the step)."""
    free, total = torch.cuda.mem_get_info()
    share = (
        torch.cuda.get_per_process_memory_fraction() if hasattr(torch.cuda, "get_per_process_memory_fraction") else 1.0
    )
    reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    return min(free, share * total - reserved) + reserved - allocated - LATER - 8 * trained


def in_halves_if_need_be(policy: Policy, rollouts: Rollouts, packing: Packing, work: Callable[[Packing], None]) -> bool:
    """work(packing); where memory runs out, its rows once more in micro-batches of half the tokens. Was it halved?

    `work` must have done nothing when it runs out of memory.
    """
    try:
        work(packing)
        return False
    except torch.OutOfMemoryError:
        pass  # outside, the exception no longer holds on to what was computed
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for half in policy.plan(rollouts, Budget(packing.tokens // 2), packing.rows.tolist()):
        work(half)
    return True
