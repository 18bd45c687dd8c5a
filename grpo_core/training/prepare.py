"""Load and check the tokenizer, tasks and model configuration of a run; build its objective, rewards and sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from grpo_core.batch import Task
from grpo_core.config.lora_checks import describe_other_base
from grpo_core.config.precision import resolve_dtype
from grpo_core.config.sections import RewardConfig, RunConfig, SamplingConfig
from grpo_core.counts import quantify
from grpo_core.data.encoding import describe_prompt_changes
from grpo_core.data.eval_sets import group_by_set, name_set
from grpo_core.data.prompts import encode_teacher_prompts
from grpo_core.data.rows import name_split
from grpo_core.data.tasks import find_offered_tasks, name_in_sentences, naming_source, read_tasks, select_source
from grpo_core.data.tasks_on_disk import TasksOnDisk, list_rows, prompt_lengths, split_into_parts
from grpo_core.data.turns import describe_dropped_turns, show_prompt
from grpo_core.distributed import ranks
from grpo_core.model.adapter_check import check_targets
from grpo_core.model.base_model import check_can_be_made
from grpo_core.model.loading import (
    check_lengths,
    check_vocabulary,
    load_model_config,
    load_tokenizer_of,
)
from grpo_core.model.policy import Policy
from grpo_core.model.quantized_loading import check_training
from grpo_core.model.reward_model import NAME as REWARD_MODEL
from grpo_core.model.reward_model import check_reward_model, load_reward_model
from grpo_core.model.rope_effect import check_rope_effect
from grpo_core.model.routing import check_can_route, check_has_routers
from grpo_core.model.teacher import check_teacher, model_of_teacher
from grpo_core.objective.advantages import ADVANTAGES
from grpo_core.objective.corrections import CORRECTIONS
from grpo_core.objective.kl import KLS, TEACHER_KLS
from grpo_core.objective.losses import LOSSES
from grpo_core.objective.objective import Objective, functions_learn_from_ties
from grpo_core.objective.rejections import REJECTIONS
from grpo_core.objective.rewards import REWARDS, reads_other_rewards
from grpo_core.objective.truncation import TRUNCATIONS
from grpo_core.registry import get_fact
from grpo_core.sampling.end_of_sequence import check_eos_ids
from grpo_core.sampling.sampler import Sampler
from grpo_core.schema import ConfigError
from grpo_core.scoring.judge import NAME as JUDGE
from grpo_core.scoring.judge import Judge, JudgeSettings
from grpo_core.scoring.kept_answers import KeptAnswers
from grpo_core.scoring.reward_call import find_missing_columns
from grpo_core.scoring.scoring import Reward, RunningReward, build_reward
from grpo_core.training.gold_answers import check_gold_answers, drop_unjudged


@dataclass(frozen=True)
class Prepared:
    """The tokenizer, the model's configuration and the tasks of a run, checked against one another."""

    tokenizer: PreTrainedTokenizerBase
    model_config: PretrainedConfig
    tasks: Sequence[Task]  # the training tasks
    eval_tasks: list[Task]
    num_too_long: int  # training prompts over data.max_prompt_tokens, dropped or cut as data.long_prompts specifies
    warnings: list[str] = field(default_factory=list)  # sentences to print before the first step


def prepare(
    config: RunConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,  # default: loaded from model.path
    model_config: PretrainedConfig | None = None,  # default: loaded from model.path
    scores_training_tasks: bool = True,  # False: they are not sampled, and only evaluation.reward is used
) -> Prepared:
    """Load and check everything that a run needs except the weights.

    Raises:
        ConfigError: a file cannot be loaded; a reward needs a column that the
            data does not have, or cannot judge more than the share data.max_unjudged of the gold answers; the
            tokenizer or lora.target_modules do not fit the model; a key needs routers, which the model does not have;
            a prompt and its completion exceed the model's positions.
    """
    offered = find_offered_tasks(config) if tokenizer is None else None
    if tokenizer is None:
        tokenizer = load_tokenizer_of(config)
    tasks, eval_tasks, (num_too_long, num_eval_too_long), notes = offered or read_tasks(config, tokenizer)
    tasks, eval_tasks, warnings = _check_data(config, tokenizer, tasks, eval_tasks, scores_training_tasks)
    warnings = notes + warnings
    if num_eval_too_long:
        warnings.append(_describe_long_eval_prompts(config, num_eval_too_long))
    if model_config is None:
        check_training(config.model, config.lora)
        model_config = load_model_config(config.model)
        check_can_be_made(model_config, config.model)
        check_rope_effect(config.model)
    check_vocabulary(model_config, tokenizer)
    check_eos_ids(model_config, model_config, "config.json")
    check_lengths([*prompt_lengths(tasks), *prompt_lengths(eval_tasks)], config.sampling.max_new_tokens, model_config)
    check_targets(model_config, config.lora, config.model.trust_remote_code)
    for key, value in find_routing_keys(config).items():
        check_has_routers(model_config, key, value, config.model.trust_remote_code)
    return Prepared(tokenizer, model_config, tasks, eval_tasks, num_too_long, warnings + _describe_other_bases(config))


