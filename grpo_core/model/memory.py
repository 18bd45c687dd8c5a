"""Measure how many tokens one forward and backward may hold on this GPU, by trying the longest possible completions.

The result bounds every later micro-batch: it holds at most as many tokens, and at most as many tokens of attention's
padded rows, as the largest trial that fitted. No collective runs during a trial, so a rank that runs out of memory does
not block the others. A trial leaves the model and the random generators as they were (trial.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from grpo_core.batch import Rollouts, take
from grpo_core.config.sections import RunConfig
from grpo_core.counts import quantify
from grpo_core.distributed import ranks
from grpo_core.model.logprobs import TeacherStates
from grpo_core.model.packing import Budget, Packing
from grpo_core.model.policy import Policy, enable_gradient_checkpointing
from grpo_core.model.teacher import Teacher
from grpo_core.model.trial import Snapshot, without_trace
from grpo_core.monitor.progress import show_elapsed
from grpo_core.objective.kl import KLS, TEACHER_KLS
from grpo_core.registry import get_fact
from grpo_core.schema import ConfigError

MAX_CPU_TOKENS = 2048  # in one forward; on two cores 512 and 8,192 are 5 to 15 % slower
MAX_TRIED_TOKENS = 65536  # in one forward; more are hardly faster and fill the memory of a large card
MEMORY_SHARE = 0.9  # share of the free memory that is used; the rest allows for fragmentation
RESERVED_BYTES = 0.4e9  # allocated only after the trials: the sampler's graphs and buffers, the batch of a step


@dataclass(frozen=True)
class Budgets:
    """The largest forwards that one rank computes."""

    update: Budget  # forward and backward
    forward: Budget  # forward alone
    teacher: Budget | None = None  # forward of the teacher; None: no limit


@dataclass(frozen=True)
class Taught:
    """The teacher of a run, for the trials."""

    teacher: Teacher
    longest_prompt: int  # tokens of the longest prompt that it sees


def find_budgets(
    config: RunConfig,
    policy: Policy,
    longest: tuple[int, int],
    rows: int,
    notify: Callable[[str], None],
    taught: Taught | None = None,
) -> Budgets:
    """Return the budgets for `rows` completions on every rank. A collective.

    `longest` is the greatest number of tokens of a prompt and of a completion. If model.gradient_checkpointing is auto
    and not even one completion fits, gradient checkpointing is switched on. On the CPU nothing is tried.

    Raises:
        ConfigError: not even one completion of the greatest length fits into the GPU's memory.
    """
    if policy.layout == "grid":  # find the layout now, while the model is in evaluation mode
        notify("the model's attention cannot be packed: every row is padded to the longest row of its micro-batch")
    for sentence in policy.choose_kernels():
        notify(sentence)
    fixed, checkpointing = config.trainer.tokens_per_micro_batch, config.model.gradient_checkpointing
    if not torch.cuda.is_available():
        tokens = MAX_CPU_TOKENS if fixed == "auto" else fixed
        return Budgets(Budget(tokens), *2 * [Budget(max(tokens, MAX_CPU_TOKENS))])
    if policy.kernel_differs:
        notify("the log-prob kernel of this GPU computes other values than torch, so log-probs are computed without it")
    as_loaded = Snapshot(policy.model)
    teacher_budget = None if taught is None else _find_teacher_budget(config, policy, longest[1], rows, taught)
    trial = _Trial(config, policy, longest, rows, taught, teacher_budget)
    with show_elapsed("trying what fits into memory"):
        update_rows = trial.find_max_rows(backward=True)
    if ranks.all_max(torch.tensor(float(update_rows == 0), device="cpu")) and checkpointing == "auto":
        enable_gradient_checkpointing(policy.causal_lm)
        checkpointing, update_rows = True, trial.find_max_rows(backward=True)
    forward_rows = trial.find_max_rows(backward=False)
    smallest = -ranks.all_max(torch.tensor([-update_rows, -forward_rows], device="cpu"))
    update_rows, forward_rows = (int(count) for count in smallest.tolist())
    if update_rows == 0:
        as_loaded.restore()  # gradient checkpointing did not help
        raise ConfigError(
            f"not even one completion of {quantify(longest[1], 'token')} after a prompt of "
            f"{quantify(longest[0], 'token')} fits into the GPU's "
            f"memory; lower sampling.max_new_tokens or data.max_prompt_tokens"
        )
    budgets = Budgets(trial.budget_of(update_rows), trial.budget_of(forward_rows), teacher_budget)
    if fixed != "auto":
        budgets = replace(budgets, update=Budget(fixed))
    notify(_describe_budgets(budgets, is_fixed=fixed != "auto", checkpointing=checkpointing is True))
    return budgets


def _describe_budgets(budgets: Budgets, *, is_fixed: bool, checkpointing: bool) -> str:
    """Return the budgets as a line of the log."""
    reason = "trainer.tokens_per_micro_batch" if is_fixed else "what fits"
    return (
        f"micro-batches of up to {quantify(budgets.update.tokens, 'token')} ({reason}), "
        f"gradient checkpointing {'on' if checkpointing else 'off'}, "
        f"forwards without backward of up to {quantify(budgets.forward.tokens, 'token')}"
    )


def _find_teacher_budget(config: RunConfig, policy: Policy, longest: int, rows: int, taught: Taught) -> Budget:
    """Return the budget of the teacher's forwards over completions of `longest` tokens. A collective.

    Raises:
        ConfigError: not even one completion of the greatest length fits into the GPU's memory.
    """
    with taught.teacher.active() as model, show_elapsed("trying what of the teacher fits into memory"):
        trial = _Trial(config, model, (taught.longest_prompt, longest), rows)
        trial.trained = sum(p.numel() for p in policy.parameters())
        own_rows = trial.find_max_rows(backward=False)
        max_rows = int(-ranks.all_max(torch.tensor(float(-own_rows), device="cpu")))
        if max_rows == 0:
            raise ConfigError(
                f"the teacher's forward of one completion of {quantify(longest, 'token')} after a prompt of "
                f"{quantify(taught.longest_prompt, 'token')} does not fit into the GPU's memory; choose a smaller "
                f"teacher, or lower sampling.max_new_tokens or data.max_prompt_tokens"
            )
        return trial.budget_of(max_rows)


class _Trial:
    """Made-up rollouts of the greatest length, over which forwards and backwards are tried."""

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        longest: tuple[int, int],
        rows: int,
        taught: Taught | None = None,
        teacher_budget: Budget | None = None,
    ) -> None:
        self.policy, (longest_prompt, self.width) = policy, longest
        self.trained = sum(p.numel() for p in policy.parameters())  # weights
        self.teacher_kl = TEACHER_KLS[config.teacher.kl] if taught and config.teacher.kl else None
        self.taught, self.teacher_budget = taught, teacher_budget
        self.group_size, device = config.sampling.group_size, policy.causal_lm.device
        ids = torch.ones(1, 1, dtype=torch.long, device=device)
        groups = torch.arange(math.ceil(rows / self.group_size), device=device)
        prompts = groups.repeat_interleave(self.group_size)[:rows]
        prompt_ids = prompts[:, None].expand(-1, longest_prompt) % policy.causal_lm.config.get_text_config().vocab_size
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
        has_divergence = config.loss.kl_coef > 0 and config.loss.kl_in == "loss" and get_fact(kl, "full_vocabulary")
        self.divergence = kl if has_divergence else None
        self.entropy = config.loss.entropy_coef > 0 or config.loss.entropy_target is not None
        self.router_balance = config.loss.router_aux_coef > 0

    def budget_of(self, rows: int) -> Budget:
        """Return the budget that a forward over `rows` rows needs."""
        packing = self._pack(rows)
        attention_tokens = packing.tokens if packing.attention is None else len(packing.attention.spread.index)
        return Budget(packing.tokens, attention_tokens)

    def find_max_rows(self, *, backward: bool) -> int:
        """Return the largest number of rows whose forward (and backward) fits into memory; 0 if not even one does.

        The memory of one and of two rows gives a first estimate, which is lowered until it fits.
        """
        free, total = _free_bytes(self.trained), len(self.rollouts)
        limit = max(1, next((n for n in range(1, total + 1) if self._count_tokens(n) >= MAX_TRIED_TOKENS), total))
        one_row = self._measure_peak(1, backward)
        if one_row is None or one_row > free:
            return 0
        two_rows = self._measure_peak(min(2, limit), backward)
        if limit == 1 or two_rows is None or two_rows > free:
            return 1
        rows = limit
        if two_rows > one_row:
            rows = min(limit, 1 + int((free * MEMORY_SHARE - one_row) / (two_rows - one_row)))
        while rows > 1:
            peak = self._measure_peak(rows, backward)
            if peak is not None and peak <= free * (1 + MEMORY_SHARE) / 2:
                break
            rows = max(1, int(rows * 0.85))
        return max(1, rows)

    def _count_tokens(self, rows: int) -> int:
        return math.ceil(rows / self.group_size) * self.rollouts.prompt_ids.shape[1] + rows * (self.width - 1)

    def _pack(self, rows: int) -> Packing:
        return next(iter(self.policy.plan(take(self.rollouts, torch.arange(rows, device="cpu")))))

    def _measure_peak(self, rows: int, backward: bool) -> int | None:
        """Return the bytes that a forward (and backward) over `rows` rows adds at its peak; None if it does not fit."""
        torch.cuda.empty_cache()
        with without_trace(self.policy.model):
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
        packing = self._pack(rows)
        rollouts = take(self.rollouts, packing.rows)
        if not backward:
            with torch.no_grad():
                self.policy.forward(rollouts, packing)
            return
        with self.policy.training():
            tokens = self.policy.forward(
                rollouts,
                packing,
                entropy_gradient=self.entropy,
                divergence=self.divergence,
                teacher=self._compute_teacher_states(rollouts),
                router_balance=self.router_balance,
            )
            outputs = [tokens.logprobs, tokens.entropy if self.entropy else None, tokens.divergence]
            outputs += [tokens.teacher_divergence, tokens.router_balance]
            loss = sum(values.sum() for values in outputs if values is not None)
            torch.autograd.grad(loss, self.policy.parameters(), allow_unused=True)

    def _compute_teacher_states(self, rollouts: Rollouts) -> TeacherStates | None:
        """Return what a KL to the teacher needs, for prompts as long as the longest that the teacher sees."""
        if self.taught is None or self.teacher_kl is None:
            return None
        ids = rollouts.prompt_ids[:, :1].expand(-1, self.taught.longest_prompt)
        rollouts = replace(rollouts, prompt_ids=ids, prompt_mask=torch.ones_like(ids, dtype=torch.bool))
        assert self.teacher_budget is not None
        return self.taught.teacher.states(rollouts, self.teacher_budget, self.teacher_kl)


def _free_bytes(trained: int) -> float:
    """Return the bytes that micro-batches may use: neither allocated now nor needed later.

    Later needs are RESERVED_BYTES and Adam's two float32 moments of `trained` parameters.
    """
    free, total = torch.cuda.mem_get_info()
    share = (
        torch.cuda.get_per_process_memory_fraction() if hasattr(torch.cuda, "get_per_process_memory_fraction") else 1.0
    )
    reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    return min(free, share * total - reserved) + reserved - allocated - RESERVED_BYTES - 8 * trained


def retry_in_halves(policy: Policy, rollouts: Rollouts, packing: Packing, work: Callable[[Packing], None]) -> bool:
    """Call work(packing); if memory runs out, call it for micro-batches of half the tokens. Return whether it did.

    `work` must not have changed anything when it runs out of memory.
    """
    try:
        work(packing)
        return False
    except torch.OutOfMemoryError:
        pass  # leave the handler first: the exception keeps the tensors of the failed attempt alive
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    rows, given = packing.rows.tolist(), packing.predict_given
    for half in policy.plan(rollouts, Budget(packing.tokens // 2), rows, predict_given=given):
        work(half)
    return True
