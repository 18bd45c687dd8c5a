"""From a step's tasks to its advantages: sampling, scoring, dynamic sampling, and what becomes of a reward.

Which prompt replaces a tied one is a function of (seed, step, attempt, position). A rank replaces its own ties and
takes part in no collective while it does, so ranks may need different numbers of attempts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from grpo_core.batch import Rollouts, Task, replace_rows, take
from grpo_core.distributed import ranks
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.advantages import compute_advantages, tie_small_spreads, tied_groups
from grpo_core.registry import get_fact
from grpo_core.schema import ConfigError
from grpo_core.scoring.scoring import Scores, score
from grpo_core.training.run import Run


def collect(run: Run, step: int, stats: Stats) -> tuple[list[Task], Rollouts, Scores]:
    """This rank's N tasks of `step`, their B = N * G completions, and what the rewards say of them.

    With sampling.dynamic_attempts, groups without a signal are replaced by fresh prompts, so many times at most.
    DAPO, arXiv:2503.14476.
    """
    tasks = run.tasks.batch(step)
    rollouts, scores = _draw(run, tasks)
    if run.config.sampling.dynamic_attempts:
        tasks, rollouts, scores = _resample(run, step, stats, tasks, rollouts, scores)
    return tasks, rollouts, scores


def _resample(
    run: Run, step: int, stats: Stats, tasks: list[Task], rollouts: Rollouts, scores: Scores
) -> tuple[list[Task], Rollouts, Scores]:
    """`collect`'s tasks, completions and scores with tied groups replaced."""
    group_size, tasks = run.config.sampling.group_size, list(tasks)
    stats.add_mean("first_draw/reward", scores.rewards, ~scores.rewards.isnan())
    stats.add_mean("first_draw/tied_groups", _to_replace(run, rollouts, scores))
    replaced, used, tokens = 0, 0, rollouts.lengths().sum()
    for attempt in range(1, run.config.sampling.dynamic_attempts + 1):
        failed = torch.stack([*scores.failed.values()]).any(dim=0).any(dim=1)  # not the prompt's fault
        tied = (_to_replace(run, rollouts, scores) & ~failed).nonzero().squeeze(1)
        if len(tied) == 0:
            break
        others = run.tasks.replacements(step, attempt)
        fresh = [others[group] for group in tied.tolist()]
        fresh_rollouts, fresh_scores = _draw(run, fresh)
        for group, task in zip(tied.tolist(), fresh, strict=True):
            tasks[group] = task
        rows = (tied[:, None] * group_size + torch.arange(group_size)).flatten()
        rollouts = replace_rows(rollouts, rows, fresh_rollouts)
        scores = _replace_scores(scores, tied, fresh_scores)
        replaced, used, tokens = replaced + len(tied), attempt, tokens + fresh_rollouts.lengths().sum()
    stats.add_total("resampled_groups", torch.tensor(float(replaced)))
    stats.add_max("resampling_attempts", torch.tensor(float(used)))
    stats.add_total("tokens_sampled", tokens)
    return tasks, rollouts, scores


def rewards_to_learn_from(
    run: Run, rollouts: Rollouts, scores: Scores, kl_coef: float, stats: Stats
) -> tuple[Tensor, Tensor]:
    """Rewards after the KL (loss.kl_in: reward) and truncation, [N, G]; which completions are trained, [N, G] bool."""
    rewards = scores.rewards
    if run.config.loss.kl_in == "reward" and kl_coef > 0:
        rewards = rewards - kl_coef * _sequence_kl(run, rollouts, stats).view_as(rewards)
    return _after_truncation(run, rollouts, rewards)


