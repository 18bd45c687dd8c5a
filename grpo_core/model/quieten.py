"""Silence what libraries log about themselves."""

from __future__ import annotations

import logging
import os
import warnings

import torch
from transformers.utils import logging as transformers_logging


def quieten() -> None:
    """Silence the warnings and progress bars of libraries; errors are still logged."""
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which peft imports, logs that it found none
    for name in ("torch", "torch.distributed", "datasets", "peft", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
