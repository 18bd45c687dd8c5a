"""A case of verl's, prime-rl's, open-instruct's, AReaL's or NeMo-RL's functions, computed through the trainer's own.

`compute(source, config, inputs, meta)` returns in float64 every key that the file `source` records for the case; the
files in tests/fixtures say what the options mean. It raises NotImplementedError for what the product leaves out.
"""

import math
from dataclasses import replace

import torch

from grpo_core.batch import Frozen, Rollouts, TrainBatch
from grpo_core.config.sections import LossConfig, RunConfig, SamplingConfig, TeacherConfig
from grpo_core.model.policy import TokenStats
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.advantages import ADVANTAGES, center, compute_advantages
from grpo_core.objective.kl import KLS
from grpo_core.objective.losses import LOSSES, PolicyLoss
from grpo_core.objective.rejections import REJECTIONS
from grpo_core.objective.token_weights import Totals, token_weights
from grpo_core.training.control import first_control
from grpo_core.training.distillation import add_teacher_advantages
from grpo_core.training.prepare import build_objective
from grpo_core.training.update import micro_loss

VERL_AVERAGE = {  # loss_agg_mode -> loss.average; token-sum is a token mean over one token
    "token-mean": "token", "token-sum": "token", "seq-mean-token-sum": "row_sum", "seq-mean-token-mean": "sequence",
    "seq-mean-token-sum-norm": "constant",
}  # fmt: skip


def compute(source, config, inputs, meta):
    """Return {key: value} of one case."""
    t = {name: torch.tensor(values, dtype=torch.double) for name, values in inputs.items() if is_matrix(values)}
    if source == "verl_0_9_1" and config["kind"] in VERL:
        return VERL[config["kind"]](config, t)
    if source == "prime_rl" and config["kind"] == "loss":
        return prime_rl_loss(config, t)
    if source == "others" and config["kind"] == "areal" and config.get("m2_threshold"):
        return areal_m2po(config, t)
    raise NotImplementedError(config["kind"])


def is_matrix(values):
    """Whether an input is a number, a list, or a list of equal lists."""
    return not isinstance(values, list) or not values or not isinstance(values[0], list) or len({len(x) for x in values}) == 1


def verl_policy_loss(config, t):
    mode, low, high = config["loss_mode"], config.get("clip_ratio_low", 0.2), config.get("clip_ratio_high", 0.2)
    c = config.get("clip_ratio_c", 3.0)
    mask, average = t[config["mask"]].bool(), config.get("loss_agg_mode", "token-mean")
    if mode == "vanilla":
        loss_fn = LOSSES.build("dual_clip", {"clip_low": low, "clip_high": high, "c": c})
    elif mode in ("dppo_tv", "dppo_kl"):
        loss_fn = LOSSES.build(mode, {"delta_low": low, "delta_high": high, "cap": c})
    elif mode == "gspo":
        loss_fn = LOSSES.build("gspo_token", {"clip_low": low, "clip_high": high})
    elif mode == "sapo":
        loss_fn = LOSSES.build("sapo", {"tau_pos": config["tau_pos"], "tau_neg": config["tau_neg"]})
        average = "seq-mean-token-mean"
    elif mode == "gpg":
        loss_fn = LOSSES.get("reinforce")
    elif mode == "dro":
        loss_fn = LOSSES.build("dro", {"beta": config["dro_beta"]})
    elif mode == "cispo":
        loss_fn = LOSSES.build("cispo", {"floor": 1 - low, "cap": 1 + high})
    elif mode == "geo_mean":
        loss_fn, average = LOSSES.build("gmpo", {"clip_low": low, "clip_high": high}), "seq-mean-token-mean"
    else:
        raise NotImplementedError(mode)
    info = config.get("global_batch_info", {})
    tokens = info.get("batch_num_tokens", 1 if average == "token-sum" else int(mask.sum()))
    completions = info.get("global_batch_size", len(mask) if mode == "geo_mean" else int(mask.any(dim=1).sum()))
    width = info.get("loss_scale_factor", mask.shape[1])
    totals = Totals(torch.tensor(float(tokens)), torch.tensor(float(completions)), width)
    old = t[config["old"]]
    weights = t[config["rollout_is_weights"]] if config.get("rollout_is_weights") else None
    if weights is not None and mode == "geo_mean":  # the row's geometric mean
        weights = (((weights + 1e-10).log() * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).exp()
    value, gradient = loss_and_gradient(
        loss_fn, t["logps"], old, old, t[config["advantages"]], mask, VERL_AVERAGE[average], totals, weights=weights
    )
    scale = info.get("dp_size", 1)  # verl multiplies by it, because its engine averages over ranks
    return {"loss": scale * value, "grad": scale * gradient}


def verl_kl(config, t):
    mask, logprobs = t[config["mask"]].bool(), t["logps"].requires_grad_()
    name = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}.get(config["kl_penalty"], config["kl_penalty"])
    per_token = KLS.get(name)(logprobs, t["ref_logps"], logprobs.detach())
    totals = Totals(mask.sum(), mask.any(dim=1).sum(), mask.shape[1])
    weights = token_weights(mask, average=VERL_AVERAGE[config["loss_agg_mode"]], totals=totals, dtype=torch.double)
    loss = (per_token * weights).sum()
    loss.backward()
    return {"loss": loss.item(), "grad": logprobs.grad, "per_token": per_token.detach()}


