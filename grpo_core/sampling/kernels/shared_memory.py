"""The shared memory of a GPU, and the part of an attention that fits into it.

tests/test_kernels_compile.py compiles every kernel for cards with 64 to 163 KB and compares its need with theirs.
"""

from __future__ import annotations

from functools import cache

import torch

DEFAULT_BYTES = 99 * 1024  # of a block, where no GPU can be asked
MIN_KEYS = 16  # that a matrix product takes


@cache
def _bytes_of(device: torch.device) -> int:
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", DEFAULT_BYTES)


def available_bytes(device: torch.device) -> int:
    """Return the bytes of shared memory that a block may use on this device."""
    return _bytes_of(device) if device.type == "cuda" else DEFAULT_BYTES


def fit_attention(
    keys: int, stages: int, *, bytes_per_key: int, bytes_of_queries: int, device: torch.device
) -> tuple[int, int]:
    """Return the keys that an attention loads at once and its stages, lowered to what fits, stages first.

    A stage but the last has keys and values of its own, and queries and result are there as well.
    """
    available = available_bytes(device)

    def count_bytes() -> int:
        return keys * bytes_per_key * max(1, stages - 1) + 2 * bytes_of_queries

    while stages > 1 and count_bytes() > available:
        stages -= 1
    while keys > MIN_KEYS and count_bytes() > available:
        keys //= 2
    return keys, stages
