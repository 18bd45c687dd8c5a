"""Train five objectives and a control on configs/experiments/variants.yaml, three seeds each, one after the other.

    python benchmarks/variants.py [NAME ...] [--seeds 1,2,3] [section.key=value ...]

The control, `one_step`, is grpo with one optimizer step on each step's completions instead of four.
Runs with the same seed have the same prompts, order of prompts, sampling noise and initial LoRA weights under every
objective. To use several GPUs, start one command per GPU with CUDA_VISIBLE_DEVICES and other names.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from grpo_core import load_config, train

CONFIG = ROOT / "configs" / "experiments" / "variants.yaml"
TASK_OVERRIDES = ["loss.kl_coef=0", "truncation={name: zero_reward}"]  # the same for every preset
VARIANTS = {
    "grpo": ["preset=grpo_paper"],
    "dr_grpo": ["preset=dr_grpo"],
    "dapo": ["preset=dapo", "sampling.dynamic_attempts=3"],
    "gspo": ["preset=gspo"],
    "cispo": ["preset=cispo"],
    "one_step": ["preset=grpo_paper", "trainer.num_minibatches=1"],
}


def make_overrides(name, seed):
    """Return the overrides of CONFIG for a run of the objective."""
    return [*VARIANTS[name], *TASK_OVERRIDES, f"seed={seed}", f"name=variant_{name}_{seed}"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("--seeds", default="1,2,3")
    options = parser.parse_intermixed_args()
    names = [word for word in options.words if "=" not in word] or [*VARIANTS]
    overrides = [word for word in options.words if "=" in word]
    for name in names:
        for seed in options.seeds.split(","):
            train(load_config(CONFIG, [*make_overrides(name, seed), *overrides]))