def _describe_other_bases(config: RunConfig) -> list[str]:
    """Return sentences about adapters that were trained on another model than they are used with."""
    adapters = [("lora.path", config.lora.path, config.model.path)]
    adapters += [("teacher.adapter", config.teacher.adapter, config.teacher.path or config.model.path)]
    named = [(key, path, model) for key, path, model in adapters if path is not None]
    return [sentence for args in named if (sentence := describe_other_base(*args))]


def _check_data(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    eval_tasks: list[Task],
    scores_training_tasks: bool,
) -> tuple[Sequence[Task], list[Task], list[str]]:
    """Check the tasks of every source against its rewards.

    Return the tasks that stay, and sentences about prompts and gold answers.

    Raises:
        ConfigError: see `check_columns` and `check_gold_answers`; the message names the source.
    """
    tasks_left: list[Sequence[Task]] = []
    eval_tasks_left: list[Task] = []
    sentences: list[str] = []
    for i, name in enumerate(config.source_names):
        part, own, own_eval = config.of_source(name), select_source(tasks, name), select_source(eval_tasks, name)
        with naming_source(i, name):
            scored, own_eval, notes = drop_unjudged(part, own if scores_training_tasks else [], own_eval)
            own = scored if scores_training_tasks else own
            check_columns(part, scored, own_eval)
            read = [*next(split_into_parts(own)), *own_eval]
            notes += describe_prompt_changes(tokenizer, part.data, read) + describe_dropped_turns(part.data, read)
            notes += check_gold_answers(part, scored, own_eval)
            if scores_training_tasks:
                _check_readers_of_prompts(config, i, own)
        tasks_left.append(own)
        eval_tasks_left += own_eval
        sentences += name_in_sentences(i, name, notes)
    together = tasks_left[0] if len(tasks_left) == 1 else [task for own in tasks_left for task in own]
    return together, eval_tasks_left, sentences


def _check_readers_of_prompts(config: RunConfig, number: int, tasks: Sequence[Task]) -> None:
    """Check the judge and the reward model of the source with this number, which read the prompts.

    Raises:
        ConfigError: see `check_reward_model`; or one of them is shared by sources whose prompts are
            made in different ways.
    """
    part = config.of_source(config.source_names[number])
    check_reward_model(part, tasks)
    names = [reward.name for reward in part.rewards if reward.name in (JUDGE, REWARD_MODEL)]
    sources = config.data.sources
    if names and sources and not sources[number].rewards:
        sharing = [config.of_source(source.name).data for source in sources if not source.rewards]
        if len({(data.template, data.prompt, data.system) for data in sharing}) > 1:
            raise ConfigError(
                f"the reward {names[0]} reads the prompts of several sources, whose template, prompt or system differ; "
                f"name the rewards of each source in data.sources[{number}].rewards"
            )


def _describe_long_eval_prompts(config: RunConfig, number: int) -> str:
    treatment = "cut on the left" if config.data.long_prompts == "truncate_left" else "left out"
    return (
        f"{quantify(number, 'evaluation prompt is', 'evaluation prompts are')} {treatment}, having more than "
        f"{quantify(config.data.max_prompt_tokens, 'token')} (data.max_prompt_tokens)"
    )


