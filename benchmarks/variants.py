"""grpo, dr_grpo, dapo, gspo and cispo on configs/experiments/variants.yaml, three seeds each, one after the other.

    python benchmarks/variants.py [NAME ...] [--seeds 1,2,3] [section.key=value ...]

Of one seed the prompts, their order, the sampler's noise and LoRA's first weights are the same under every objective.
CUDA_VISIBLE_DEVICES divides the work over GPUs.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from grpo_core import load_config, train

PRESETS = {"grpo": "grpo_paper", "dr_grpo": "dr_grpo", "dapo": "dapo", "gspo": "gspo", "cispo": "cispo"}
OURS = ["loss.kl_coef=0", "truncation={name: zero_reward}"]  # of the task, whatever the preset says
OF = {"dapo": ["sampling.dynamic_attempts=3"]}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("--seeds", default="1,2,3")
    given = parser.parse_intermixed_args()
    names = [word for word in given.words if "=" not in word] or [*PRESETS]
    overrides = [word for word in given.words if "=" in word]
    for name in names:
        for seed in given.seeds.split(","):
            words = [f"preset={PRESETS[name]}", *OURS, *OF.get(name, []), f"seed={seed}", f"name=variant_{name}_{seed}"]
            train(load_config(ROOT / "configs" / "experiments" / "variants.yaml", [*words, *overrides]))
