"""Checks of a configuration that need no model: names, arguments, ranges, and settings that exclude each other."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from grpo_core.batch import SamplingParams, describe_temperature
from grpo_core.config.environment_checks import check_environment
from grpo_core.config.function_checks import check_functions
from grpo_core.config.lora_checks import check_lora, check_quantization
from grpo_core.config.paths import split_resume
from grpo_core.config.rope_checks import check_rope
from grpo_core.config.sections import RewardConfig, RunConfig
from grpo_core.config.source_checks import SET_NAME, check_sources, check_split_columns
from grpo_core.config.teacher_checks import HOW_TO_SET, asks_for_teacher, check_teacher
from grpo_core.objective.advantages import ADVANTAGES
from grpo_core.objective.reward_labels import find_label
from grpo_core.objective.rewards import REWARDS, reads_other_rewards
from grpo_core.objective.truncation import TRUNCATIONS
from grpo_core.registry import get_fact
from grpo_core.schema import MAX_PATH_BYTES, ConfigError, describe_impossible_path, keyword_arguments


def check(config: RunConfig) -> None:
    """Check everything that does not depend on the number of ranks; `prompts_per_rank` checks the rest.

    Raises:
        ConfigError: describes the first error.
    """
    _check_secrets(asdict(config), "")
    _check_finite(asdict(config), "")
    for key in NOT_EMPTY:
        if attrgetter(key)(config) == "":
            raise ConfigError(f"{key} is ''; it must not be empty")
    _check_paths(config)
    with torch.device("cpu"):  # whatever torch's default device is: the batches of two are made here
        check_functions(config)
    check_sources(config)
    check_split_columns(config)
    _check_rewards(config)
    _check_numbers(config)
    check_environment(config)
    check_lora(config.lora)
    check_quantization(config.model, config.lora)
    check_rope(config.model.rope)
    _check_chat(config)
    _check_curriculum(config)
    _check_sampling(config)
    _check_eval_sets(config)
    _check_selection(config)
    _check_objective(config)
    check_teacher(config)
    for name, noun in (("wandb", "a project"), ("trackio", "a project"), ("mlflow", "an experiment")):
        value = getattr(config.log, name)
        if (value or "").lower() in ("true", "false", "yes", "no", "on", "off"):
            raise ConfigError(f"log.{name} is {value!r}; it must be the name of {noun}, or null")
    if config.name in ("", ".", "..") or "/" in config.name:
        raise ConfigError(f"name is {config.name!r}; it must be the name of one folder, which is created in output_dir")
    if config.resume is not None and config.overwrite:
        raise ConfigError(f"resume is {config.resume!r} and overwrite is true; a run is continued or removed, not both")
    if config.resume not in (None, "auto", "force") and split_resume(config.resume) is None:
        known = sorted(path.name for path in Path(config.resume).parent.glob("step-*"))
        others = f", of which {Path(config.resume).parent} holds {', '.join(known)}" if known else ""
        raise ConfigError(
            f"resume is {config.resume!r}; it must be auto, force, null, or the folder of a run or of one of its "
            f"checkpoints{others}"
        )


NOT_EMPTY = (  # an empty one would mean the shell's folder, or would be taken for another key's value
    *("model.path", "data.path", "data.subset", "data.split", "data.eval_path", "data.eval_split"),
    *("model.revision", "data.chat_template"),
    *("teacher.path", "teacher.adapter", "teacher.prompt", "lora.path"),
    *("output_dir", "sft.output", "environment.name", "tool_parser"),
)

# arguments of apply_chat_template that are no variables of the template
SET_BY_RENDERING = (
    *("conversation", "messages", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "tools", "documents"),
)
READ_PATHS = ("model.path", "data.path", "data.eval_path", "resume", "teacher.path", "teacher.adapter", "lora.path")
WRITTEN_PATHS = ("name", "output_dir", "sft.output")
MAX_WRITTEN_BYTES = MAX_PATH_BYTES - 256  # the folders and files below it have names too

SECRET = re.compile(
    r"""://[^/@\s]+:[^/@\s]+@ | \b(?:hf|ghp|gho)_[A-Za-z0-9]{30,} | \bgithub_pat_\w{30,}
        | \bglpat-[\w-]{20,} | \bsk-(?:\w+-)*[A-Za-z0-9]{32,}""",
    re.X,
)


def _check_paths(config: RunConfig) -> None:
    """Refuse paths that no file system can have."""
    paths = [(key, attrgetter(key)(config), MAX_PATH_BYTES) for key in READ_PATHS]
    paths += [(key, attrgetter(key)(config), MAX_WRITTEN_BYTES) for key in WRITTEN_PATHS]
    paths += [(f"evaluation.sets[{i}].path", x.path, MAX_PATH_BYTES) for i, x in enumerate(config.evaluation.sets)]
    for i, source in enumerate(config.data.sources):
        paths += [(f"data.sources[{i}].{key}", getattr(source, key), MAX_PATH_BYTES) for key in ("path", "eval_path")]
    for key, path, max_bytes in paths:
        if path is not None and (problem := describe_impossible_path(path, max_bytes)):
            raise ConfigError(f"{key} {problem}")


def _check_secrets(value: Any, key: str) -> None:
    """Refuse passwords and tokens, because the configuration is written to the run folder and to logs."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_secrets(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _check_secrets(inner, f"{key}[{i}]")
    elif isinstance(value, str) and SECRET.search(value):
        raise ConfigError(
            f"{key} holds a password or token, which would be written to logs; pass it in an environment variable"
        )


