"""GRPO with LoRA on DeepSpeed ZeRO-2, written by hand.

From Python, in a notebook for example:

    load_config(file, overrides)   a configuration, checked (config_file.py)
    train(config)                  the whole job; returns the run folder (job.py)
    open_source(run_or_model)      a policy with its tokenizer and sampler (opened.py)
    LOSSES, ADVANTAGES, REWARDS    what a name in the configuration stands for; `@REWARDS.register("mine")` adds to it

Everything else is as near as its room: `from grpo_core.losses import token_ratio`. What is named here loads when it is
first used, so `import grpo_core` costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["ADVANTAGES", "LOSSES", "REWARDS", "ConfigError", "load_config", "open_source", "train"]

_WHERE = {
    "ADVANTAGES": ("advantages", "ADVANTAGES"),
    "LOSSES": ("losses", "LOSSES"),
    "REWARDS": ("rewards", "REWARDS"),
    "ConfigError": ("schema", "ConfigError"),
    "load_config": ("config_file", "load"),
    "open_source": ("opened", "open_source"),
    "train": ("job", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'grpo_core' has no attribute {name!r}")
    room, attribute = _WHERE[name]
    return getattr(import_module(f"grpo_core.{room}"), attribute)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
