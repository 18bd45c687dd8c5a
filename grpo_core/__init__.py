"""GRPO with LoRA on DeepSpeed ZeRO-2, written by hand.

These names are the stable imports; everything else may move between modules:

    load_config(file, overrides)      read and check a configuration (data/forms.py)
    train(config)                     run the whole training job and return the run folder (training/job.py)
    open_source(run_or_model)         open a run or a model: policy, tokenizer, sampler (commands/open_policy.py)
    LOSSES, ADVANTAGES, REWARDS       the registries; `@REWARDS.register("mine")` adds a function
    PolicyLoss, token_ratio           what a loss returns, and exp(l - l_old) with the difference clamped
    center                            rewards minus their group's mean, exactly 0 in a tied group
    Turn, Reply                       what an environment receives, and what it may return (environments/interface.py)
    attempt                           call a reward function as the trainer calls it
    ConfigError                       what a user asked for cannot be run

A name loads its module when it is first used, so `import grpo_core` loads nothing heavy.
"""

import logging
from importlib import import_module
from typing import Any

from grpo_core import moved

__version__ = "0.1.0"
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # which logs when peft imports it
_EXPORTS = {
    "ADVANTAGES": "objective.advantages",
    "LOSSES": "objective.losses",
    "REWARDS": "objective.rewards",
    "ConfigError": "schema",
    "PolicyLoss": "objective.losses",
    "Reply": "environments.interface",
    "Turn": "environments.interface",
    "attempt": "scoring.reward_call",
    "center": "objective.advantages",
    "load_config": "data.forms",
    "open_source": "commands.open_policy",
    "token_ratio": "objective.losses",
    "train": "training.job",
}
__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in moved.MOVED:
        raise AttributeError(moved.describe_old_module(name))
    if name not in _EXPORTS:
        raise AttributeError(f"module 'grpo_core' has no attribute {name!r}")
    return getattr(import_module(f"grpo_core.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


moved.install()