def _check_rewards(config: RunConfig) -> None:
    function = REWARDS.get(config.evaluation.reward)
    _check_takes_completions(config.evaluation.reward, function)
    if required := get_fact(function, "required"):
        raise ConfigError(
            f"evaluation.reward is {config.evaluation.reward!r}, which needs the argument {required[0]}; only a reward "
            f"that needs no arguments can measure the accuracy"
        )
    if problem := _describe_wrong_arguments(config, function):
        raise ConfigError(f"evaluation.reward is {config.evaluation.reward!r}, whose argument {problem}")
    if reads_other_rewards(function):
        raise ConfigError(
            f"evaluation.reward is {config.evaluation.reward!r}, which reads the other rewards; an evaluation has none"
        )
    is_taught = config.teacher.trains or asks_for_teacher(config) or config.environment.gives_reward
    lists = {"rewards": config.rewards}
    lists |= {f"data.sources[{i}].rewards": x.rewards for i, x in enumerate(config.data.sources) if x.rewards}
    names = {config.label_reward(reward.name) for rewards in lists.values() for reward in rewards}
    for key, rewards in lists.items():
        _check_functions(config, key, rewards)
        if len({reward.name for reward in rewards}) < len(rewards) or not (rewards or is_taught):
            hint = "; only with a teacher or an environment that gives rewards there may be none: "
            hint = "" if rewards else f"{hint}{HOW_TO_SET}, or environment.name"
            raise ConfigError(f"{key} must name at least one reward, and none of them twice{hint}")
        for i, reward in enumerate(rewards):
            label = config.label_reward(reward.name)
            for suffix in ("_std", "_square"):  # of metrics of the other reward
                if (other := label.removesuffix(suffix)) != label and other in names:
                    raise ConfigError(
                        f"{key}[{i}].name is {reward.name!r}, but rewards/{label} is a metric of the reward "
                        f"{other}; give one of the two functions another name"
                    )
        if all(reward.weight == 0 for reward in rewards) and not is_taught:
            raise ConfigError(
                f"{key}: every weight is 0, so there is nothing to learn; at least one must differ from 0"
            )


def _check_functions(config: RunConfig, key: str, rewards: Sequence[RewardConfig]) -> None:
    """Check the function of each reward in the list `key`, and its arguments."""
    for i, reward in enumerate(rewards):
        place = f"{key}[{i}]"
        function = REWARDS.build(reward.name, reward.args, f"{place}.args")
        _check_takes_completions(reward.name, function)
        if problem := _describe_wrong_arguments(config, function):
            raise ConfigError(f"{place}.args.{problem}")
        if reads_other_rewards(function):
            _check_other_rewards(place, reward.name, function, rewards)


def _check_takes_completions(name: str, function: Callable) -> None:
    parameters = inspect.signature(function).parameters
    positional = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL")
    if "completions" not in parameters and not any(p.kind.name in positional for p in parameters.values()):
        raise ConfigError(f"reward {name} takes no completions; its first parameter must be the list of completions")


def _describe_wrong_arguments(config: RunConfig, function: Callable) -> str | None:
    """Return which argument of a reward does not fit the others or trainer.reward_timeout, and why, or None."""
    arguments = {name: p.default for name, p in keyword_arguments(function).items()}
    limit = config.trainer.reward_timeout
    if "reward_timeout" in arguments:
        given = getattr(function, "keywords", {}).get("reward_timeout", limit)
        if given > limit:
            return f"reward_timeout is {given:g}; it must be at most trainer.reward_timeout ({limit:g})"
        arguments["reward_timeout"] = given
    check = get_fact(function, "check_arguments")
    return check(arguments) if check else None


