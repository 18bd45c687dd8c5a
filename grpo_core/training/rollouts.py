"""From a step's tasks to its advantages: sampling, scoring, dynamic sampling, shaped rewards.

The prompt that replaces a tied one is a function of (seed, step, attempt, position). A rank replaces its own tied
groups and takes part in no collective while it does, so ranks may need different numbers of attempts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_core.batch import PADDING, Frozen, Rollouts, Task, replace_rows, take
from grpo_core.distributed import ranks
from grpo_core.environments.setup import sample_turns
from grpo_core.model.packing import Budget
from grpo_core.model.policy import Policy
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.advantages import compute_advantages, tie_small_spreads, tied_groups
from grpo_core.objective.inputs import CORRECTION_INPUTS
from grpo_core.objective.objective import Objective
from grpo_core.registry import get_fact
from grpo_core.scoring.scoring import Scores, ask_ahead, start_step
from grpo_core.scoring.sources import score_by_source
from grpo_core.training.difficulty import note_outcomes
from grpo_core.training.distillation import add_teacher_advantages
from grpo_core.training.run import Run


def collect(run: Run, step: int, stats: Stats) -> tuple[list[Task], Rollouts, Scores]:
    """Sample and score this rank's N tasks of `step`: tasks, B = N * G completions, and their scores.

    With sampling.dynamic_attempts, groups without a signal are replaced by completions of fresh prompts, that many
    times at most. DAPO, arXiv:2503.14476.
    """
    tasks = run.tasks.batch(step)
    start_step(run.rewards, step)
    rollouts, scores = _sample_and_score(run, step, tasks)
    if run.config.sampling.dynamic_attempts:
        tasks, rollouts, scores = _resample(run, step, stats, tasks, rollouts, scores)
    return tasks, rollouts, scores


def _resample(
    run: Run, step: int, stats: Stats, tasks: list[Task], rollouts: Rollouts, scores: Scores
) -> tuple[list[Task], Rollouts, Scores]:
    """Return tasks, completions and scores with groups without a signal replaced."""
    group_size, tasks = run.config.sampling.group_size, list(tasks)
    stats.add_mean("first_draw/reward", scores.rewards, ~scores.rewards.isnan())
    stats.add_mean("first_draw/tied_groups", groups_without_signal(run.objective, rollouts, scores))
    num_replaced, attempts, tokens = 0, 0, rollouts.lengths().sum()
    for attempt in range(1, run.config.sampling.dynamic_attempts + 1):
        failed = torch.stack([*scores.failed.values()]).any(dim=0).any(dim=1)  # the reward failed, not the prompt
        tied = (groups_without_signal(run.objective, rollouts, scores) & ~failed).nonzero().squeeze(1)
        if len(tied) == 0:
            break
        others = run.tasks.replacements(step, attempt)
        fresh = [others[group] for group in tied.tolist()]
        fresh_rollouts, fresh_scores = _sample_and_score(run, step, fresh)
        for group, task in zip(tied.tolist(), fresh, strict=True):
            tasks[group] = task
        rows = (tied[:, None] * group_size + torch.arange(group_size, device="cpu")).flatten()
        rollouts = replace_rows(rollouts, rows, fresh_rollouts)
        scores = _replace_scores(scores, tied, fresh_scores)
        num_replaced, attempts = num_replaced + len(tied), attempt
        tokens = tokens + fresh_rollouts.lengths().sum()
    stats.add_total("resampled_groups", torch.tensor(float(num_replaced), device="cpu"))
    stats.add_max("resampling_attempts", torch.tensor(float(attempts), device="cpu"))
    stats.add_total("tokens_sampled", tokens)
    return tasks, rollouts, scores


def shape_rewards(
    objective: Objective,
    policy: Policy,
    budget: Budget,
    rollouts: Rollouts,
    scores: Scores,
    kl_coef: float,
    stats: Stats,
) -> tuple[Tensor, Tensor]:
    """Return the rewards that advantages are computed from, [N, G], and the mask of trained completions, [N, G] bool.

    The rewards are the scores less kl_coef times the KL of the completion (where loss.kl_in is reward), after the
    truncation function, which may also leave completions out of the loss.
    """
    rewards = scores.rewards
    if objective.kl_in == "reward" and kl_coef > 0:
        rewards = rewards - kl_coef * _sequence_kl(objective, policy, budget, rollouts, stats).view_as(rewards)
    return _truncate(objective, rollouts, rewards)


def compute_step_advantages(
    objective: Objective,
    rewards: Tensor,
    rollouts: Rollouts,
    scores: Scores,
    stats: Stats,
    frozen: Frozen | None = None,
) -> Tensor:
    """Return this rank's advantages, [N, G(, C)]: [N, G], or [N, G, C] where the function has a value for each token.

    With a teacher's part they are [B, C].

    The advantage function sees the groups of all ranks. `frozen` has the log-probs that it may ask for. Where no
    completion of the step has a reward, the advantages of the rewards are all 0, and the metric `no_reward` is 1. With
    a teacher alone no reward has a weight, and there is neither this metric nor `tied_groups`. A collective.

    Raises:
        ConfigError: the function returned a wrong shape or a value that is not finite.
    """
    shape, has_rewards = rewards.shape, any(scores.weights)
    if has_rewards:
        stats.add_mean("tied_groups", _tied(objective, rewards, scores))
    components = rewards.new_zeros(0, *shape)
    if scores.by_name:
        components = torch.stack([*scores.by_name.values()]).masked_fill(rewards.isnan(), torch.nan)  # [K, N, G]
    lengths = rollouts.lengths().view(shape).cpu().to(rewards.dtype)
    levelled = [tie_small_spreads(values, objective.min_group_std) for values in (rewards[None], components)]
    own = torch.cat([levelled[0], lengths[None], levelled[1]])  # [2 + K, N, G]
    whole = ranks.all_rows(own.transpose(0, 1)).cpu().transpose(0, 1)  # [2 + K, N of all ranks, G]
    if (
        has_rewards and whole[0].isnan().all()
    ):  # every one was cut off and is left out, or cannot be judged, or the reward failed
        stats.add_max("no_reward", torch.tensor(1.0, device="cpu"))
    inputs = {"lengths": whole[1], "components": whole[2:], "weights": torch.tensor(scores.weights, device="cpu")}
    if "turn_rewards" in objective.advantage_needs and scores.turn_rewards is not None:
        inputs["turn_rewards"] = _gather_turns(scores.turn_rewards)
    if frozen is not None:
        inputs |= _gather_tokens(frozen, objective, rewards.shape[1])
    values = compute_advantages(objective.advantage_fn, whole[0], **inputs)
    first = ranks.rank() * len(rewards)
    own_values = values[first : first + len(rewards)].to(torch.float32)
    own_values = own_values if own_values.dim() == 2 else own_values[..., : rollouts.completion_ids.shape[1]]
    return own_values if frozen is None else add_teacher_advantages(objective, frozen, own_values)


def _gather_turns(turn_rewards: Tensor) -> Tensor:
    """Return the rewards of the turns of all ranks, [N of all ranks, G, T of the widest rank]. A collective."""
    width = int(ranks.all_max(torch.tensor(float(turn_rewards.shape[2]), device="cpu")))
    return ranks.all_rows(F.pad(turn_rewards, (0, width - turn_rewards.shape[2]), value=torch.nan)).cpu()


def _gather_tokens(frozen: Frozen, objective: Objective, group_size: int) -> dict[str, Tensor]:
    """Return the inputs of tokens that the advantages ask for, [N of all ranks, G, C of the widest rank] each.

    A collective.
    """
    names = objective.advantage_needs
    tokens = {
        "completion_mask": frozen.loss_mask,
        "rollout_logprobs": frozen.rollouts.rollout_logprobs,
        "ref_logprobs": frozen.ref_logprobs,
        "teacher_logprobs": frozen.teacher_logprobs,
        "logprobs": frozen.logprobs,
        "entropy": frozen.entropy,
        "sum_p_squared": frozen.sum_p_squared,
        "turn_ids": frozen.rollouts.turns.long(),
        "rollout_weights": _compute_correction_for_advantages(frozen, objective)
        if "rollout_weights" in names
        else None,
    }
    asked = {name: values for name, values in tokens.items() if name in names and values is not None}
    if not asked:
        return {}
    columns = frozen.loss_mask.shape[1]
    width = int(ranks.all_max(torch.tensor(float(columns), device="cpu")))
    padded = {name: F.pad(x, (0, width - columns), value=PADDING.get(name, 0)) for name, x in asked.items()}
    return {name: ranks.all_rows(x).cpu().unflatten(0, (-1, group_size)) for name, x in sorted(padded.items())}


def _compute_correction_for_advantages(frozen: Frozen, objective: Objective) -> Tensor | None:
    """Return the weights of the rollout correction, [B, C], or None without one."""
    inputs = {
        "old_logprobs": frozen.logprobs,
        "rollout_logprobs": frozen.rollouts.rollout_logprobs,
        "completion_mask": frozen.loss_mask,
        "ref_logprobs": frozen.ref_logprobs,
    }
    weights = CORRECTION_INPUTS.call(objective.correction_fn, inputs)
    return None if weights is None else weights.expand_as(frozen.loss_mask)


def groups_without_signal(objective: Objective, rollouts: Rollouts, scores: Scores) -> Tensor:
    """Return the groups without a learning signal, [N] bool.

    A group has none if its scores are tied (DAPO's rule), or if after truncation its rewards are tied or none of its
    completions is trained.
    """
    rewards, trained = _truncate(objective, rollouts, scores.rewards)
    tied = _tied(objective, scores.rewards, scores) | _tied(objective, rewards, scores)
    return tied | ~trained.any(dim=1)


def _sample_and_score(run: Run, step: int, tasks: list[Task]) -> tuple[Rollouts, Scores]:
    group_size = run.config.sampling.group_size
    with run.log.phase("sample"):
        on_group = ask_ahead(run.rewards, tasks)  # finished groups are judged while others still decode
        options = {"on_group": on_group} if on_group else {}
        rollouts, turns = sample_turns(run.sampler, run.environments, tasks, group_size, step=step, **options)
    with run.log.phase("reward"):
        scores = score_by_source(run.rewards, tasks, rollouts.completions, group_size)
        if run.environments is not None:
            scores = run.environments.add_to_scores(scores, turns)
    note_outcomes(run, tasks, scores)
    return rollouts, scores


def _tied(objective: Objective, rewards: Tensor, scores: Scores) -> Tensor:
    """The groups without a signal for the advantage function, [N] bool."""
    if not get_fact(objective.advantage_fn, "reads_components"):
        tied = tied_groups(tie_small_spreads(rewards, objective.min_group_std))
        if "turn_rewards" not in objective.advantage_needs or scores.turn_rewards is None:
            return tied
        scored = scores.turn_rewards.masked_fill(rewards.isnan()[..., None], torch.nan)
        return torch.stack([tied, *(tied_groups(values) for values in scored.unbind(2))]).all(dim=0)
    pairs = zip(scores.by_name.values(), scores.weights, strict=True)
    unscored = rewards.isnan()  # also those that the truncation function leaves out
    components = [values.masked_fill(unscored, torch.nan) for values, weight in pairs if weight]
    components = [tie_small_spreads(values, objective.min_group_std) for values in components]
    return torch.stack([tied_groups(values) for values in components]).all(dim=0)


def _truncate(objective: Objective, rollouts: Rollouts, rewards: Tensor) -> tuple[Tensor, Tensor]:
    # max_new_tokens bounds all tokens of a completion
    lengths, truncated = (x.view(rewards.shape).cpu() for x in (rollouts.valid_lengths(), rollouts.truncated))
    return objective.truncation_fn(rewards, lengths, truncated, objective.max_new_tokens)


def _replace_scores(scores: Scores, groups: Tensor, others: Scores) -> Scores:
    """The scores with those of `groups` [n] taken from `others`."""

    def put(values: Tensor, fresh: Tensor) -> Tensor:
        return values.index_copy(0, groups, fresh)

    return replace(
        scores,
        rewards=put(scores.rewards, others.rewards),
        by_name={name: put(values, others.by_name[name]) for name, values in scores.by_name.items()},
        failed={name: put(failed, others.failed[name]) for name, failed in scores.failed.items()},
        failures=(*scores.failures, *others.failures),
        turn_rewards=_replace_turns(scores.turn_rewards, groups, others.turn_rewards),
        turns=_replace_records(scores, groups, others),
    )


def _replace_records(scores: Scores, groups: Tensor, others: Scores) -> tuple[Any, ...]:
    if not scores.turns:
        return ()
    turns, size = list(scores.turns), scores.rewards.shape[1]
    for i, group in enumerate(groups.tolist()):
        turns[group * size : (group + 1) * size] = others.turns[i * size : (i + 1) * size]
    return tuple(turns)


def _replace_turns(turn_rewards: Tensor | None, groups: Tensor, others: Tensor | None) -> Tensor | None:
    """The rewards of turns [N, G, T] with those of `groups` taken from `others`; the narrower of the two is padded."""
    if turn_rewards is None or others is None:
        return None
    width = max(turn_rewards.shape[2], others.shape[2])
    old, new = (F.pad(x, (0, width - x.shape[2]), value=torch.nan) for x in (turn_rewards, others))
    return old.index_copy(0, groups, new)


@torch.no_grad()
def _sequence_kl(objective: Objective, policy: Policy, budget: Budget, rollouts: Rollouts, stats: Stats) -> Tensor:
    """The KL of each completion, summed over its tokens, [B] on the CPU."""
    divergence = objective.kl_fn if objective.kl_needs_vocabulary else None
    sums = torch.zeros(len(rollouts), device="cpu")
    rollouts = replace(rollouts, completions=())
    for packing in policy.plan(rollouts, budget):
        micro = take(rollouts, packing.rows)
        tokens = policy.forward(micro, packing, divergence=divergence)
        kl = tokens.divergence
        if kl is None:
            with policy.reference():
                ref_logprobs = policy.forward(micro, packing).logprobs
            kl = objective.kl_fn(tokens.logprobs, ref_logprobs, tokens.logprobs)
        stats.add_mean("kl", kl, micro.completion_mask)
        sums[packing.rows.cpu()] = (kl * micro.completion_mask).sum(dim=1).cpu()
    return sums
