"""Published objectives by name.

A preset sets every key that its objective depends on, so it does not change when a default does. With `preset: NAME` in
a file, the other keys of the file override the preset. With `preset=NAME` on the command line, the preset overrides the
file, and the other overrides of the command line override the preset. A preset does not set learning rates, batch
sizes, lengths and numbers of passes, even where its source names them.
"""

from __future__ import annotations

import copy
from typing import Any

from grpo_core.schema import ConfigError, list_known

_BASE = {  # grpo without a reference; every preset is this with some changes
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
        "normalize_correction": False,
        "rejection": {"name": "none", "args": {}},
        "rejection_in": "loss",
        "log_ratio_coef": 0.0,
        "positive_nll_coef": 0.0,
    },
    "reference": {"every": 0, "mixing": 1.0},
    "sampling": {"dynamic_attempts": 0},
}

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> (source, changes to _BASE)
    "grpo_paper": (
        "arXiv:2402.03300, one iteration; clip_low, clip_high, eps and std_ddof are usual values, the paper names none",
        {"loss": {"kl_coef": 0.04}},
    ),
    "dr_grpo": ("arXiv:2503.20783", {"advantage": {"name": "dr_grpo", "args": {}}, "loss": {"average": "constant"}}),
    "dapo": (
        "arXiv:2503.14476; the penalty of up to -1 assumes rewards of 1 and -1",
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
        "arXiv:2506.13585, the loss alone; the paper names no cap, this is that of arXiv:2510.13786",
        {"loss": {"name": "cispo", "args": {"cap": 5.0}, "average": "token"}},
    ),
    "rloo": (
        "arXiv:2402.14740; the paper tunes kl_coef, this is that of TRL's RLOOConfig",
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
        "open-instruct, grpo_fast (2026); it drops tied groups, which count in the denominator here",
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
    "dppo": (
        "arXiv:2602.04879, the total variation of the drawn token; the cap is that of verl's function",
        {
            "loss": {
                "name": "dppo_tv",
                "args": {"delta_low": 0.15, "delta_high": 0.15, "cap": 20.0},
                "average": "token",
            }
        },
    ),
    "m2po": (
        "arXiv:2510.01161; AReaL, m2_threshold, which takes the tokens of a micro-batch where this takes the step's",
        {"loss": {"average": "token", "rejection": {"name": "m2po", "args": {"threshold": 0.04}}}},
    ),
    "nemo_seq_mask_tis": (
        "NeMo-RL (2026), seq-mask-tis without a KL; its baseline leaves the completion's own reward out, this does not",
        {
            "advantage": {"args": {"eps": 1e-6, "std_ddof": 1}},
            "loss": {
                "average": "token",
                "rollout_correction": {"name": "token_truncate", "args": {"clip_min": None, "clip_max": None}},
                "rejection": {"name": "geometric", "args": {"low": 0.999, "high": 1.002}},
                "rejection_in": "surrogate",
            },
        },
    ),
    "prime_rl_default": (
        "prime-rl (2026), its loss default with grpo's advantages, which are not divided by the spread",
        {
            "advantage": {"name": "dr_grpo", "args": {}},
            "loss": {
                "name": "prime_rl",
                "args": {"delta_low": 0.2, "delta_high": 0.2, "adv_tau": 1.0, "kl_tau": 1e-3},
                "average": "token",
            },
        },
    ),
    "verl_rollout_correction": (
        "verl 0.9.1, decoupled_geo_rs_token_tis; its threshold 0.999_1.001 bounds the inverse of the ratio here",
        {
            "advantage": {"args": {"eps": 1e-6, "std_ddof": 1}},
            "loss": {
                "name": "dual_clip",
                "args": {"clip_low": 0.2, "clip_high": 0.2, "c": 3.0},
                "average": "token",
                "rollout_correction": {"name": "token_truncate", "args": {"clip_min": None, "clip_max": 2.0}},
                "rejection": {"name": "geometric", "args": {"low": 1 / 1.001, "high": 1 / 0.999}},
            },
        },
    ),
}


def get_preset(name: str) -> dict[str, Any]:
    """Return the sections of a run configuration that the preset `name` sets.

    Raises:
        ConfigError: there is no such preset; the message lists them.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; {list_known(name, PRESETS)}")
    return merge(copy.deepcopy(_BASE), PRESETS[name][1])


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `under` with the keys of `over` on top, mapping by mapping.

    Where `over` names another function, the `args` of `under` are dropped, because they belong to the old function.
    """
    if "name" in over and over["name"] != under.get("name"):
        under = {key: value for key, value in under.items() if key != "args"}
    merged = dict(under)
    for key, value in over.items():
        both_mappings = isinstance(value, dict) and isinstance(under.get(key), dict)
        merged[key] = merge(under[key], value) if both_mappings else copy.deepcopy(value)
    return merged
