"""Find the fastest method of decoding that computes what the model computes for each row alone, without a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_core.model.families import has_recurrent_layers
from grpo_core.model.trial import EXACT_DTYPES, ROUGH_TOLERANCE, without_trace
from grpo_core.model.update_mode import evaluation_mode
from grpo_core.sampling.computation import CallSize, Computation
from grpo_core.sampling.decode_ops import DRAWN, FIELDS, PROMPT, ROW, SLOT, START, TOKEN
from grpo_core.sampling.live_rows import METHODS, Method, begin, next_logits
from grpo_core.schema import ConfigError

PROMPT_LENGTHS, NEW_TOKENS = (6, 3), 3
# largest relative difference of a row's logits; in 16 bits a token may go to another expert, so the best row counts
MAX_GAP, MAX_ROUGH_GAP = 1e-3, 0.15
# short ones have much padding beside a long one, and one length, so that they can be decoded together without padding
SHORT_PROMPTS, LONG_PROMPT = (1, 1, 1), 70
CACHE_ERRORS = (TypeError, ValueError, AttributeError, LookupError, RuntimeError)  # as a model's cache raises


@torch.no_grad()
def find_method(model: Any, pad_id: int) -> Method:
    """Return the first method whose logits after some drawn tokens are those of each row alone.

    A model may ignore its cache, the padding on the left, or the positions, and padding may enter the state of
    recurrent layers.

    Raises:
        ConfigError: a token's logits depend on later tokens, so that no forward of whole rows gives its log-prob.
    """
    with without_trace(model), evaluation_mode([*model.modules()]):
        vocabulary, methods, is_checked = model.config.get_text_config().vocab_size, METHODS, False
        if has_recurrent_layers(model):
            long, *short = _make_rows(vocabulary, (LONG_PROMPT, *SHORT_PROMPTS))
            expected = [_logits_of(model, row) for row in short]
            _check_causal(model, short[:2], expected[:2])
            if _keeps_padding_out(model, [long, *short], torch.cat(expected), pad_id):
                return "padded"
            methods, is_checked = METHODS[1:], True
        rows = _make_rows(vocabulary)
        expected = [_logits_of(model, row) for row in rows]
        if not is_checked:
            _check_causal(model, rows, expected)
        return next((method for method in methods[:-1] if _matches(method, model, rows, expected, pad_id)), methods[-1])


def _make_rows(vocabulary: int, lengths: Sequence[int] = PROMPT_LENGTHS) -> list[list[int]]:
    """Return prompts of these lengths and the tokens after each."""
    longest = max(lengths) + NEW_TOKENS
    return [
        [(i * longest + place + 2) % vocabulary for place in range(length + NEW_TOKENS)]
        for i, length in enumerate(lengths)
    ]


def _keeps_padding_out(model: Any, rows: list[list[int]], expected: Tensor, pad_id: int) -> bool:
    """Return whether the method "padded" gives the `expected` logits of the short rows after the first, a long one.

    In the state of a short prompt beside a long one, padding has the greatest part that it can have. So its effect is
    measured there, over all short prompts. In 16 bits it may be as large as rounding, or twice the rounding of decoding
    the rows without padding; but which token pads must not matter in any precision.
    """
    other_pad = (pad_id + 1) % model.config.get_text_config().vocab_size
    is_exact = model.dtype in EXACT_DTYPES
    try:
        first, *_, last = _decode("padded", model, rows, pad_id)
        if _gap(next(_decode("padded", model, rows, other_pad))[1:], first[1:]) > MAX_GAP:
            return False
        gap = _gap(last[1:], expected)
        if is_exact or gap <= ROUGH_TOLERANCE:
            return gap <= (MAX_GAP if is_exact else ROUGH_TOLERANCE)
        *_, alone = _decode("cached", model, rows[1:], pad_id)
    except CACHE_ERRORS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    return gap <= min(2 * _gap(alone, expected), MAX_ROUGH_GAP)


def _logits_of(model: Any, row: Sequence[int]) -> Tensor:
    """Return the logits [1, V] after the tokens of one row, computed alone and without a cache."""
    return next_logits(model, torch.tensor([[*row]], device=model.device))


def _check_causal(model: Any, rows: list[list[int]], expected: list[Tensor]) -> None:
    last = model.config.get_text_config().vocab_size - 1  # tokens that are not in the rows
    longer = [torch.tensor([[*row, last, last // 2]], device=model.device) for row in rows]
    logits = [model(input_ids=ids, use_cache=False).logits[:, -3] for ids in longer]
    if not _agree(logits, expected, model.dtype):
        raise ConfigError(
            f"the {model.config.model_type} model at model.path is not supported: its logits after a token depend on "
            f"later tokens, so it is no causal language model"
        )


def _matches(method: Method, model: Any, rows: list[list[int]], expected: list[Tensor], pad_id: int) -> bool:
    """Return whether `method` gives the expected logits; False if the model's cache cannot be used so."""
    try:
        parts = [rows] if method == "padded" else [[row] for row in rows]
        logits = [logits for part in parts for logits in [*_decode(method, model, part, pad_id)][-1]]
        return _agree(logits, expected, model.dtype)
    except CACHE_ERRORS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False


