"""The data passed between the sampler, the rewards and the loss: `Task`, `Rollouts` and `TrainBatch`.

Rows are ordered by prompt: completions n*G to n*G + G-1 belong to prompt n. Column t of every [B, C] tensor is
completion token t; only model/packing.py shifts by one. Two prompts with G = 1, the second completion truncated:

    prompt_ids       [[0, 5, 6], [7, 8, 9]]     prompt_mask      [[0, 1, 1], [1, 1, 1]]
    completion_ids   [[4, 2, 0], [4, 4, 4]]     completion_mask  [[1, 1, 0], [1, 1, 1]]
    truncated        [False, True]              id 2 is the end-of-sequence token

A completion of several turns also has tokens that an environment gave. The model sees them, and they are not trained.
Two turns of which the second ends the completion, with an answer of two tokens between them:

    completion_ids   [[4, 2, 7, 8, 5, 2]]       valid_mask       [[1, 1, 1, 1, 1, 1]]
    turn_ids         [[0, 0, -1, -1, 1, 1]]     completion_mask  [[1, 1, 0, 0, 1, 1]]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_core.random_keys import Key, make_key

UNSEEDED = make_key("sample", 0)  # the key of a task that no stream or command has given one

PADDING = {"turn_ids": -1}  # what pads the fields of `Rollouts` that 0 does not

MIN_TEMPERATURE = 1e-6  # of sampling; float32 logits of 1e30 can still be divided by it


@dataclass(frozen=True)
class Task:
    """One row of the data set with its tokenised prompt."""

    index: int  # row number in the data set
    prompt: str
    prompt_ids: list[int]
    columns: dict[str, Any]  # the data columns, which the rewards may read
    seed: Key = UNSEEDED  # key of the completions; in training (purpose, run seed, step, position)
    eval_set: str = ""  # name of its set in evaluation.sets
    teacher_prompt_ids: list[int] | None = None  # with teacher.prompt, the prompt that the teacher sees
    source: str = ""  # name of its source in data.sources


@dataclass(frozen=True)
class Rollouts:
    """Completions as the sampler drew them.

    Masks are set by the sampler; they are never derived from token ids.
    """

    prompt_ids: Tensor  # [B, P], padded on the left or the right
    prompt_mask: Tensor  # [B, P] bool
    completion_ids: Tensor  # [B, C], padded on the right
    # [B, C] bool, the tokens that the policy drew, up to and including the token that ends the completion
    completion_mask: Tensor
    rollout_logprobs: Tensor  # [B, C] float32, under the distribution that was sampled; 0 where masked
    # [B] bool, true where the last turn has no end-of-sequence token or stop string, and max_new_tokens are used up
    truncated: Tensor
    completions: tuple[str, ...] = ()  # B texts; empty where the completions were not decoded
    # experts that the L routers of the sampler's model chose for each token, k of them; None: not recorded
    prompt_routed_experts: Tensor | None = None  # [B, P, L, k] uint8 or int16
    routed_experts: Tensor | None = None  # [B, C, L, k]; anything where not valid, and for a completion's last token
    # [B, C] bool, all tokens of a completion, drawn and given: a prefix of the row; None: all are drawn
    valid_mask: Tensor | None = None
    turn_ids: Tensor | None = None  # [B, C] int16, number of the turn of every drawn token, else -1; None: one turn

    def __post_init__(self) -> None:
        rows, width = self.completion_ids.shape
        assert self.prompt_ids.shape == self.prompt_mask.shape and len(self.prompt_ids) == rows
        assert self.completion_mask.shape == self.rollout_logprobs.shape == (rows, width)
        assert self.truncated.shape == (rows,) and len(self.completions) in (0, rows)
        assert self.completion_mask.dtype == self.prompt_mask.dtype == torch.bool
        assert (self.routed_experts is None) == (self.prompt_routed_experts is None)
        if self.routed_experts is not None and self.prompt_routed_experts is not None:
            assert self.routed_experts.shape[:2] == (rows, width)
            assert self.prompt_routed_experts.shape[:2] == self.prompt_ids.shape
        if self.valid_mask is not None:
            assert self.valid_mask.shape == (rows, width) and self.valid_mask.dtype == torch.bool
        assert self.turn_ids is None or self.turn_ids.shape == (rows, width)

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def valid(self) -> Tensor:
        """The tokens of each completion, drawn and given, [B, C] bool."""
        return self.completion_mask if self.valid_mask is None else self.valid_mask

    @property
    def given(self) -> Tensor:
        """The tokens of each completion that an environment gave, [B, C] bool."""
        return self.valid & ~self.completion_mask

    @property
    def turns(self) -> Tensor:
        """The number of the turn of every drawn token from 0, -1 elsewhere, [B, C] int16."""
        return self.completion_mask.to(torch.int16) - 1 if self.turn_ids is None else self.turn_ids

    def lengths(self) -> Tensor:
        """Return the number of tokens that the policy drew in each row, [B]."""
        return self.completion_mask.sum(dim=1)

    def valid_lengths(self) -> Tensor:
        """Return the number of tokens of each completion, drawn and given, [B]."""
        return self.valid.sum(dim=1)

    def without_routing(self) -> Rollouts:
        """Return the rollouts without the experts that the sampler's routers chose."""
        return replace(self, prompt_routed_experts=None, routed_experts=None)