def prepare_teacher(config: RunConfig, prepared: Prepared) -> Prepared:
    """Check the teacher, and return the tasks with the prompts that it sees, if they are not the policy's.

    Raises:
        ConfigError: see `check_teacher` and `encode_teacher_prompts`; or a prompt is too long for its model.
    """
    teacher = config.teacher
    if not teacher.exists:
        return prepared
    check_teacher(config, prepared.tokenizer)
    tasks, model_config = prepared.tasks, prepared.model_config
    if teacher.path is not None:
        model_config = load_model_config(model_of_teacher(config))
    if teacher.prompt is not None:
        if isinstance(tasks, TasksOnDisk):
            raise ConfigError(
                f"teacher.prompt is {teacher.prompt!r}, but the rows of {config.data.path} stay on disk, which "
                f"teacher.prompt does not support; use a part of them with data.limit"
            )
        parts = {name: select_source(tasks, name) for name in config.source_names}
        tasks = [
            task
            for name, own in parts.items()
            for task in encode_teacher_prompts(own, teacher.prompt, config.of_source(name).data, prepared.tokenizer)
        ]
    try:
        lengths = prompt_lengths(tasks)
        if teacher.prompt is not None:
            lengths = [len(task.teacher_prompt_ids or task.prompt_ids) for task in tasks]
        check_lengths(lengths, config.sampling.max_new_tokens, model_config)
    except ConfigError as error:
        raise ConfigError(f"teacher.prompt is {teacher.prompt!r}, but for the teacher {error}") from None
    return replace(prepared, tasks=tasks)


def find_routing_keys(config: RunConfig) -> dict[str, bool | float]:
    """Return the keys that need a model with routers and are on, with their values."""
    replays, coef = config.sampling.replay_routing, config.loss.router_aux_coef
    keys = {"sampling.replay_routing": replays, "loss.router_aux_coef": coef}
    return {key: value for key, value in keys.items() if value}


def check_routing(config: RunConfig, policy: Policy) -> None:
    """Refuse what the routers of the loaded model cannot do.

    Raises:
        ConfigError: the experts that they choose cannot be recorded and replaced, or their probabilities are unknown.
    """
    model_type = policy.causal_lm.config.model_type
    for key, value in find_routing_keys(config).items():
        check_can_route(model_type, policy.routers, key, value, balances=key == "loss.router_aux_coef")


def check_columns(config: RunConfig, tasks: Sequence[Task], eval_tasks: list[Task], source: str | None = None) -> None:
    """Raise ConfigError if a reward needs a column that the data lacks, or that is null where it must not be.

    `source` names the data of all tasks; by default it is as configured.
    """
    data = config.data
    place = source or name_split(data.path, data.split)
    uses = [("", reward.name, reward.args, tasks, place) for reward in config.rewards]
    for set_name, set_tasks in group_by_set(eval_tasks).items():
        uses.append(("evaluation.", config.evaluation.reward, {}, set_tasks, source or name_set(config, set_name)))
    for key, name, args, rows, place in uses:
        if rows and (missing := find_missing_columns(REWARDS.build(name, args), rows[0].columns)):
            if {"solution_str", "ground_truth"} <= {*missing}:
                raise ConfigError(
                    f"{key}reward {name} has the arguments of a reward function of verl, which scores one completion; "
                    f"a reward here gets a list of completions, so write one that calls it for each, as in "
                    f"docs/rewards.md"
                )
            columns = ", ".join(rows[0].columns)
            others = "another evaluation.reward, or evaluation.num_tasks=0" if key else "other rewards"
            raise ConfigError(
                f"{key}reward {name} needs the column {missing[0]!r}, but the data has only the columns {columns}; "
                f"the data is {place}; name it with data.columns='{{{missing[0]}: COLUMN}}', or set {others}"
            )
        for column in get_fact(REWARDS.get(name), "never_null", ()):
            for index, row in list_rows(rows):
                if row[column] is None:
                    raise ConfigError(
                        f"reward {name} needs a value in the column {column!r}, which is null in row "
                        f"{index + 1} of the data, {place}; correct the row, or leave such rows out with "
                        f"data.bad_rows: drop"
                    )


