"""A case of TRL's loss or advantages, computed by us through the trainer's own functions.

TRL's conventions, in our terms. It divides every micro-batch's loss by the accumulation count `gas`: our totals count
`gas` equal micro-batches. Its dapo, cispo and vespo divide by the generation batch's tokens * gas /
steps_per_generation: our totals.tokens. `epsilon_high` is cispo's cap. Its ratio-corrected KL takes the loss's ratio, at
the sequence level the sequence's: there the test brings its own KL, as a user would.
"""

from dataclasses import replace

import torch

from grpo_core.batch import Rollouts, TrainBatch
from grpo_core.config.sections import LossConfig, RunConfig, SamplingConfig
from grpo_core.model.policy import TokenStats
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.advantages import ADVANTAGES, compute_advantages
from grpo_core.objective.corrections import CORRECTIONS
from grpo_core.objective.kl import KLS, kl_k3
from grpo_core.objective.losses import LOSSES, sequence_ratio
from grpo_core.objective.token_weights import Totals
from grpo_core.training.control import first_control
from grpo_core.training.freeze import top_entropy_mask
from grpo_core.training.prepare import build_objective
from grpo_core.training.update import micro_loss

AVERAGE = {"grpo": "sequence", "sapo": "sequence", "bnpo": "micro_token", "dr_grpo": "constant", "luspo": "row_sum",
           "dapo": "token", "cispo": "token", "vespo": "token"}  # fmt: skip


def loss_case(config, inputs, meta):
    """(loss, d loss / d log-probs) of one case, float64."""
    t = {name: torch.tensor(values, dtype=torch.double) for name, values in inputs.items()}
    mask, logprobs = t["mask"].bool(), t["logps"].requires_grad_()
    kind, level = config["loss_type"], config.get("level", "token")
    clip_low = config.get("eps", 0.2)
    clip_high = config.get("eps_high", clip_low)
    if kind == "cispo":
        loss_fn = LOSSES.build("cispo", {"cap": clip_high})
    elif kind == "sapo":
        loss_fn = LOSSES.build("sapo", {"tau_neg": torch.tensor(1.05).item()})  # TRL rounds it to float32
    elif kind == "vespo":
        loss_fn = LOSSES.get("vespo")
    else:
        args = {"clip_low": clip_low, "clip_high": clip_high, "delta": config.get("delta_")}
        loss_fn = LOSSES.build("grpo" if level == "token" else "gspo", args)
    kl_fn = KLS.get("k3_corrected" if config.get("bias_kl", True) else "k3")
    if level == "sequence" and config.get("bias_kl", True):

        def kl_fn(logprobs, ref_logprobs, old_logprobs):
            return sequence_ratio(logprobs, old_logprobs, mask) * kl_k3(logprobs, ref_logprobs)

    loss = LossConfig(average=AVERAGE[kind], kl_coef=config.get("beta", 0.0), entropy_coef=config.get("ent_coef", 0.0),
                      off_policy_mask=config.get("opm"), top_entropy=config.get("quant", 1.0))  # fmt: skip
    correction = CORRECTIONS.get("none")
    if "vllm" in config:
        weights = torch.tensor(config["vllm"], dtype=torch.double)
        correction = lambda old, rollout, mask: weights  # noqa: E731
    config_of_run = RunConfig(loss=loss, sampling=SamplingConfig(max_new_tokens=meta["max_completion_length"]))
    objective = replace(build_objective(config_of_run), loss_fn=loss_fn, kl_fn=kl_fn, correction_fn=correction)
    rows, width = mask.shape
    prompt = torch.zeros(rows, 1, dtype=torch.long)
    ended = torch.zeros(rows, dtype=torch.bool)
    old = None if config.get("on_policy") else t["old_logps"]
    sampled = t["sampling_logps"] if "vllm" in config else logprobs.detach() if old is None else old  # TRL's choice
    rollouts = Rollouts(prompt, prompt.bool(), prompt.expand(rows, width), mask, sampled, ended)
    acting = top_entropy_mask(t["entropies"], mask, loss.top_entropy) if loss.top_entropy < 1 else None
    micro = TrainBatch(rollouts, t["advantages"][:, None], mask, acting, old, t["ref_logps"] if loss.kl_coef else None)
    gas, per_generation = config.get("gas", 1), config.get("spg", 1)
    totals = Totals(
        tokens=torch.tensor(config.get("n_items", meta["num_items_in_batch"]) * gas / per_generation),
        completions=torch.tensor(rows * gas), max_new_tokens=meta["max_completion_length"], micro_batches=gas,
        entropy_tokens=(mask if acting is None else acting).sum() * gas,
    )  # fmt: skip
    value = micro_loss(objective, micro, TokenStats(logprobs, t["entropies"]), totals, first_control(loss), Stats())
    value.backward()
    return value.item(), logprobs.grad


def advantage_case(case):
    """Our advantages [B] of one case, float32."""
    table = torch.tensor([[float("nan") if r is None else r for r in row] for row in case["rewards"]])  # [B, K]
    group_size, weights = case["num_generations"], torch.tensor(case.get("w") or [1.0] * table.shape[1])
    rewards = (table * weights).nansum(dim=1).masked_fill(table.isnan().all(dim=1), float("nan"))
    components = table.T.reshape(table.shape[1], -1, group_size)
    name = {"group": "grpo", "batch": "batch_std", "none": "dr_grpo"}[case.get("scale", "group")]
    if case.get("agg") == "normalize_then_sum":
        name = "gdpo"
    return compute_advantages(
        ADVANTAGES.get(name), rewards.view(-1, group_size), components=components, weights=weights
    ).flatten()