@dataclass(frozen=True)
class SamplingParams:
    """The parameters of the distribution from which each token is drawn.

    top_k, top_p and min_p truncate the distribution, and the log-probs are those of the truncated distribution.
    Training refuses them, because sampling and training must use the same distribution.
    """

    temperature: float = 1.0
    greedy: bool = False
    top_k: int | None = None  # keep the k most probable tokens, and any as probable as the k-th
    top_p: float | None = None  # keep the fewest tokens whose probabilities sum to this. arXiv:1904.09751
    min_p: float | None = None  # keep tokens of at least this share of the highest probability. arXiv:2407.01082

    def __post_init__(self) -> None:
        if problem := describe_temperature(self.temperature):
            raise ValueError(f"temperature is {self.temperature}; {problem} (set greedy for greedy decoding)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is {value}; it must be above 0 and at most 1")

    @property
    def restricted(self) -> bool:
        """True if top_k, top_p or min_p is set."""
        return not (self.top_k is None and self.top_p is None and self.min_p is None)


def describe_temperature(temperature: float) -> str | None:
    """Return what a sampling temperature must be, or None if it is that."""
    if not 0 < temperature < float("inf"):
        return "it must be above 0"
    if temperature < MIN_TEMPERATURE:
        return f"it must be at least {MIN_TEMPERATURE:g}, because logits divided by less overflow"
    return None


@dataclass(frozen=True)
class Frozen:
    """Rollouts with the masks and log-probs that the loss compares with, fixed before the first gradient of a step."""

    rollouts: Rollouts
    loss_mask: Tensor  # [B, C] bool, drawn tokens that are trained
    surrogate_mask: Tensor | None = None  # [B, C] bool, those of them that the surrogate acts on; None: all
    old_logprobs: Tensor | None = None  # [B, C]; None when the batch is used once, where they equal the policy's own
    ref_logprobs: Tensor | None = None  # [B, C]; None when nothing reads them
    logprobs: Tensor | None = None  # [B, C] before the first update; these three are there where something reads them
    entropy: Tensor | None = None  # [B, C]
    sum_p_squared: Tensor | None = None  # [B, C]
    teacher_logprobs: Tensor | None = None  # [B, C]; None when nothing reads them
    teacher_prompt_ids: Tensor | None = None  # [B, P'] the teacher's prompts; None: they are the policy's
    teacher_prompt_mask: Tensor | None = None  # [B, P'] bool
    # [B, C] share of routers that chose other experts than in the sampler, beside old_logprobs; None: not recorded
    routing_mismatch: Tensor | None = None

    def with_advantages(self, advantages: Tensor, rewards: Tensor | None = None) -> TrainBatch:
        """Return the batch of the update; `advantages` [N, G], [N, G, C], [B, 1] or [B, C], `rewards` [N, G]."""
        advantages = advantages.reshape(len(self.loss_mask), -1).to(self.loss_mask.device)
        if rewards is not None:
            rewards = rewards.reshape(-1, 1).to(self.loss_mask.device, torch.float32)
        return TrainBatch(
            self.rollouts,
            advantages,
            self.loss_mask,
            self.surrogate_mask,
            self.old_logprobs,
            self.ref_logprobs,
            rewards,
            frozen_logprobs=self.logprobs,
            routing_mismatch=self.routing_mismatch,
            teacher_logprobs=self.teacher_logprobs,
            teacher_prompt_ids=self.teacher_prompt_ids,
            teacher_prompt_mask=self.teacher_prompt_mask,
        )