def build_objective(config: RunConfig) -> Objective:
    """Return the configured objective: its functions with their arguments bound, and its switches."""
    loss, advantage, truncation = config.loss, config.advantage, config.truncation
    correction, teacher = loss.rollout_correction, config.teacher
    functions = {
        "loss_fn": LOSSES.build(loss.name, loss.args),
        "kl_fn": KLS.get(loss.kl),
        "correction_fn": CORRECTIONS.build(correction.name, correction.args),
        "rejection_fn": REJECTIONS.build(loss.rejection.name, loss.rejection.args),
        "advantage_fn": ADVANTAGES.build(advantage.name, advantage.args),
        "truncation_fn": TRUNCATIONS.build(truncation.name, truncation.args),
    }
    return Objective(
        **functions,
        average=loss.average,
        has_kl=loss.kl_coef > 0,
        kl_in=loss.kl_in,
        entropy_adapts=loss.entropy_target is not None,
        top_entropy=loss.top_entropy,
        off_policy_mask=loss.off_policy_mask,
        rejection_in=loss.rejection_in,
        normalize_correction=loss.normalize_correction and correction.name != "none",
        log_ratio_coef=loss.log_ratio_coef,
        positive_nll_coef=loss.positive_nll_coef,
        positive_nll_above=loss.positive_nll_above,
        echo_coef=loss.echo_coef,
        router_aux_coef=loss.router_aux_coef,
        min_group_std=advantage.min_group_std,
        max_new_tokens=config.sampling.max_new_tokens,
        steps_per_batch=config.trainer.num_minibatches * config.trainer.num_passes,
        has_teacher=teacher.exists,
        teacher_coef=teacher.coef if teacher.exists else 0.0,
        teacher_kl_fn=TEACHER_KLS[teacher.kl] if teacher.kl and teacher.kl_coef else None,
        teacher_kl_coef=teacher.kl_coef,
        learns_from_ties=teacher.trains or functions_learn_from_ties(loss.average, *functions.values()),
    )


def make_rewards(config: RunConfig, folder: Path | None = None) -> list[Reward]:
    """Return the configured rewards with their arguments bound.

    A reward from a user's file runs in its own process; a reward model's weights are loaded onto this rank's device; a
    judge keeps its answers in the run folder `folder`, if there is one. Rewards that data.sources binds to a source
    score its completions only, and the others those of the other sources.
    """
    own = {source.name: source.rewards for source in config.data.sources if source.rewards}
    others = tuple(source.name for source in config.data.sources if not source.rewards)
    parts = [((name,), rewards) for name, rewards in own.items()]
    if others or not config.data.sources:
        parts.insert(0, (others, config.rewards))
    return [make_reward(config, reward, sources, folder) for sources, rewards in parts for reward in rewards]


def make_reward(config: RunConfig, reward: RewardConfig, sources: tuple[str, ...], folder: Path | None) -> Reward:
    """Return one reward for the completions of some sources, or of all; () are all."""
    label = config.label_reward(reward.name)
    config = config.of_source(sources[0]) if sources else config
    if reward.name == REWARD_MODEL:
        function = load_reward_model(config, resolve_dtype(config.model.precision), ranks.device())
    elif reward.name == JUDGE:
        function = make_judge(config, reward.args, folder)
    else:
        function = build_reward(reward.name, reward.args, timeout=config.trainer.reward_timeout)
    reads_others = reads_other_rewards(REWARDS.get(reward.name))
    return Reward(label, reward.weight, function, reads_others, sources, configured=reward.name)


def make_eval_rewards(config: RunConfig) -> dict[str, Callable | RunningReward]:
    """Return the reward by which each source is evaluated; without sources the only name is ""."""
    timeout = config.trainer.reward_timeout
    names = {source: config.of_source(source).evaluation.reward for source in config.source_names}
    functions = {name: build_reward(name, timeout=timeout) for name in dict.fromkeys(names.values())}
    return {source: functions[name] for source, name in names.items()}


def make_judge(config: RunConfig, args: dict[str, Any], folder: Path | None) -> Judge:
    """Return the judge of this rank, which gets its share of the requests at a time, but at least one."""
    settings = JudgeSettings(**args)
    settings = replace(settings, at_once=max(1, settings.at_once // ranks.world_size()))
    answers = KeptAnswers(None if folder is None else folder / "judge", ranks.rank())
    return Judge(settings, answers, show_prompt=lambda prompt, row: show_prompt(prompt, row, config.data))


def make_sampler(
    config: SamplingConfig,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    notify: Callable[[str], None],
    *,
    records_routing: bool = False,  # the trainer compares its routing with the sampler's, or replays it
) -> Sampler:
    """Return a sampler that reads the policy's current weights."""
    return Sampler(
        policy.causal_lm,
        tokenizer,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        decoder=config.decoder,
        rows_at_once=config.rows_at_once,
        stop=config.stop_strings,
        notify=notify,
        routers=policy.routers if records_routing else None,
    )
