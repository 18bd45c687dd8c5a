"""This module imports what grpo_core uses of PEFT, without bitsandbytes.

Where bitsandbytes is installed, peft.helpers imports it for one function, which takes more than a second of every
start. PEFT is imported here as if it were not installed; afterwards both find it as usual.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _without(name: str) -> Iterator[None]:
    """Let imports of a package fail as if it were not installed, unless it has been imported already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


with _without("bitsandbytes"):
    from peft import LoraConfig as PeftLoraConfig
    from peft import PeftModel, get_peft_model, get_peft_model_state_dict
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
    from transformers.utils import is_bitsandbytes_available

for _is_available in (is_bnb_available, is_bnb_4bit_available, is_bitsandbytes_available):
    getattr(_is_available, "cache_clear", lambda: None)()  # what they found meanwhile

__all__ = [
    "AuxiliaryTrainingWrapper", "BaseTunerLayer", "LoraLayer", "ModulesToSaveWrapper", "PeftLoraConfig", "PeftModel",
    "TrainableTokensLayer", "TrainableTokensWrapper", "get_peft_model", "get_peft_model_state_dict",
]  # fmt: skip