@torch.no_grad()
def check_steps(
    computation: Computation, model: Any, run_first: Callable[[Callable[[], Tensor]], Any] | None = None
) -> bool:
    """Return whether the steps of a computation give the logits of each row alone; rows are exchanged on the way.

    `run_first` computes the first step, with what else it needs of a step.
    """
    with without_trace(model), evaluation_mode([*model.modules()]):
        rows = _make_rows(model.config.get_text_config().vocab_size)
        count, prompts = len(rows), [row[:-NEW_TOKENS] for row in rows]
        computation.allocate(CallSize(count, max(PROMPT_LENGTHS), count, count, count, NEW_TOKENS))
        computation.prefill(prompts)
        state = torch.zeros(FIELDS, count, dtype=torch.int64, device=model.device)
        state[SLOT] = state[PROMPT] = state[ROW] = torch.arange(count)
        state[START] = torch.tensor(PROMPT_LENGTHS)
        computation.add_rows(state)
        logits = torch.zeros(0)
        for t in range(NEW_TOKENS):
            state = state.flip(1)
            computation.keep_rows(state)
            state[TOKEN] = torch.tensor([rows[i][t - NEW_TOKENS] for i in state[PROMPT].tolist()])
            state[DRAWN] = t + 1
            step = partial(computation.step, state)
            if t == 0 and run_first is not None:
                run_first(step)
            else:
                logits = step()
        expected = [_logits_of(model, rows[i]) for i in state[PROMPT].tolist()]
        return _agree(list(logits), expected, model.dtype)


def _decode(method: Method, model: Any, rows: list[list[int]], pad_id: int) -> Iterator[Tensor]:
    """Yield the logits [rows, V] after each of the last tokens of the rows.

    The rows are fanned out, and chosen again after the first of these tokens.
    """
    live, count = begin(method, model, [row[:-NEW_TOKENS] for row in rows], pad_id), len(rows)
    live.prefill()
    live.select(torch.arange(count, device=model.device).repeat_interleave(2))  # a row and its twin
    for t in range(-NEW_TOKENS, 0):
        tokens = torch.tensor([row[t] for row in rows], device=model.device)
        if t > -NEW_TOKENS:
            yield live.append(tokens)
            continue
        tokens = torch.stack([(tokens + 1) % model.config.get_text_config().vocab_size, tokens], dim=1)
        yield live.append(tokens.flatten())[1::2]  # the twin gets another token, so that its state is another
        live.select(torch.arange(count, device=model.device) * 2 + 1)


def _agree(logits: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Return whether the logits agree up to the rounding of a model of this `dtype`; the logits may have another."""
    gaps = [_gap(got.flatten(), right.flatten()) for got, right in zip(logits, expected, strict=True)]
    if dtype in EXACT_DTYPES:
        return all(gap <= MAX_GAP for gap in gaps)
    return min(gaps) <= MAX_ROUGH_GAP


def _gap(logits: Tensor, expected: Tensor) -> float:
    logits, expected = ((x.float() - x.float().mean()) for x in (logits, expected))
    return float((logits - expected).norm() / expected.norm().clamp(min=1e-12))