def _check_other_rewards(place: str, name: str, function: Callable, rewards: Sequence[RewardConfig]) -> None:
    """Check that the rewards that a reward reads are among the others, and do not read others themselves."""
    readable = [reward.name for reward in rewards if not reads_other_rewards(REWARDS.get(reward.name))]
    if not readable:
        raise ConfigError(f"{place} is {name}, which reads the values of other rewards, but there is none")
    argument = get_fact(function, "names_reward")
    wanted = argument and keyword_arguments(function)[argument].default
    if argument and find_label(wanted, readable) is None:
        raise ConfigError(
            f"{place}.args.{argument} is {wanted!r}; it must be another reward of the run: {', '.join(readable)}"
        )


def _check_objective(config: RunConfig) -> None:
    """Check the ranges of the objective's switches, and refuse those that exclude each other."""
    loss, reference = config.loss, config.reference
    for name, value in (("loss.top_entropy", loss.top_entropy), ("reference.mixing", reference.mixing)):
        if not 0 < value <= 1:
            raise ConfigError(f"{name} is {value}; it must be above 0 and at most 1")
    for name, value in (("loss.kl_target", loss.kl_target), ("loss.kl_horizon", loss.kl_horizon)):
        if value is not None and not value > 0:
            raise ConfigError(f"{name} is {value}; it must be above 0")
    if not loss.entropy_min <= loss.entropy_coef <= loss.entropy_max and loss.entropy_target is not None:
        raise ConfigError(
            f"loss.entropy_coef is {loss.entropy_coef}; with loss.entropy_target it must be from loss.entropy_min "
            f"({loss.entropy_min}) to loss.entropy_max ({loss.entropy_max})"
        )
    if loss.kl_target is not None and not loss.kl_coef > 0:
        raise ConfigError(
            "loss.kl_target adapts loss.kl_coef, which is 0; set loss.kl_coef above 0 as the initial value"
        )
    if reference.every and not loss.kl_coef > 0:
        raise ConfigError(
            f"reference.every is {reference.every}, but loss.kl_coef 0 uses no reference; "
            "set reference.every to 0 or loss.kl_coef above 0"
        )
    if config.lora.r == 0 and (loss.kl_coef > 0 or config.log.exact_kl_every):
        key, value = "loss.kl_coef", loss.kl_coef
        if not loss.kl_coef:
            key, value = "log.exact_kl_every", config.log.exact_kl_every
        raise ConfigError(
            f"{key} is {value}, but lora.r is 0; without an adapter there is no reference, so it must be 0"
        )
    if get_fact(ADVANTAGES.get(config.advantage.name), "reads_components"):
        setting = None
        if loss.kl_coef and loss.kl_in == "reward":
            setting = "loss.kl_in reward"
        if get_fact(TRUNCATIONS.get(config.truncation.name), "changes_reward"):
            setting = f"truncation {config.truncation.name}"
        if setting:
            raise ConfigError(
                f"advantage {config.advantage.name} reads each reward, but {setting} changes only their sum; "
                "change one of the two settings"
            )


MIN_ADAM_EPS = 1e-30  # float32 still holds it
MINIMUMS = {  # smallest value -> keys; null, auto and epoch pass where a key allows them
    2: ("sampling.group_size",),
    1: (
        *("trainer.completions_per_step", "trainer.num_minibatches", "trainer.num_passes", "trainer.max_skipped_steps"),
        *("trainer.num_steps", "trainer.tokens_per_micro_batch", "sampling.max_new_tokens", "sampling.rows_at_once"),
        *("data.max_prompt_tokens", "data.limit", "data.curriculum.rest_epochs"),
        *("evaluation.batch_size", "checkpoint.keep"),
        *("environment.max_turns", "environment.max_turn_tokens", "environment.max_answer_tokens"),
        *("log.every", "log.exact_kl_tokens"),
    ),
    0: (
        *(
            "loss.kl_coef",
            "loss.log_ratio_coef",
            "loss.positive_nll_coef",
            "loss.echo_coef",
            "loss.router_aux_coef",
            "loss.entropy_coef",
            "loss.entropy_delta",
            "advantage.min_group_std",
            "reference.every",
        ),
        *("engine.max_grad_norm", "engine.warmup_steps", "engine.weight_decay", "sampling.dynamic_attempts"),
        "data.curriculum.rest_after",
        *("trainer.hang_timeout", "trainer.max_failed_rewards", "trainer.max_restarts", "debug.dump_batches"),
        *("trainer.early_stopping", "trainer.early_stopping_delta"),
        *("log.exact_kl_every", "log.evaluation_completions", "evaluation.num_tasks", "evaluation.every"),
        *("checkpoint.every", "lora.r", "seed", "teacher.coef", "teacher.kl_coef"),
    ),
}


