"""Published objectives by name, each with every key that it depends on: frozen, whatever the defaults become.

`preset: NAME` in a run config puts these values under those of the file; `preset=NAME` on the command line puts them
over the file's and under the rest of the command line. Only the objective is here. Learning rates, batch sizes, lengths
and numbers of passes are the run's, and so is what the sources say of them.
"""

from __future__ import annotations

import copy
from typing import Any

from grpo_core.schema import ConfigError, list_known

_PLAIN = {  # grpo, on policy, no reference
    "advantage": {"name": "grpo", "args": {"eps": 1e-4, "std_ddof": 1}, "min_group_std": 0.0},
    "truncation": {"name": "keep", "args": {}},
    "loss": {
        "name": "grpo",
        "args": {"clip_low": 0.2, "clip_high": 0.2, "delta": None},
        "average": "sequence",
        "kl": "k3",
        "kl_coef": 0.0,
        "kl_in": "loss",
        "kl_target": None,
        "entropy_coef": 0.0,
        "entropy_target": None,
        "top_entropy": 1.0,
        "off_policy_mask": None,
        "rollout_correction": {"name": "none", "args": {}},
    },
    "reference": {"every": 0, "mixing": 1.0},
    "sampling": {"dynamic_attempts": 0},
}

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> where it is from, what differs from the plain one
    "grpo_paper": (
        "arXiv:2402.03300, one iteration; clip_low, clip_high, eps and std_ddof are the field's, the paper names none",
        {"loss": {"kl_coef": 0.04}},
    ),
    "dr_grpo": ("arXiv:2503.20783", {"advantage": {"name": "dr_grpo", "args": {}}, "loss": {"average": "constant"}}),
    "dapo": (
        "arXiv:2503.14476; its penalty of -1 is for rewards of 1 and -1",
        {
            "loss": {"args": {"clip_low": 0.2, "clip_high": 0.28}, "average": "token"},
            "truncation": {"name": "soft_penalty", "args": {"cache_share": 0.2}},
            "sampling": {"dynamic_attempts": 10},
        },
    ),
    "gspo": (
        "arXiv:2507.18071",
        {"loss": {"name": "gspo", "args": {"clip_low": 3e-4, "clip_high": 4e-4, "delta": None}}},
    ),
    "cispo": (
        "arXiv:2506.13585, the loss alone; the cap as in arXiv:2510.13786, the paper names none",
        {"loss": {"name": "cispo", "args": {"cap": 5.0}, "average": "token"}},
    ),
    "rloo": (
        "arXiv:2402.14740; kl_coef as in TRL's RLOOConfig, the paper tunes it",
        {
            "advantage": {"name": "rloo", "args": {}},
            "loss": {
                "name": "reinforce",
                "args": {},
                "average": "row_sum",
                "kl": "k1",
                "kl_coef": 0.05,
                "kl_in": "reward",
            },
        },
    ),
    "trl_1_16_default": ("TRL 1.16.0, GRPOConfig without vLLM", {"loss": {"average": "token", "kl": "k3_corrected"}}),
    "verl_default": (
        "verl, ppo_trainer.yaml with adv_estimator=grpo (2026)",
        {
            "advantage": {"args": {"eps": 1e-6, "std_ddof": 1}},
            "loss": {"name": "dual_clip", "args": {"clip_low": 0.2, "clip_high": 0.2, "c": 3.0}, "average": "token"},
        },
    ),
    "open_instruct_default": (
        "open-instruct, grpo_fast (2026); tied groups, which it drops, stay in the denominator here",
        {
            "advantage": {"name": "dr_grpo", "args": {}},
            "loss": {
                "args": {"clip_low": 0.2, "clip_high": 0.272},
                "average": "token",
                "kl_coef": 0.05,
                "rollout_correction": {"name": "token_truncate", "args": {"clip_min": None, "clip_max": 2.0}},
            },
        },
    ),
}


def get_preset(name: str) -> dict[str, Any]:
    """The sections of a run config that `name` stands for.

    Raises:
        ConfigError: no such preset; the message lists them.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; {list_known(name, PRESETS)}")
    return merge(copy.deepcopy(_PLAIN), PRESETS[name][1])


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `under`, mapping by mapping; another function's `args` do not shine through."""
    if "name" in over and over["name"] != under.get("name"):
        under = {key: value for key, value in under.items() if key != "args"}
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(under.get(key), dict)
        merged[key] = merge(under[key], value) if both else copy.deepcopy(value)
    return merged
