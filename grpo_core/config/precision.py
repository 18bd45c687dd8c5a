"""The dtypes that `model.precision` names, and the choice of auto on this machine."""

from __future__ import annotations

import torch

from grpo_core.schema import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # by their names in the configuration


def resolve_dtype(name: str) -> torch.dtype:
    """Return the dtype of `model.precision`; auto is bf16 on GPUs that have it, fp16 on older ones, fp32 on the CPU.

    Raises:
        ConfigError: `name` is fp16 and there is no GPU; DeepSpeed refuses fp16 on the CPU.
    """
    if name == "fp16" and not torch.cuda.is_available():
        raise ConfigError("model.precision is fp16, which needs a GPU; use auto, fp32 or bf16")
    if name != "auto":
        return DTYPES[name]
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of `dtype` without its module, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