def verl_rejection(config, t):
    """Every part must hold. verl's bounds of k1 are on 1 / v: log a <= -log v <= log b, and b alone means from 1 / b."""
    mask, old, rollout = t[config["mask"]].bool(), t[config["old"]], t[config["rollout"]]
    kept = mask
    names, bounds = config["rollout_rs"].split(","), str(config["rollout_rs_threshold"]).split(",")
    for name, bound in zip(names, bounds if len(bounds) == len(names) else bounds * len(names), strict=True):
        level, *over, estimator = name.split("_")
        if estimator == "k1":
            high, low = [float(x) for x in reversed(bound.split("_"))] if "_" in bound else (float(bound), 1 / float(bound))
            args = {"low": -math.log(high), "high": -math.log(low)}
        else:
            args = {"high": float(bound)}
        args |= {"estimator": estimator} | ({"over": over[0]} if over else {})
        reject = REJECTIONS.build({"token": "token", "seq": "sequence"}[level], args)
        kept = kept & reject(old, rollout, t["advantages"][:, None], mask)
    return {"mask": kept}


def verl_advantage(config, t):
    """[N, G], or [n] of groups of different sizes: there a row is filled up with NaN, a completion without a reward."""
    name = config["adv_estimator"]
    if name == "gpg":
        raise NotImplementedError("its factor counts completions whose raw reward is not 0")
    if "index" in config:
        return {"advantages": uneven_advantages(config, t)}
    rewards = t[config["rewards"]] if "rewards" in config else t[config["components"]].sum(dim=0)
    lengths = t[config["mask"]].sum(dim=1).view_as(rewards)
    if name in ("gdpo", "reinforce_plus_plus_baseline"):
        # verl whitens all tokens, those of tied groups too, which here have advantage 0: so by the whitening without a group
        values = center(rewards)[0]
        if name == "gdpo":
            normalise = ADVANTAGES.build("grpo", {"eps": 1e-6})
            parts = [w * normalise(x) for w, x in zip(config["gdpo_reward_weights"], t[config["components"]], strict=True)]
            values = torch.stack(parts).sum(dim=0)
        whiten = ADVANTAGES.build("reinforce_plus_plus", {"eps": 1e-8, "over": "tokens"})
        return {"advantages": compute_advantages(whiten, values, lengths=lengths)}
    return {"advantages": compute_advantages(verl_function(config), rewards, lengths=lengths)}


def verl_function(config):
    by_std = config.get("norm_adv_by_std_in_grpo", True)
    return {
        "grpo": ADVANTAGES.build("grpo", {"eps": 1e-6}) if by_std else ADVANTAGES.get("dr_grpo"),
        "grpo_vectorized": ADVANTAGES.build("grpo", {"eps": 1e-6}),
        "rloo": ADVANTAGES.get("rloo"),
        "rloo_vectorized": ADVANTAGES.get("rloo"),
        "opo": ADVANTAGES.get("opo"),
        "grpo_passk": ADVANTAGES.build("grpo_passk", {"eps": 1e-6}) if by_std else ADVANTAGES.get("pass_at_k"),
    }[config["adv_estimator"]]


def uneven_advantages(config, t):
    """A group of one has advantage r in verl (mean 0, standard deviation 1). Here it is 0: it is compared with nothing."""
    rewards, groups = t["uneven_rewards"], t["uneven_index"].long()
    values = torch.empty_like(rewards)
    for group in groups.unique():
        own = groups == group
        padded = torch.cat([rewards[own], torch.full((2,), math.nan).double()])[None]
        values[own] = compute_advantages(verl_function(config), padded)[0, : int(own.sum())]
        if own.sum() == 1:
            values[own] = rewards[own] / (1 + 1e-6 * (config["adv_estimator"] == "grpo"))
    return values


VERL = {
    "policy_loss": verl_policy_loss, "kl_penalty": verl_kl, "rollout_rs": verl_rejection, "advantage": verl_advantage,
}  # fmt: skip


