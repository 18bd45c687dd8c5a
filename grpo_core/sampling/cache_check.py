"""Find the fastest method of decoding that computes what the model computes for each row alone, without a cache."""

from __future__ import annotations

from collections.abc import Sequence
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
SHORT_PROMPTS, LONG_PROMPT = (1, 2, 5), 70  # short ones have much padding beside a long one
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
        rows = _make_rows(model.config.get_text_config().vocab_size)
        expected = [_logits_of(model, row) for row in rows]
        _check_causal(model, rows, expected)
        methods = METHODS if not has_recurrent_layers(model) or _keeps_padding_out(model, pad_id) else METHODS[1:]
        return next((method for method in methods[:-1] if _matches(method, model, rows, expected, pad_id)), methods[-1])


def _make_rows(vocabulary: int, lengths: Sequence[int] = PROMPT_LENGTHS) -> list[list[int]]:
    """Return prompts of these lengths and the tokens after each."""
    longest = max(lengths) + NEW_TOKENS
    return [
        [(i * longest + place + 2) % vocabulary for place in range(length + NEW_TOKENS)]
        for i, length in enumerate(lengths)
    ]


def _keeps_padding_out(model: Any, pad_id: int) -> bool:
    """Return whether padding stays out of the states of recurrent layers.

    In the state of a short prompt beside a long one, padding has the greatest part that it can have. So its effect is
    measured there, over all short prompts. In 16 bits it may be as large as rounding, or twice the rounding of decoding
    each row alone; but which token pads must not matter in any precision.
    """
    vocabulary = model.config.get_text_config().vocab_size
    rows = _make_rows(vocabulary, (LONG_PROMPT, *SHORT_PROMPTS))
    expected = torch.cat([_logits_of(model, row) for row in rows[1:]])
    is_exact = model.dtype in EXACT_DTYPES
    try:
        padded, other = (_decode("padded", model, rows, pad)[1:] for pad in (pad_id, (pad_id + 1) % vocabulary))
        if _gap(other, padded) > MAX_GAP:
            return False
        gap = _gap(padded, expected)
        if is_exact or gap <= ROUGH_TOLERANCE:
            return gap <= (MAX_GAP if is_exact else ROUGH_TOLERANCE)
        alone = [_decode("cached", model, [row], pad_id) for row in rows[1:]]
    except CACHE_ERRORS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    return gap <= min(2 * _gap(torch.cat(alone), expected), MAX_ROUGH_GAP)


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
        logits = [logits for part in parts for logits in _decode(method, model, part, pad_id)]
        return _agree(logits, expected, model.dtype)
    except CACHE_ERRORS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False


@torch.no_grad()
def check_steps(computation: Computation, model: Any) -> bool:
    """Return whether the steps of a computation give the logits of each row alone; rows are exchanged on the way."""
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
            logits = computation.step(state)
        expected = [_logits_of(model, rows[i]) for i in state[PROMPT].tolist()]
        return _agree(list(logits), expected, model.dtype)


def _decode(method: Method, model: Any, rows: list[list[int]], pad_id: int) -> Tensor:
    """Return the logits [rows, V] after the last token of each row, which is fanned out and chosen again on the way."""
    live, count = begin(method, model, [row[:-NEW_TOKENS] for row in rows], pad_id), len(rows)
    live.prefill()
    live.select(torch.arange(count, device=model.device).repeat_interleave(2))  # a row and its twin
    logits = torch.zeros(0)
    for t in range(-NEW_TOKENS, 0):
        tokens = torch.tensor([row[t] for row in rows], device=model.device)
        if t > -NEW_TOKENS:
            logits = live.append(tokens)
            continue
        tokens = torch.stack([(tokens + 1) % model.config.get_text_config().vocab_size, tokens], dim=1)
        live.append(tokens.flatten())  # the twin gets another token, so that its state is another
        live.select(torch.arange(count, device=model.device) * 2 + 1)
    return logits


def _agree(logits: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Return whether the logits agree up to the rounding of a model of this `dtype`; the logits may have another."""
    gaps = [_gap(got.flatten(), right.flatten()) for got, right in zip(logits, expected, strict=True)]
    if dtype in EXACT_DTYPES:
        return all(gap <= MAX_GAP for gap in gaps)
    return min(gaps) <= MAX_ROUGH_GAP


def _gap(logits: Tensor, expected: Tensor) -> float:
    logits, expected = ((x.float() - x.float().mean()) for x in (logits, expected))
    return float((logits - expected).norm() / expected.norm().clamp(min=1e-12))
