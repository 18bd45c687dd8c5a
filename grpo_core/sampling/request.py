"""The interface of a decoder: the completions that it is asked for, and the completions that it has drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from grpo_core.batch import SamplingParams
from grpo_core.sampling.turn_rows import FindStop
from grpo_core.sampling.turns import Turns

Watch = Callable[[list[int], list[int]], None]  # receives row indices and the tokens just drawn for these rows


@dataclass(frozen=True)
class DecodeRequest:
    """A request for G completions of each of N prompts: B = N * G rows, prompt-major.

    With `turns`, an end-of-sequence token or a stop string ends a turn, and `limits` bound all tokens, drawn and given.
    """

    prompts: Sequence[Sequence[int]]  # N lists of token ids
    group_size: int  # G
    limits: Tensor  # [B] int64, the greatest number of tokens of each completion, at least 1
    settings: SamplingParams
    noise: Callable[[], Tensor] | None  # returns uniforms [B, T] float64 with T >= max(limits); None if greedy
    watch: Watch | None = None  # only the plain decoder calls it
    # (ids [R, T], lengths [R]) -> [R] whether a turn needs no more tokens, because a stop string is in it
    is_stopped: Callable[[Tensor, Tensor], Tensor] | None = None
    # receives rows [R] whose completions are over, once each, with their ids [R, T] and lengths [R]
    on_ended: Callable[[Tensor, Tensor, Tensor], None] | None = None
    turns: Turns | None = None  # what answers the turns of completions; None: a completion is one turn
    find_stop: FindStop | None = None  # where a turn ends in which there is a stop string; only with `turns`


@dataclass(frozen=True)
class Draws:
    """The completions that a decoder has drawn: B rows, C tokens in the longest."""

    ids: Tensor  # [B, C] int64, padded on the right
    logprobs: Tensor  # [B, C] float32; 0 where padded
    lengths: Tensor  # [B] int64
    # [B] bool, whether the last token is an end-of-sequence token, or completes a stop string; with turns also where a
    # completion ended with room for another token
    ended: Tensor
    prompt_routed_experts: Tensor | None = None  # [B, P, L, k] as in `Rollouts`; None if not recorded
    routed_experts: Tensor | None = None  # [B, C, L, k]
    turn_ids: Tensor | None = None  # [B, C] int16 as in `Rollouts`; None of a request without turns