def areal_m2po(config, t):
    mask, old, rollout = t[config["mask"]].bool(), t[config["proximal"]], t[config["behaviour"]]
    reject = REJECTIONS.build("m2po", {"threshold": config["m2_threshold"]})
    mask = mask & reject(old, rollout, t["advantages"][:, None], mask)
    low, high = config["eps_clip"], config["eps_clip_higher"] or config["eps_clip"]
    totals = Totals(mask.sum(), torch.tensor(len(mask)), mask.shape[1])
    value, gradient = loss_and_gradient(
        LOSSES.build("grpo", {"clip_low": low, "clip_high": high}), t["logps"], old, rollout, t[config["advantages"]],
        mask, "token", totals,
    )  # fmt: skip
    return {"loss": value, "grad": gradient, "mask": mask}


def prime_rl_loss(config, t):
    options, mask = config["loss"], t[config["mask"]].bool()
    shared = {"adv_tau": options["adv_tau"], "kl_tau": options["kl_tau"]}
    if options["type"] == "default":
        deltas = {"delta_low": options["dppo_mask_low"], "delta_high": options["dppo_mask_high"]}
        loss_fn = LOSSES.build("prime_rl", {**deltas, **shared})
    else:
        loss_fn = LOSSES.build("ipo", {"threshold": options["ipo_threshold"], **shared})
    weights = None
    if config.get("rl_weights"):  # a token of weight 0 is not trained
        weights = t[config["rl_weights"]]
        mask = mask & (weights != 0)
    parts = [(loss_fn, t[config["advantages"]], mask, weights, config["rl_scale"])]
    for name, part_fn, part_advantages in (
        ("ref_kl", prime_rl_ref_kl, teacher_advantages(t["ref_logps"], t["logps"])),
        ("ce", LOSSES.get("reinforce"), torch.ones(len(mask))),
    ):
        if config.get(f"{name}_weights"):  # of the tokens of other samples, whatever the mask says
            weights = t[config[f"{name}_weights"]]
            parts.append((part_fn, part_advantages, weights != 0, weights, config[f"{name}_scale"]))
    value, gradient = 0.0, torch.zeros_like(t["logps"])
    for part_fn, advantages, tokens, weights, scale in parts:
        totals = Totals(torch.tensor(float(scale)), torch.tensor(float(len(mask))), mask.shape[1])
        part_value, part_gradient = loss_and_gradient(
            part_fn, t["logps"], t["logps"].detach(), t["rollout_logps"], advantages, tokens, "token", totals, weights=weights
        )
        value, gradient = value + part_value, gradient + part_gradient
    return {"loss": value, "grad": gradient}


def prime_rl_ref_kl(logprobs, old_logprobs, advantages, completion_mask, rollout_logprobs):
    """-keep A r + 1e-3 d^2, r = e^d, d = l - l_roll; keep does not ask for the sign of A"""
    d = logprobs - rollout_logprobs
    keep = (logprobs.exp() - rollout_logprobs.exp()).detach() >= -0.2
    return PolicyLoss(-advantages * keep * d.exp() + 1e-3 * d.square())


def teacher_advantages(teacher_logprobs, logprobs):
    """l_teacher - l by the trainer's own function, for all tokens."""
    everywhere = torch.ones_like(logprobs, dtype=torch.bool)
    objective = build_objective(RunConfig(teacher=TeacherConfig(path="another")))
    frozen = Frozen(None, everywhere, logprobs=logprobs.detach(), teacher_logprobs=teacher_logprobs)
    return add_teacher_advantages(objective, frozen, torch.zeros(len(logprobs), 1, dtype=logprobs.dtype))


def loss_and_gradient(loss_fn, logprobs, old, rollout, advantages, mask, average, totals, *, weights=None):
    """Return a loss and its gradient for the log-probs, by the update's own micro_loss; `weights` multiply the surrogate."""
    logprobs = logprobs.clone().requires_grad_()
    rows, width = mask.shape
    prompt, ended = torch.zeros(rows, 1, dtype=torch.long), torch.zeros(rows, dtype=torch.bool)
    rollouts = Rollouts(prompt, prompt.bool(), prompt.expand(rows, width), mask, rollout, ended)
    config = RunConfig(loss=LossConfig(average=average, kl_coef=0.0), sampling=SamplingConfig(max_new_tokens=width))
    objective = replace(build_objective(config), loss_fn=loss_fn, correction_fn=lambda old, rollout, mask: weights)
    batch = TrainBatch(rollouts, advantages if advantages.dim() == 2 else advantages[:, None], mask, None, old)
    value = micro_loss(objective, batch, TokenStats(logprobs, torch.zeros_like(old)), totals, first_control(config.loss), Stats())
    value.backward()
    return value.item(), logprobs.grad
