"""Check that a model's cache gives what the model computes without one, before the first completion is drawn."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from grpo_core.model.trial import without_trace
from grpo_core.model.update_mode import evaluation_mode
from grpo_core.sampling.plain_decoder import PlainDecoder, pad_left
from grpo_core.schema import ConfigError, first_line

PROMPT_LENGTHS = (6, 3)
# largest relative difference of a row's logits; in 16 bits a token may go to another expert, so the best row counts
MAX_GAP, MAX_ROUGH_GAP = 1e-2, 0.15


@torch.no_grad()
def check_cache(decoder: PlainDecoder) -> None:
    """Compare one token of a cached decode with the uncached forward of each row alone.

    A model may ignore its cache, the padding on the left, or the positions. Its sampled log-probs would be wrong.

    Raises:
        ConfigError: they differ, or the model's cache cannot be used.
    """
    model = decoder.model
    model_type = model.config.model_type
    with without_trace(model), evaluation_mode([*model.modules()]):
        rows = _make_rows(model.config.get_text_config().vocab_size)
        try:
            cached = _decode_with_cache(decoder, rows)
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ConfigError(
                f"the {model_type} model at model.path cannot be sampled: its cache is not one of keys and values "
                f"({first_line(error)})"
            ) from error
        alone = [model(input_ids=torch.tensor([row], device=model.device), use_cache=False) for row in rows]
    gaps = [_gap(got, out.logits[0, -1]) for got, out in zip(cached, alone, strict=True)]
    is_rough = cached.dtype not in (torch.float32, torch.float64)
    gap, limit = (min(gaps), MAX_ROUGH_GAP) if is_rough else (max(gaps), MAX_GAP)
    if not gap <= limit:
        raise ConfigError(
            f"the {model_type} model at model.path cannot be sampled: with its cache it computes other logits than "
            f"without (relative difference {gap:.2g}), so it does not use the cache, or not the padding on the left"
        )


def _make_rows(vocabulary: int) -> list[list[int]]:
    """Return two prompts and the token after each."""
    longest = max(PROMPT_LENGTHS) + 1
    return [
        [(i * longest + place + 2) % vocabulary for place in range(length + 1)]
        for i, length in enumerate(PROMPT_LENGTHS)
    ]


def _decode_with_cache(decoder: PlainDecoder, rows: list[list[int]]) -> Tensor:
    """Return the logits [2, V] after the last token of each row, whose prompts were prefilled together."""
    device = decoder.model.device
    ids, mask = pad_left([row[:-1] for row in rows], decoder.pad_id, device)
    cache = DynamicCache(config=decoder.model.config)
    decoder._forward(ids, mask, mask, cache)
    cache.batch_select_indices(torch.arange(len(rows), device=device))
    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    last = torch.tensor([row[-1:] for row in rows], device=device)
    return decoder._forward(last, mask[:, -1:], mask, cache)


def _gap(logits: Tensor, expected: Tensor) -> float:
    logits, expected = ((x.float() - x.float().mean()) for x in (logits, expected))
    return float((logits - expected).norm() / expected.norm().clamp(min=1e-12))
