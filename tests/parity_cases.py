"""A case of verl's, prime-rl's, open-instruct's, AReaL's or NeMo-RL's functions, computed through the trainer's own.

`compute(source, config, inputs, meta)` returns in float64 every key that the file `source` records for the case; the
files in tests/fixtures say what the options mean. It raises NotImplementedError for what the product leaves out.
"""

import functools
import math
from dataclasses import replace

import torch

from grpo_core.batch import Frozen, Rollouts, TrainBatch
from grpo_core.config.sections import LossConfig, RunConfig, SamplingConfig, TeacherConfig
from grpo_core.model.policy import TokenStats
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.advantages import ADVANTAGES, center, compute_advantages
from grpo_core.objective.corrections import CORRECTIONS, sampler_distances
from grpo_core.objective.inputs import select_tokens
from grpo_core.objective.kl import KLS
from grpo_core.objective.losses import LOSSES, PolicyLoss
from grpo_core.objective.policy_loss import row_mean, token_ratio
from grpo_core.objective.rejections import REJECTIONS
from grpo_core.objective.returns import (
    close_gaps,
    discounted_returns,
    open_gaps,
    place_at_end,
    token_baseline,
    whiten_tokens,
)
from grpo_core.objective.token_weights import Totals, token_weights
from grpo_core.objective.truncation import penalize_length, soft_overlong_penalty
from grpo_core.random_keys import make_key
from grpo_core.training.control import first_control, next_kl_coef
from grpo_core.training.cross_row_masks import add_cross_row_masks
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
    kinds = {"verl_0_9_1": VERL, "prime_rl": PRIME_RL, "others": OTHERS}[source]
    if config["kind"] not in kinds:
        raise NotImplementedError(config["kind"])
    return kinds[config["kind"]](config, t)


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
    elif mode == "clip_cov":
        bounds = {"share": config["clip_cov_ratio"], "cov_low": config["clip_cov_lb"], "cov_high": config["clip_cov_ub"]}
        loss_fn = LOSSES.build("clip_cov", {"clip_low": low, "clip_high": high, **bounds})
    elif mode == "kl_cov":
        loss_fn = LOSSES.build("kl_cov", {"share": config["kl_cov_ratio"], "kl_coef": config["ppo_kl_coef"]})
    else:
        raise NotImplementedError(mode)
    totals = verl_totals({**config, "loss_agg_mode": average}, mask, counts_empty=mode == "geo_mean")
    old, info = t[config["old"]], config.get("global_batch_info", {})
    weights = t[config["rollout_is_weights"]] if config.get("rollout_is_weights") else None
    if weights is not None and mode == "geo_mean":  # the row's geometric mean
        weights = (((weights + 1e-10).log() * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).exp()
    value, gradient = loss_and_gradient(
        loss_fn, t["logps"], old, old, t[config["advantages"]], mask, VERL_AVERAGE[average], totals, weights=weights
    )
    scale = info.get("dp_size", 1)  # verl multiplies by it, because its engine averages over ranks
    return {"loss": scale * value, "grad": scale * gradient}


def verl_totals(config, mask, counts_empty=False):
    """What an average of verl divides by; a token sum is a token mean over one token."""
    info, average = config.get("global_batch_info", {}), config.get("loss_agg_mode", "token-mean")
    tokens = info.get("batch_num_tokens", 1 if average == "token-sum" else int(mask.sum()))
    if average == "token-sum":
        tokens = 1
    completions = info.get("global_batch_size", len(mask) if counts_empty else int(mask.any(dim=1).sum()))
    if counts_empty:  # geo_mean asks for no counts
        completions = len(mask)
    width = info.get("loss_scale_factor", mask.shape[1])
    return Totals(torch.tensor(float(tokens)), torch.tensor(float(completions)), width)


def verl_kl_of(name):
    """The estimator; verl also cuts the value of k3 to +-10, where l and l_ref are far apart."""
    known = {"kl": "k1", "mse": "k2", "low_var_kl": "k3", "low_var_kl+": "k3+", "kl+": "k1+"}.get(name, name)
    if known not in ("k3", "k3+"):
        return KLS.get(known)

    def cut(logprobs, ref_logprobs, old_logprobs):
        value = KLS.get("k3")(logprobs, ref_logprobs).clamp(-10, 10)
        if known == "k3":
            return value
        straight = KLS.get("k2")(logprobs, ref_logprobs)
        return straight + (value - straight).detach()

    return cut


def verl_kl(config, t):
    mask, logprobs = t[config["mask"]].bool(), t["logps"].requires_grad_()
    per_token = verl_kl_of(config["kl_penalty"])(logprobs, t["ref_logps"], logprobs.detach())
    totals = verl_totals(config, mask)
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


def verl_weights(config, old, rollout, mask):
    """verl's `rollout_is`: the weights, [B, C], and the names of its metrics."""
    if not config.get("rollout_is"):
        return None, {}
    level, threshold = config["rollout_is"], str(config["rollout_is_threshold"])
    low, high = ([float(x) for x in threshold.split("_")]) if "_" in threshold else (None, float(threshold))
    name = f"{level}_{'mask' if '_' in threshold else 'truncate'}"
    weights = CORRECTIONS.build(name, {"clip_min": low, "clip_max": high})(old, rollout, mask)
    raw = CORRECTIONS.build(f"{level}_truncate", {"clip_max": None})(old, rollout, mask)
    spread, counted = weights.expand_as(mask), mask if level == "token" else mask.any(dim=1, keepdim=True)
    stats = Stats()
    stats.add_weights("rollout_is_mean", spread, mask)
    row = stats.reduce()
    extremes = (weights if level == "token" else raw)[counted]
    metrics = {
        "rollout_is_mean": row["rollout_is_mean"], "rollout_is_eff_sample_size": row["rollout_is_mean_ess"],
        "rollout_is_max": extremes.max().item(), "rollout_is_min": extremes.min().item(),
    }  # fmt: skip
    if config.get("rollout_is_batch_normalize"):
        spread = spread * scale_of(weights, old, rollout, mask)
    return spread * mask, metrics


def scale_of(weights, old, rollout, mask):
    """The factor of loss.normalize_correction, by the update's own stage."""
    objective = replace(build_objective(RunConfig()), correction_fn=lambda *_: weights, normalize_correction=True)
    batch = replace(make_batch(rollout, torch.zeros(len(mask), 1), mask), frozen_logprobs=old)
    return add_cross_row_masks(None, objective, None, batch, make_key("selection", 0), Stats(), is_first=True).correction_scale


def verl_rollout_is(config, t):
    mask = t[config["mask"]].bool()
    weights, metrics = verl_weights(config, t[config["old"]], t[config["rollout"]], mask)
    return {"weights": weights, "metrics": metrics}


def verl_corrected(config, t):
    """Weights on the whole mask, then rejections, then the clipped loss with both."""
    mask, old, rollout = t[config["mask"]].bool(), t[config["old"]], t[config["rollout"]]
    weights, _ = verl_weights(config, old, rollout, mask)
    keep = verl_rejection(config, t)["mask"] if config.get("rollout_rs") else mask
    inner = {**t, "keep": keep, "weights": weights}
    out = verl_policy_loss({**config, "mask": "keep", "rollout_is_weights": "weights" if weights is not None else None}, inner)
    return {**out, "weights": weights, "mask": keep}


def verl_bypass(config, t):
    """`old` is the sampler's, and the policy's own log-probs are compared with it; no gradient through weights and masks."""
    mask, rollout, current = t[config["mask"]].bool(), t[config["old"]], t["logps"].detach()
    weights, _ = verl_weights(config, current, rollout, mask)
    keep = mask
    if config.get("rollout_rs"):
        keep = verl_rejection({**config, "old": "current", "rollout": config["old"]}, {**t, "current": current})["mask"]
    if config["loss_type"] == "ppo_clip":
        return verl_policy_loss({**config, "loss_mode": "vanilla", "mask": "keep"}, {**t, "keep": keep})
    names = {"mask": "keep", "loss_mode": "gpg", "rollout_is_weights": None if weights is None else "weights"}
    return verl_policy_loss({**config, **names}, {**t, "keep": keep, "weights": weights})


def verl_actor(config, t):
    """The surrogate, less the entropy and with the KL, all averaged alike."""
    mask = t[config["mask"]].bool()
    out, info = verl_policy_loss(config, t), config.get("global_batch_info", {})
    loss, gradient, scale = out["loss"], out["grad"], info.get("dp_size", 1)
    average = VERL_AVERAGE[config.get("loss_agg_mode", "token-mean")]
    weights = token_weights(mask, average=average, totals=verl_totals(config, mask), dtype=torch.double)
    entropy_weights = -config.get("entropy_coeff", 0.0) * scale * weights
    loss = loss + (entropy_weights * t["entropies"]).sum().item()
    if config.get("use_kl_loss"):
        logprobs = t["logps"].clone().requires_grad_()
        kl = verl_kl_of(config["kl_loss_type"])(logprobs, t["ref_logps"], logprobs.detach())
        term = config["kl_loss_coef"] * scale * (kl * weights).sum()
        loss, gradient = loss + term.item(), gradient + torch.autograd.grad(term, logprobs)[0]
    return {"loss": loss, "grad": gradient, "grad_entropies": entropy_weights}


def verl_off_policy_metrics(config, t):
    mask, old, rollout = t[config["mask"]].bool(), t[config["old"]], t[config["rollout"]]
    distances = {name: (x * mask).sum() / mask.sum() for name, x in sampler_distances(old, rollout, mask).items()}
    trained, sampled = (-row_mean(x, mask)[:, 0] for x in (old, rollout))
    products = CORRECTIONS.build("sequence_truncate", {"clip_max": None})(old, rollout, mask)
    gaps = trained - sampled
    return {"metrics": {
        "training_ppl": trained.exp().mean().item(), "training_log_ppl": trained.mean().item(),
        "kl": ((rollout - old) * mask).sum().item() / mask.sum().item(), "k3_kl": distances["rollout_kl"].item(),
        "rollout_ppl": sampled.exp().mean().item(), "rollout_log_ppl": sampled.mean().item(),
        "log_ppl_diff": gaps.mean().item(), "log_ppl_abs_diff": gaps.abs().mean().item(),
        "log_ppl_diff_max": gaps.max().item(), "log_ppl_diff_min": gaps.min().item(),
        "ppl_ratio": gaps.exp().mean().item(), "chi2_token": distances["rollout_chi2"].item(),
        "chi2_seq": products.square().mean().item() - 1,
    }}  # fmt: skip


def verl_kl_controller(config, t):
    values, coef = [], config["kl_coef"]
    for kl in config["current_kl"]:
        coef = next_kl_coef(coef, kl, target=config["target_kl"], horizon=config["horizon"], completions=config["n_steps"])
        values.append(coef)
    return {"values": values}


def verl_token_advantage(config, t):
    """Returns of rewards at tokens, [N G, T]."""
    name, mask = config["adv_estimator"], t[config["mask"]].bool()
    if name == "remax":
        raise NotImplementedError("remax stays out")
    rewards = t[config["rewards"]]
    groups = len(t["rewards"])
    if rewards.numel() != mask.numel():  # one for each completion
        groups, rewards = len(rewards), place_at_end(rewards.flatten(), mask)
    if name == "reinforce_plus_plus":
        returns = discounted_returns(rewards, mask, config["gamma"])
        return {"advantages": whiten_tokens(returns, mask), "returns": returns}
    weights = t[config["rollout_is_weights"]] if config.get("rollout_is_weights") else torch.ones_like(rewards)
    rows = [discounted_returns(rewards, mask), t[config["old"]], t["sum_pi_squared"], weights, mask]
    if name.startswith("tir"):
        rows = [close_gaps(x, mask) for x in rows]
    grouped = [x.unflatten(0, (groups, -1)) for x in rows]
    baseline = token_baseline(*grouped).expand_as(grouped[0])
    if config["handle_zero_tail"]:
        lengths = grouped[-1].sum(dim=2)
        second = lengths.topk(2, dim=1).values[:, 1:, None]
        longest = torch.zeros_like(lengths, dtype=torch.bool).scatter(1, lengths.argmax(dim=1, keepdim=True), True)[..., None]
        beyond = torch.arange(mask.shape[1]) >= second
        baseline = torch.where(longest & beyond, 0.0, baseline)
    advantages = torch.where(grouped[-1], grouped[0] - baseline, 0.0).flatten(0, 1)
    if name.startswith("tir"):
        advantages = open_gaps(advantages, mask)
    everywhere = discounted_returns(rewards * mask, torch.ones_like(mask))  # recorded at masked tokens too
    return {"advantages": advantages, "returns": everywhere}


VERL = {
    "policy_loss": verl_policy_loss, "kl_penalty": verl_kl, "rollout_rs": verl_rejection, "advantage": verl_advantage,
    "rollout_is": verl_rollout_is, "corrected_policy_loss": verl_corrected, "bypass_loss": verl_bypass,
    "actor_loss": verl_actor, "offpolicy_metrics": verl_off_policy_metrics, "kl_controller": verl_kl_controller,
    "token_advantage": verl_token_advantage,
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
    """Three parts, each with its own token weights and its own denominator."""
    options, mask = config["loss"], t[config["mask"]].bool()
    shared = {"adv_tau": options["adv_tau"], "kl_tau": options["kl_tau"]}
    if options["type"] == "default":
        deltas = {"delta_low": options["dppo_mask_low"], "delta_high": options["dppo_mask_high"]}
        loss_fn = LOSSES.build("prime_rl", {**deltas, **shared})
    else:
        loss_fn = LOSSES.build("ipo", {"threshold": options["ipo_threshold"], **shared})
    logprobs, part = t["logps"], functools.partial(prime_rl_part, t)
    loss, gradient = part(loss_fn, t[config["advantages"]], mask, config.get("rl_weights"), config["rl_scale"])
    if config.get("ref_kl_weights"):  # the advantage is that of a teacher; tokens are dropped below the sampler alone
        teacher = teacher_advantages(t["ref_logps"], logprobs)
        value, slope = part(prime_rl_ref_kl, teacher, None, config["ref_kl_weights"], config["ref_kl_scale"])
        loss, gradient = loss + value, gradient + slope
    if config.get("ce_weights"):
        ones = torch.ones_like(logprobs)
        value, slope = part(LOSSES.get("reinforce"), ones, None, config["ce_weights"], config["ce_scale"])
        loss, gradient = loss + value, gradient + slope
    return {"loss": loss, "grad": gradient}


def prime_rl_part(t, loss_fn, advantages, mask, weights, scale):
    """One part of the loss and its gradient; a token of weight 0 is not trained, and without a mask the others are."""
    weights = t[weights] if weights else None
    if weights is not None:
        mask = (weights != 0) if mask is None else mask & (weights != 0)
    totals = Totals(torch.tensor(float(scale)), torch.tensor(float(len(mask))), mask.shape[1])
    rollout, logprobs = t["rollout_logps"], t["logps"]
    return loss_and_gradient(
        loss_fn, logprobs, logprobs.detach(), rollout, advantages, mask, "token", totals, weights=weights
    )


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


def prime_rl_advantage(config, t):
    if "version" in config:
        raise NotImplementedError("v0.5.0 and v0.6.0 stay out")
    rewards = t[config["rewards"]]
    if config["type"] == "max_rl":
        return {"advantages": compute_advantages(ADVANTAGES.get("maxrl"), rewards)}
    if config["type"] != "grpo":
        raise NotImplementedError(config["type"])
    if penalty := config.get("length_penalty"):
        inputs = t["total_tokens"] - t["output_tokens"]
        lengths = {"num_output_tokens": t["output_tokens"], "num_input_tokens": inputs, "num_turns": t["turns"]}
        shares = [penalize_length(rewards, x, penalty.get(f"{name}_weight", 0.0)) - rewards for name, x in lengths.items()]
        rewards = rewards + sum(shares)
    return {"advantages": compute_advantages(ADVANTAGES.get("dr_grpo"), rewards)}


def make_batch(rollout, advantages, mask, old=None, ref=None, surrogate_mask=None, rewards=None):
    """The batch of an update."""
    rows, width = mask.shape
    prompt, ended = torch.zeros(rows, 1, dtype=torch.long), torch.zeros(rows, dtype=torch.bool)
    rollouts = Rollouts(prompt, prompt.bool(), prompt.expand(rows, width), mask, rollout, ended)
    advantages = advantages if advantages.dim() == 2 else advantages[:, None]
    return TrainBatch(rollouts, advantages, mask, surrogate_mask, old, ref, rewards)


def loss_and_gradient(
    loss_fn, logprobs, old, rollout, advantages, mask, average, totals,
    *, weights=None, kl=None, ref=None, surrogate_mask=None, **objective_fields,
):  # fmt: skip
    """Return a loss and its gradient for the log-probs, by the update's own micro_loss.

    `weights` multiply the surrogate; `kl` is (coefficient, estimator). The rest are fields of Objective, and `rewards`.
    """
    logprobs = logprobs.clone().requires_grad_()
    coef, kl_fn = kl or (0.0, KLS.get("k3"))
    width = mask.shape[1]
    config = RunConfig(loss=LossConfig(average=average, kl_coef=coef), sampling=SamplingConfig(max_new_tokens=width))
    rewards = objective_fields.pop("rewards", None)
    objective = replace(
        build_objective(config), loss_fn=loss_fn, kl_fn=kl_fn, correction_fn=lambda old, rollout, mask: weights, **objective_fields
    )
    batch = make_batch(rollout, advantages, mask, old, ref, surrogate_mask, rewards)
    draws = torch.full_like(old, 0.5)
    inputs = {"logprobs": logprobs.detach(), "old_logprobs": old, "advantages": batch.advantages.expand_as(old)}
    batch = replace(batch, selected=select_tokens(loss_fn, {**inputs, "completion_mask": mask, "draws": draws, "rollout_logprobs": rollout}))
    control = first_control(config.loss)
    value = micro_loss(objective, batch, TokenStats(logprobs, torch.zeros_like(old)), totals, control, Stats())
    value.backward()
    return value.item(), logprobs.grad


def open_instruct(config, t):
    """The surrogate times w without gradient; w never touches the KL."""
    mask, old, rollout = t[config["mask"]].bool(), t["old_logps"], t["rollout_logps"]
    low, high = config["clip_lower"], config["clip_higher"]
    if config["loss_fn"] == "cispo":
        loss_fn = LOSSES.build("cispo", {"cap": 1 + high})
    else:
        loss_fn = LOSSES.build("grpo", {"clip_low": low, "clip_high": high})
    weights = open_instruct_weights(config, t) if config["use_rho_correction"] else torch.ones_like(old)
    denominator = mask.sum() if config["loss_denominator"] == "token" else torch.tensor(float(config["loss_denominator"]))
    estimators = [KLS.get("k1"), KLS.get("k2"), KLS.get("k3"), lambda x, ref, before: token_ratio(x, before) * KLS.get("k1")(x, ref)]
    kl = (config["beta"], estimators[config["kl_estimator"]])
    value, gradient = loss_and_gradient(
        loss_fn, t["logps"], old, rollout, t[config["advantages"]], mask, "token", Totals(denominator, torch.tensor(len(mask)), mask.shape[1]),
        weights=weights, kl=kl, ref=t["ref_logps"], has_kl=True,
    )  # fmt: skip
    return {"loss": value, "grad": gradient, "weights": weights}


def open_instruct_weights(config, t):
    """clip(v) for the tokens that no rejection takes out of the surrogate, else 0; a bound of 0 is none.

    At the level of the sequence v is the geometric mean: the same functions, with the mean in place of each token's gap.
    VACO judges the tokens' own v there too.
    """
    mask, old, rollout = t[config["mask"]].bool(), t["old_logps"], t["rollout_logps"]
    own = old
    advantages = t[config["advantages"]]
    advantages = advantages if advantages.dim() == 2 else advantages[:, None]
    if config["rho_mask_sequence_level"]:
        old = rollout + row_mean(old - rollout, mask)
    clamps = {"clip_min": config["rho_clamp_lower_bound"] or None, "clip_max": config["rho_clamp_upper_bound"] or None}
    weights = CORRECTIONS.build("token_truncate", clamps)(old, rollout, torch.ones_like(mask))
    low, high = config["rho_mask_lower_bound"], config["rho_mask_upper_bound"]
    keep = torch.ones_like(mask)
    if config["rho_mask_tv_divergence"]:
        if low or high:
            bounds = {"low": low or None, "high": high or math.inf}
            keep = REJECTIONS.build("vaco", bounds)(own, rollout, advantages, mask)
    elif low or high:
        bounds = {"low": math.log(low) if low else -math.inf, "high": math.log(high) if high else math.inf}
        keep = REJECTIONS.build("token", {"estimator": "k1", **bounds})(old, rollout, advantages, mask)
    return weights * keep * mask


def areal(config, t):
    """Divided by the tokens before a rejection, but by those that are left after m2po."""
    mask, old, rollout = t[config["mask"]].bool(), t[config["proximal"]], t[config["behaviour"]]
    advantages = t[config["advantages"]]
    low, high = config["eps_clip"], config["eps_clip_higher"] or config["eps_clip"]
    counted, out, weights, surrogate = mask, {}, None, None
    if config.get("m2_threshold"):
        reject = REJECTIONS.build("m2po", {"threshold": config["m2_threshold"]})
        counted = mask = mask & reject(old, rollout, advantages[:, None] if advantages.dim() == 1 else advantages, mask)
        out = {"mask": mask}
    if rejection := config.get("rejection_sampling"):
        surrogate, weights = areal_rejection(rejection, old, rollout, mask)
        out = {"mask": surrogate & mask, "weights": weights}
    if config.get("use_sapo_loss"):
        loss_fn = LOSSES.build("sapo", {"tau_pos": config["sapo_tau_pos"], "tau_neg": config["sapo_tau_neg"]})
    elif config["importance_sampling_level"] == "sequence":
        loss_fn = LOSSES.build("gspo", {"clip_low": low, "clip_high": high})
        if advantages.dim() == 2:
            advantages = row_mean(advantages, mask)
    elif config.get("c_clip"):
        loss_fn = LOSSES.build("dual_clip", {"clip_low": low, "clip_high": high, "c": config["c_clip"]})
    else:
        loss_fn = LOSSES.build("grpo", {"clip_low": low, "clip_high": high})
    totals = Totals(counted.sum(), torch.tensor(len(mask)), mask.shape[1])
    value, gradient = loss_and_gradient(
        loss_fn, t["logps"], old, rollout, advantages, mask, "token", totals, weights=weights, surrogate_mask=surrogate
    )
    return {"loss": value, "grad": gradient, **out}


def areal_rejection(config, old, rollout, mask):
    """The tokens that stay, and the weights of v; k1 is log v, as here. A ratio of rows is judged by its logs."""
    estimator = config["metric"].removeprefix("kl_") if config["metric"] != "ratio" else "k1"
    bounds = {"low": config["lower"], "high": math.inf if config["upper"] is None else config["upper"]}
    if config["metric"] == "ratio":
        bounds = {name: x if x is None or x == math.inf else (math.log(x) if x > 0 else None) for name, x in bounds.items()}
    args = {"estimator": estimator, **bounds}
    if config["level"] == "sequence":
        args["over"] = config["agg"]
    reject = REJECTIONS.build(config["level"], args)
    pair = (rollout, old) if estimator == "k3" else (old, rollout)  # its k3 is 1 / v - 1 + log v
    keep = reject(*pair, old, mask).expand_as(mask)
    whole = config["level"] == "sequence" and config["metric"] == "ratio"
    name = "geometric_truncate" if whole else "token_truncate"
    weights = CORRECTIONS.build(name, {"clip_max": None})(old, rollout, mask).expand_as(old)
    if config["action"] == "mask":
        return keep, weights * keep * mask
    clamps = {"clip_min": config["lower"], "clip_max": config["upper"]}
    cut = CORRECTIONS.build(name, clamps)(old, rollout, mask).expand_as(old)
    return torch.ones_like(mask), torch.where(keep, weights, cut) * mask


def areal_overlong(config, t):
    """Linear without a floor; ours ends at -1, where a completion is cut off, so what is beyond is the next window's."""
    limit, cache = config["max_response_length"], config["overlong_tokens"]
    lengths = torch.tensor(config["lengths"], dtype=torch.double)
    windows = int(max(0, math.ceil((float(lengths.max()) - limit) / cache))) + 1
    penalties = [soft_overlong_penalty(lengths, limit + i * cache, cache / (limit + i * cache)) for i in range(windows)]
    return {"values": config["overlong_penalty_factor"] * sum(penalties)}


def nemo_rl(config, t):
    mask = t[config["mask"]].bool()
    if config.get("sample_mask", "ones") != "ones":
        mask = mask & t[config["sample_mask"]].bool()[:, None]
    old, rollout, by_row = t["old_logps"], t["rollout_logps"], config.get("sequence_level_importance_ratios")
    low, high = config.get("ratio_clip_min", 0.2), config.get("ratio_clip_max", 0.2)
    if config.get("disable_ppo_ratio"):
        loss_fn = LOSSES.get("reinforce")
    elif config.get("use_cispo"):
        loss_fn = LOSSES.build("cispo", {"floor": 1 - low, "cap": 1 + high})
    elif by_row:
        loss_fn = LOSSES.build("gspo", {"clip_low": low, "clip_high": high})
    elif config.get("ratio_clip_c"):
        loss_fn = LOSSES.build("dual_clip", {"clip_low": low, "clip_high": high, "c": config["ratio_clip_c"]})
    else:
        loss_fn = LOSSES.build("grpo", {"clip_low": low, "clip_high": high})
    weights = surrogate = None
    if config.get("use_importance_sampling_correction"):
        weights, surrogate = nemo_weights(config, old, rollout, mask, by_row)
    fields = {}
    if config.get("positive_example_nll_weight"):
        rewards = t[config["rewards"]][:, None]
        fields = {"positive_nll_coef": config["positive_example_nll_weight"], "rewards": rewards}
    average = "token" if config.get("token_level_loss", True) else "sequence"
    positive = (mask & (fields["rewards"] > 0)).sum() if fields else 0
    totals = Totals(mask.sum(), mask.any(dim=1).sum(), mask.shape[1], positive_tokens=positive)
    kl = (config["reference_policy_kl_penalty"], nemo_kl(config, rollout))
    value, gradient = loss_and_gradient(
        loss_fn, t["logps"], old, rollout, t[config["advantages"]], mask, average, totals,
        weights=weights, surrogate_mask=surrogate, kl=kl, ref=t["ref_logps"], has_kl=True, **fields,
    )  # fmt: skip
    return {"loss": value, "grad": gradient}


def nemo_kl(config, rollout):
    """u k, cut to +-10; u is exp(l - sg l), or exp(l - l_roll)."""
    estimator = KLS.get(config.get("reference_policy_kl_type", "k3"))

    def weighted(logprobs, ref_logprobs, old_logprobs):
        before = rollout if config.get("use_on_policy_kl_approximation") else logprobs.detach()
        return (token_ratio(logprobs, before) * estimator(logprobs, ref_logprobs)).clamp(-10, 10)

    return weighted


def nemo_weights(config, old, rollout, mask, by_row):
    """The weights of v, and the tokens that the surrogate keeps."""
    kind, high = config.get("truncated_importance_sampling_type", "tis"), config.get("truncated_importance_sampling_ratio")
    low = config.get("truncated_importance_sampling_ratio_min")
    level = "sequence" if by_row else "token"
    if high is None or kind == "seq-mask-tis":
        weights = CORRECTIONS.build(f"{level}_truncate", {"clip_max": None})(old, rollout, mask)
    else:
        name = f"{level}_{'mask' if kind == 'icepop' else 'truncate'}"
        weights = CORRECTIONS.build(name, {"clip_min": low, "clip_max": high})(old, rollout, mask)
    keep = None
    if high is not None and kind == "seq-mask-tis":
        keep = REJECTIONS.build("geometric", {"low": low, "high": high})(old, rollout, old, mask).expand_as(mask)
    return weights, keep


PRIME_RL = {"loss": prime_rl_loss, "advantage": prime_rl_advantage}
OTHERS = {"open_instruct": open_instruct, "areal": areal, "overlong_penalty": areal_overlong, "nemo_rl": nemo_rl}
