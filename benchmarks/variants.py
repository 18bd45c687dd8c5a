"""Train five objectives and a control on configs/experiments/variants.yaml, three seeds each, one after the other.

    python benchmarks/variants.py [NAME ...] [--seeds 1,2,3] [section.key=value ...]
    python benchmarks/variants.py --check         every objective for one short step of the built-in model

The control, `one_step`, is grpo with one optimizer step on each step's completions instead of four.
Runs with the same seed have the same prompts, order of prompts, sampling noise and initial LoRA weights under every
objective. To use several GPUs, start one command per GPU with CUDA_VISIBLE_DEVICES and other names.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from grpo_core import load_config, train

CONFIG = ROOT / "configs" / "experiments" / "variants.yaml"
TASK_OVERRIDES = ["loss.kl_coef=0", "truncation={name: zero_reward}"]  # the same for every preset
SHORT = [
    "model.path=builtin:tiny", "data.prompt=template", "trainer.num_steps=1", "trainer.completions_per_step=16",
    "sampling.group_size=4", "sampling.max_new_tokens=8", "evaluation.num_tasks=4", "checkpoint.every=0",
]  # fmt: skip
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
    parser.add_argument("--check", action="store_true", help="train one short step with the built-in model")
    options = parser.parse_intermixed_args()
    if options.check:
        with tempfile.TemporaryDirectory() as folder:
            for name in VARIANTS:
                train(load_config(CONFIG, [*make_overrides(name, 1), *SHORT, f"output_dir={folder}"]))
        sys.exit()
    names = [word for word in options.words if "=" not in word] or [*VARIANTS]
    overrides = [word for word in options.words if "=" in word]
    for name in names:
        for seed in options.seeds.split(","):
            train(load_config(CONFIG, [*make_overrides(name, seed), *overrides]))