@dataclass(frozen=True)
class TrainBatch:
    """Rollouts with everything that the loss needs, fixed before the first gradient of the step."""

    rollouts: Rollouts
    advantages: Tensor  # [B, 1], or [B, C] with a value for each token
    loss_mask: Tensor  # [B, C] bool, drawn tokens that are trained
    surrogate_mask: Tensor | None = None  # [B, C] bool, tokens of loss_mask that the surrogate acts on; None: all
    old_logprobs: Tensor | None = None  # [B, C]; None if the batch is used once: they equal the policy's
    ref_logprobs: Tensor | None = None  # [B, C]; None if nothing reads them
    shaped_rewards: Tensor | None = None  # [B, 1], from which the advantages were computed; NaN: none
    frozen_logprobs: Tensor | None = None  # [B, C] before the first update, where a mask or weight needs them
    selected: Tensor | None = None  # [B, C] bool, the tokens that the loss chose among those of the optimizer step
    correction_scale: Tensor | None = None  # [B, 1], factor of the rollout correction's weights; None: 1
    teacher_logprobs: Tensor | None = None  # [B, C]; None if nothing reads them
    teacher_prompt_ids: Tensor | None = None  # [B, P'] the teacher's prompts; None: they are the policy's
    teacher_prompt_mask: Tensor | None = None  # [B, P'] bool
    # [B, C] share of routers that chose other experts than in the sampler, beside old_logprobs; None: not recorded
    routing_mismatch: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.rollouts.completion_ids.shape
        assert self.advantages.shape in ((len(self.rollouts), 1), shape) and self.loss_mask.shape == shape
        logprobs = (self.old_logprobs, self.ref_logprobs, self.frozen_logprobs, self.teacher_logprobs)
        rest = (self.surrogate_mask, self.selected, self.routing_mismatch, *logprobs)
        assert all(x is None or x.shape == shape for x in rest)

    def __len__(self) -> int:
        return len(self.rollouts)

    def mean_advantages(self) -> Tensor:
        """Return one advantage for each completion, [B]: the mean over its trained tokens, 0 without any."""
        if self.advantages.shape[1] == 1:
            return self.advantages.squeeze(1)
        return (self.advantages * self.loss_mask).sum(dim=1) / self.loss_mask.sum(dim=1).clamp(min=1)

    def minibatches(self, count: int, passes: int, group_size: int, generator: torch.Generator) -> Iterator[TrainBatch]:
        """Yield `count` equal minibatches for each of `passes` passes over the rows; each is one optimizer step.

        A minibatch contains the same random positions of every group, so it does not depend on the number of ranks.
        """
        for _ in range(passes):
            if count == 1:
                yield self
                continue
            rows = torch.arange(len(self), device="cpu").view(-1, group_size)
            for samples in random_order(group_size, generator).chunk(count):
                yield take(self, rows[:, samples].flatten())


def random_order(count: int, generator: torch.Generator) -> Tensor:
    """Return 0 .. count - 1 in a random order, on the device of the generator whatever torch's default device is."""
    return torch.randperm(count, generator=generator, device=generator.device)


def replace_rows(rollouts: Rollouts, rows: Tensor, others: Rollouts) -> Rollouts:
    """Return `rollouts` with its rows `rows` [len(others)] replaced by `others`; the narrower of the two is padded."""

    def put(name: str, pad_left: bool) -> Tensor:
        old, new = getattr(rollouts, name), getattr(others, name)
        width, padding = max(old.shape[1], new.shape[1]), PADDING.get(name, 0)
        merged = pad_columns(old, width, pad_left, padding).clone()
        merged[rows.to(merged.device)] = pad_columns(new, width, pad_left, padding)
        return merged

    truncated, texts = rollouts.truncated.clone(), list(rollouts.completions)
    truncated[rows.to(truncated.device)] = others.truncated
    for row, text in zip(rows.tolist(), others.completions, strict=True):
        texts[row] = text
    prompts = {name: put(name, pad_left=True) for name in ("prompt_ids", "prompt_mask")}
    names = ["completion_ids", "completion_mask", "rollout_logprobs"]
    names += [name for name in ("valid_mask", "turn_ids") if getattr(rollouts, name) is not None]
    tokens = {name: put(name, pad_left=False) for name in names}
    if rollouts.routed_experts is not None:
        prompts["prompt_routed_experts"] = put("prompt_routed_experts", pad_left=True)
        tokens["routed_experts"] = put("routed_experts", pad_left=False)
    return Rollouts(**prompts, **tokens, truncated=truncated, completions=tuple(texts))


def pad_columns(values: Tensor, width: int, pad_left: bool, padding: int = 0) -> Tensor:
    """Pad [B, n, ...] to [B, width, ...] with `padding` on the left or on the right."""
    missing = width - values.shape[1]
    places = (0, 0) * (values.dim() - 2) + ((missing, 0) if pad_left else (0, missing))
    return F.pad(values, places, value=padding)


Batch = TypeVar("Batch", Rollouts, TrainBatch)


def split(batch: Batch, size: int) -> Iterator[Batch]:
    """Yield consecutive micro-batches of at most `size` rows."""
    for start in range(0, len(batch), size):
        yield take(batch, torch.arange(start, min(start + size, len(batch)), device="cpu"))


def take(batch: Batch, rows: Tensor) -> Batch:
    """Return a batch with the given rows of every field."""

    def pick(value: Any) -> Any:
        if value is None or value == ():
            return value
        if isinstance(value, Tensor):
            return value[rows.to(value.device)]
        if isinstance(value, tuple):
            return tuple(value[i] for i in rows.tolist())
        return take(value, rows)

    return type(batch)(**{f.name: pick(getattr(batch, f.name)) for f in fields(batch)})
