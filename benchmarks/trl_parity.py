"""Compare loss and gradient with TRL 1.16's own code on random batches and random combinations of its switches, in float64.

    pip install --no-deps trl==1.16.0 accelerate        (only the benchmarks need them)
    python benchmarks/trl_parity.py [TRIALS]
    python benchmarks/trl_parity.py --check       20 trials, on grpo_core's side alone where TRL is missing; records nothing

A trial draws log-probs, masks, advantages and a configuration: loss type, level of the ratio, clipping, delta, KL with and
without correction, top-entropy, off-policy mask, entropy bonus, rollout correction, accumulation. TRL's side is its
_compute_loss with the drawn log-probs in place of the model's forward. grpo_core's side is micro_loss of training/update.
"""

import importlib.util
import json
import random
import sys
from collections import defaultdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from trl_cases import loss_case

RATIO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
KINDS = (*RATIO_LOSSES, "cispo", "sapo", "vespo")


class OneProcess:
    """Replace the accelerator of TRL's trainer, for one process, with the attributes and methods that the loss uses."""

    num_processes, sync_gradients = 1, True

    def gather(self, values):
        return values

    gather_for_metrics = gather

    def reduce(self, values, reduction="sum"):
        return values

    def pad_across_processes(self, values, **kwargs):
        return values


def compute_trl_loss(config, inputs, meta):
    """Return the loss and its gradient for the log-probs, computed by TRL."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    t = {name: torch.tensor(values, dtype=torch.double) for name, values in inputs.items()}
    logprobs = t["logps"].requires_grad_()
    trainer = object.__new__(GRPOTrainer)
    trainer.__dict__.update(
        loss_type=config["loss_type"], importance_sampling_level=config.get("level", "token"), epsilon_low=config.get("eps", 0.2),
        epsilon_high=config.get("eps_high", config.get("eps", 0.2)), beta=config.get("beta", 0.0),
        top_entropy_quantile=config.get("quant", 1.0), off_policy_mask_threshold=config.get("opm"), use_vllm="vllm" in config,
        vllm_importance_sampling_correction=True, aux_loss_enabled=False, max_completion_length=meta["max_completion_length"],
        current_gradient_accumulation_steps=config.get("gas", 1), _entropy_bonus_enabled="ent_coef" in config,
        entropy_coef=config.get("ent_coef", 0.0), use_adaptive_entropy=False, accelerator=OneProcess(),
        model=SimpleNamespace(training=True), _logs=defaultdict(list), _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(
            delta=config.get("delta_"), use_bias_correction_kl=config.get("bias_kl", True), sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05, vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
            steps_per_generation=config.get("spg", 1),
        ),
    )  # fmt: skip
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logprobs, t["entropies"], None)
    ids = torch.zeros(t["mask"].shape, dtype=torch.long)
    batch = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": t["mask"],
        "advantages": t["advantages"], "ref_per_token_logps": t["ref_logps"],
        "num_items_in_batch": torch.tensor(config["n_items"]),
    }  # fmt: skip
    if not config.get("on_policy"):
        batch["old_per_token_logps"] = t["old_logps"]
    if "vllm" in config:
        batch["importance_sampling_ratio"] = torch.tensor(config["vllm"], dtype=torch.double)
        batch["sampling_per_token_logps"] = t["sampling_logps"]
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), logprobs.grad


def draw_case(seed):
    """Draw a configuration and a batch; return (config, inputs, meta) as `loss_case` takes them."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, width = rng.choice([(4, 6), (3, 9), (8, 5)])
    mask = (torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=generator)).double()

    def noise(scale):
        return scale * torch.randn(rows, width, generator=generator, dtype=torch.double)

    old = -2 * torch.rand(rows, width, generator=generator, dtype=torch.double) - 0.3
    inputs = {"logps": old + noise(rng.choice([0.05, 0.4, 1.2])), "old_logps": old, "ref_logps": old + noise(0.3)}
    inputs |= {"sampling_logps": old + noise(0.05), "entropies": noise(1.0).abs(), "mask": mask}
    inputs["advantages"] = noise(1.0)[:, 0]
    config = {"loss_type": rng.choice(KINDS)}
    for key, chance, values in (
        ("beta", 0.5, [0.1]), ("bias_kl", 0.5, [False]), ("eps", 0.3, [0.1]), ("quant", 0.3, [0.2, 0.5]), ("opm", 0.3, [-0.1, 0.05]),
        ("ent_coef", 0.3, [0.01]), ("gas", 0.3, [2, 4]), ("spg", 0.3, [2, 4]), ("on_policy", 0.2, [True]),
    ):  # fmt: skip
        if rng.random() < chance:
            config[key] = rng.choice(values)
    if rng.random() < 0.4:
        config["eps_high"] = 5.0 if config["loss_type"] == "cispo" else rng.choice([0.28, 0.5])
    if config["loss_type"] in RATIO_LOSSES:
        if rng.random() < 0.3:
            config["level"] = "sequence"
        if rng.random() < 0.2:
            config["delta_"] = 1.7
    if rng.random() < 0.3:
        gap = (old - inputs["sampling_logps"]) * mask
        ratio = (gap if rng.random() < 0.5 else gap.sum(dim=1, keepdim=True)).exp()
        inside = (ratio > 0.9) & (ratio < 1.1)
        config["vllm"] = (ratio.clamp(0.9, 1.1) if rng.random() < 0.5 else ratio * inside).tolist()
    config["n_items"] = float(mask.sum()) * config.get("spg", 1)
    meta = {"max_completion_length": width + 2, "num_items_in_batch": float(mask.sum())}
    return config, {name: values.tolist() for name, values in inputs.items()}, meta


def check():
    """Compare 20 trials where TRL is installed; elsewhere compute their loss and gradient on this side."""
    if importlib.util.find_spec("trl"):
        assert compare(20)["met"]
        return
    for seed in range(20):
        loss, gradient = loss_case(*draw_case(seed))
        assert torch.isfinite(torch.as_tensor(loss)) and gradient.isfinite().all(), seed


def compare(trials):
    """Compare `trials` random cases; return the row of the largest difference."""
    worst, combinations = 0.0, set()
    for seed in range(trials):
        config, inputs, meta = draw_case(seed)
        (loss, gradient), (our_loss, our_gradient) = compute_trl_loss(config, inputs, meta), loss_case(config, inputs, meta)
        gap = max(abs(loss - our_loss), float((gradient - our_gradient).abs().max())) / max(1.0, abs(loss))
        if gap > 1e-8:
            print(f"seed {seed} differs by {gap:.3g}:", {key: value for key, value in config.items() if key != "vllm"})
        worst = max(worst, gap)
        combinations.add((config["loss_type"], *sorted(config.keys() - {"n_items"})))
    return {
        "bench": "trl_parity", "workload": f"{trials} random batches, {len(combinations)} combinations of switches", "ours": worst,
        "unit": "largest difference of loss or gradient", "reach": 1e-7, "met": worst < 1e-7,
        "versions": {"trl": version("trl"), "torch": torch.__version__}, "date": str(date.today()),
    }  # fmt: skip


def main(trials):
    row = compare(trials)
    print(json.dumps(row))
    path = Path(__file__).parent / "results" / "trl_parity.json"
    path.write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(check())
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
