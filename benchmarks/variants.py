"""Five objectives on configs/experiments/variants.yaml and a control, three seeds each, one after the other.

    python benchmarks/variants.py [NAME ...] [--seeds 1,2,3] [section.key=value ...]

The control, `one_step`, is grpo with one optimizer step on each step's completions instead of four.
Of one seed the prompts, their order, the sampler's noise and LoRA's first weights are the same under every objective.
CUDA_VISIBLE_DEVICES divides the work over GPUs.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from grpo_core import load_config, train

CONFIG = ROOT / "configs" / "experiments" / "variants.yaml"
OURS = ["loss.kl_coef=0", "truncation={name: zero_reward}"]  # of the task, whatever the preset says
VARIANTS = {
    "grpo": ["preset=grpo_paper"],
    "dr_grpo": ["preset=dr_grpo"],
    "dapo": ["preset=dapo", "sampling.dynamic_attempts=3"],
    "gspo": ["preset=gspo"],
    "cispo": ["preset=cispo"],
    "one_step": ["preset=grpo_paper", "trainer.num_minibatches=1"],
}

def words(name, seed):
    """What a run of the objective changes in CONFIG."""
    return [*VARIANTS[name], *OURS, f"seed={seed}", f"name=variant_{name}_{seed}"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("--seeds", default="1,2,3")
    given = parser.parse_intermixed_args()
    names = [word for word in given.words if "=" not in word] or [*VARIANTS]
    overrides = [word for word in given.words if "=" in word]
    for name in names:
        for seed in given.seeds.split(","):
            train(load_config(CONFIG, [*words(name, seed), *overrides]))
