"""Make the keys of random draws, and the generators that are seeded from them.

A key is a tuple that begins with the purpose of its draws: ("train", seed, step, prompt) and, for one completion, the
sample after it. Draws for two purposes therefore never share a stream, whatever their numbers are. Every generator of
the package that depends on a seed is made here. This module does not import torch.
"""

from __future__ import annotations

import hashlib

import numpy as np

PURPOSES = {  # purpose -> the numbers that follow it in a key
    "train": "seed, step, prompt of the step; the sampler appends the sample",
    "evaluation": "the task's own key, its set if that has a name, row; the sampler appends the sample",
    "evaluate": "seed, row; the sampler appends the sample",
    "sample": "seed; the sampler appends the sample",
    "generate": "seed, number of the prompt; the sampler appends the sample",
    "held_out": "none, or the row: what is held out of the training data, and what is measured on it",
    "evaluation_sets": "none: which held-out rows belong to which of evaluation.sets",
    "data_order": "seed, epoch, the source if it has a name",
    "sources": "seed, step: which prompts of a step are from which source",
    "source_shares": "seed: how the shares of the sources are rounded to prompts, in all steps",
    "replacement": "seed, step, attempt, the source if it has a name: the prompts that replace tied ones",
    "target": "the task's own key: which template of sft.targets a row gets",
    "new_weights": "seed: the adapter, or a new model",
    "dropout": "seed, step, rank",
    "minibatches": "seed, step: the order of the completions within their groups",
    "selection": "seed, step, minibatch: which tokens a loss chooses where there are too many",
    "environment": "the task's own key, the sample: the seed of the environment of a completion",
    "exact_kl": "seed, step: the tokens of log.exact_kl_every",
    "bootstrap": "seed: the resampling of a confidence interval",
}

Key = tuple[str | int, ...]


def make_key(purpose: str, *parts: int | str) -> Key:
    """Return the key (purpose, *parts). `parts` are numbers, or the parts of another key, purpose included."""
    assert purpose in PURPOSES, purpose
    return (purpose, *parts)


def make_generator(key: Key) -> np.random.Generator:
    """Return a new NumPy generator whose draws are a function of `key`."""
    return np.random.default_rng(_digest(key, 16))


def torch_seed(key: Key) -> int:
    """Return the seed for a torch generator whose draws are a function of `key`, from 0 to 2^63 - 1."""
    return _digest(key, 8) >> 1


def _digest(key: Key, size: int) -> int:
    """Return `size` bytes that differ for different keys, as an integer.

    NumPy's own seeding from a tuple pads it with zeros and splits large numbers: (1,) and (1, 0) share a stream, and so
    do (2^32, 1) and (0, 1, 1).
    """
    text = repr([part if isinstance(part, str) else int(part) for part in key])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest(), "little")