def advantages_over_ranks(run: Run, rewards: Tensor, rollouts: Rollouts, scores: Scores, stats: Stats) -> Tensor:
    """This rank's advantages [N, G]; the function sees the groups of all ranks. A collective.

    Raises:
        ConfigError: no completion of the step has a reward, or what `advantages` raises.
    """
    least, shape = run.config.advantage.min_group_std, rewards.shape
    stats.add_mean("tied_groups", _tied(run, rewards, scores))
    components = torch.stack([*scores.by_name.values()]).masked_fill(rewards.isnan(), torch.nan)  # [K, N, G]
    lengths = rollouts.lengths().view(shape).cpu().to(rewards.dtype)
    mine = torch.cat([tie_small_spreads(rewards, least)[None], lengths[None], tie_small_spreads(components, least)])
    whole = ranks.all_rows(mine.transpose(0, 1)).cpu().transpose(0, 1)  # [2 + K, N of all ranks, G]
    if whole[0].isnan().all() and not ranks.all_max(torch.tensor(float(len(scores.failures)))):
        raise ConfigError("no completion of this step has a reward: every reward returned None for every one of them")
    weights = torch.tensor([reward.weight for reward in run.rewards])
    values = compute_advantages(run.advantage_fn, whole[0], lengths=whole[1], components=whole[2:], weights=weights)
    first = ranks.rank() * len(rewards)
    return values[first : first + len(rewards)].to(torch.float32)


def _draw(run: Run, tasks: list[Task]) -> tuple[Rollouts, Scores]:
    group_size = run.config.sampling.group_size
    with run.log.phase("sample"):
        rollouts = run.sampler.generate(tasks, group_size)
    with run.log.phase("reward"):
        return rollouts, score(run.rewards, tasks, rollouts.completions, group_size)


def _tied(run: Run, rewards: Tensor, scores: Scores) -> Tensor:
    """Groups without a signal for the advantage, [N] bool."""
    least = run.config.advantage.min_group_std
    if not get_fact(run.advantage_fn, "reads_components"):
        return tied_groups(tie_small_spreads(rewards, least))
    counting = [scores.by_name[reward.name] for reward in run.rewards if reward.weight]
    return torch.stack([tied_groups(tie_small_spreads(values, least)) for values in counting]).all(dim=0)


def _to_replace(run: Run, rollouts: Rollouts, scores: Scores) -> Tensor:
    """Groups that teach nothing, [N] bool: tied as they were scored, which is DAPO's rule, or after truncation."""
    rewards, trained = _after_truncation(run, rollouts, scores.rewards)
    return _tied(run, scores.rewards, scores) | _tied(run, rewards, scores) | ~trained.any(dim=1)


def _after_truncation(run: Run, rollouts: Rollouts, rewards: Tensor) -> tuple[Tensor, Tensor]:
    lengths, truncated = (x.view(rewards.shape).cpu() for x in (rollouts.lengths(), rollouts.truncated))
    return run.truncation_fn(rewards, lengths, truncated, run.config.sampling.max_new_tokens)


def _replace_scores(scores: Scores, groups: Tensor, others: Scores) -> Scores:
    def put(ours: Tensor, theirs: Tensor) -> Tensor:
        return ours.index_copy(0, groups, theirs)

    by_name = {name: put(values, others.by_name[name]) for name, values in scores.by_name.items()}
    failed = {name: put(where, others.failed[name]) for name, where in scores.failed.items()}
    return Scores(put(scores.rewards, others.rewards), by_name, failed, (*scores.failures, *others.failures))


@torch.no_grad()
def _sequence_kl(run: Run, rollouts: Rollouts, stats: Stats) -> Tensor:
    """Each completion's sum over its tokens of loss.kl, [B], on the rewards' device."""
    whole = run.kl_fn if get_fact(run.kl_fn, "full_vocabulary") else None
    sums = torch.zeros(len(rollouts))
    rollouts = replace(rollouts, completions=())
    for packing in run.policy.plan(rollouts, run.budgets.forward):
        micro = take(rollouts, packing.rows)
        tokens = run.policy.forward(micro, packing, divergence=whole)
        if whole is not None:
            kl = tokens.divergence
        else:
            with run.policy.reference():
                ref_logprobs = run.policy.forward(micro, packing).logprobs
            kl = run.kl_fn(tokens.logprobs, ref_logprobs, tokens.logprobs)
        stats.add_mean("kl", kl, micro.completion_mask)
        sums[packing.rows.cpu()] = (kl * micro.completion_mask).sum(dim=1).cpu()
    return sums