def _check_numbers(config: RunConfig) -> None:
    for minimum, keys in MINIMUMS.items():
        for key in keys:
            value = attrgetter(key)(config)
            if not isinstance(value, str | None):
                _check_minimum(key, value, minimum)
    if config.sampling.group_size % config.trainer.num_minibatches:
        raise ConfigError(
            f"trainer.num_minibatches is {config.trainer.num_minibatches}; it must divide sampling.group_size "
            f"({config.sampling.group_size})"
        )
    if config.trainer.max_failed_rewards > 1:
        raise ConfigError(
            f"trainer.max_failed_rewards is {config.trainer.max_failed_rewards}; it is a share and must be at most 1"
        )
    if not 0 <= config.data.max_unjudged <= 1:
        raise ConfigError(f"data.max_unjudged is {config.data.max_unjudged}; it is a share, from 0 to 1")
    if not 0 <= config.lora.dropout < 1:
        raise ConfigError(f"lora.dropout is {config.lora.dropout}; it must be at least 0 and below 1")
    for key in ("trainer.reward_timeout", "environment.timeout", "trainer.epochs", "lora.alpha"):
        if not attrgetter(key)(config) > 0:
            raise ConfigError(f"{key} is {attrgetter(key)(config)}; it must be above 0")
    _check_optimizer(config)


def _check_optimizer(config: RunConfig) -> None:
    """Check the numbers of AdamW."""
    engine = config.engine
    if not 0 < engine.learning_rate <= 1:
        raise ConfigError(f"engine.learning_rate is {engine.learning_rate}; it must be above 0 and at most 1")
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(engine, key) < 1:
            raise ConfigError(f"engine.{key} is {getattr(engine, key)}; it must be at least 0 and below 1")
    if not engine.adam_eps >= MIN_ADAM_EPS:
        raise ConfigError(
            f"engine.adam_eps is {engine.adam_eps}; it must be at least {MIN_ADAM_EPS:g}, because a weight whose "
            "gradient is 0 would become NaN"
        )


def _check_finite(value: Any, key: str) -> None:
    """Refuse infinite numbers, which are no setting; functions may take them as arguments."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name != "args":
                _check_finite(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _check_finite(inner, f"{key}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} is {value}; it must be a finite number")


def _check_chat(config: RunConfig) -> None:
    """Refuse settings of the chat template that the prompt does not use, and those that are set elsewhere."""
    data, uses_template = config.data, any(config.of_source(x).data.prompt == "chat" for x in config.source_names)
    for key in ("chat_template", "chat_template_kwargs"):
        if getattr(data, key) and not uses_template:
            raise ConfigError(
                f"data.{key} is set, but data.prompt is {data.prompt}, which uses no chat template; set data.prompt to "
                f"chat"
            )
    for name in data.chat_template_kwargs:
        if name in SET_BY_RENDERING:
            raise ConfigError(
                f"data.chat_template_kwargs has {name!r}, which is set by the prompt itself; leave it out"
            )


def _check_curriculum(config: RunConfig) -> None:
    """Check the bounds of a curriculum, and that a reward says which completions are right."""
    curriculum = config.data.curriculum
    bounds = curriculum.prefer
    if bounds and not (len(bounds) == 2 and 0 <= bounds[0] < bounds[1] <= 1):
        raise ConfigError(
            f"data.curriculum.prefer is {bounds}; it must be two pass rates [low, high] from 0 to 1, or [] for none"
        )
    for source in config.source_names if curriculum.is_on else ():
        part = config.of_source(source)
        name, place = part.evaluation.reward, f" of the source {source}" if source else ""
        if all(reward.name != name for reward in part.rewards):
            raise ConfigError(
                f"data.curriculum needs evaluation.reward ({name}) among the rewards{place}, because a completion is "
                f"right if that reward is 1.0; add it to rewards, with weight 0 if it is not to be trained"
            )


def _check_sampling(config: RunConfig) -> None:
    """Check the temperature of training, and the temperature and the truncation of evaluation."""
    if problem := describe_temperature(config.sampling.temperature):
        raise ConfigError(
            f"sampling.temperature is {config.sampling.temperature}; {problem} (that of evaluation may be 0)"
        )
    if "" in config.sampling.stop_strings:
        raise ConfigError(f"sampling.stop is {config.sampling.stop!r}; a text that ends a completion must not be empty")
    temperature = config.evaluation.temperature
    truncation = {name: getattr(config.evaluation, name) for name in ("top_k", "top_p", "min_p")}
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"evaluation.temperature is {temperature}; it must be at least 0 (0: greedy)")
    if temperature == 0:
        for name, value in truncation.items():
            if value is not None:
                raise ConfigError(
                    f"evaluation.{name} is {value}, but evaluation.temperature is 0 (greedy); "
                    f"set evaluation.{name} to null or the temperature above 0"
                )
        return
    try:
        SamplingParams(temperature, **truncation)
    except ValueError as error:
        raise ConfigError(f"evaluation.{error}") from None


def _check_eval_sets(config: RunConfig) -> None:
    """Check the names and the numbers of tasks of the evaluation sets, and the name of the one that selects."""
    names = [part.name for part in config.evaluation.sets]
    if names and config.data.sources:
        raise ConfigError(
            "evaluation.sets and data.sources are both set; every source has an evaluation set of its own, so leave "
            "evaluation.sets out"
        )
    names += [source.name for source in config.data.sources]
    for i, part in enumerate(config.evaluation.sets):
        if not SET_NAME.fullmatch(part.name):
            raise ConfigError(
                f"evaluation.sets[{i}].name is {part.name!r}; it must be letters, digits, points, underscores or "
                f"hyphens"
            )
        if part.name in names[:i]:
            raise ConfigError(
                f"evaluation.sets[{i}].name is {part.name!r}, as that of an earlier set; names must differ"
            )
        for key in ("path", "subset", "split"):
            if getattr(part, key) == "":
                raise ConfigError(f"evaluation.sets[{i}].{key} is ''; it must not be empty")
        if part.num_tasks is not None:
            _check_minimum(f"evaluation.sets[{i}].num_tasks", part.num_tasks, 1)
        if part.subset is not None and part.path is None and part.split is None:
            raise ConfigError(
                f"evaluation.sets[{i}].subset is {part.subset!r}, but the set has no path and no split, so it is a "
                f"part of the run's own held-out rows; set its split, or leave the subset null"
            )
    if config.evaluation.select is not None and config.evaluation.select not in names:
        key = "data.sources" if config.data.sources else "evaluation.sets"
        known = f"one of {key}: {', '.join(names)}" if names else "null without evaluation.sets"
        raise ConfigError(f"evaluation.select is {config.evaluation.select!r}; it must be {known}")


def _check_selection(config: RunConfig) -> None:
    """Check that there are evaluations for what is selected by them."""
    evaluation, patience = config.evaluation, config.trainer.early_stopping
    if config.checkpoint.keep_best and not evaluation.num_tasks:
        raise ConfigError("checkpoint.keep_best is true, but evaluation.num_tasks is 0; the best needs evaluations")
    for key in ("num_tasks", "every"):
        if patience and not getattr(evaluation, key):
            raise ConfigError(
                f"trainer.early_stopping is {patience}, but evaluation.{key} is 0, so there are no evaluations during "
                f"training; set it above 0"
            )
    if config.trainer.early_stopping_delta >= 1:
        raise ConfigError(
            f"trainer.early_stopping_delta is {config.trainer.early_stopping_delta:g}; it is a rise of the accuracy, a "
            f"share, and must be below 1"
        )


def prompts_per_rank(config: RunConfig, world_size: int) -> int:
    """Return N, the number of prompts of one step on one rank.

    Raises:
        ConfigError: trainer.completions_per_step is not a multiple of the group size times the number of ranks.
    """
    total, group = config.trainer.completions_per_step, config.sampling.group_size
    if total % (group * world_size):
        raise ConfigError(
            f"trainer.completions_per_step is {total}; it must be a multiple of sampling.group_size × processes "
            f"= {group} × {world_size} = {group * world_size}"
        )
    return total // group // world_size


def _check_minimum(key: str, value: float, minimum: float) -> None:
    if not value >= minimum:  # refuses NaN too
        raise ConfigError(f"{key} is {value}; it must be at least {minimum}")
