"""A run's configuration: dataclasses, YAML with overrides, and the checks that need no model.

The YAML's sections and keys are the fields below; configs/tiny.yaml comments every one. Whatever the file leaves out
has the default given here. Nothing that a user wrote is changed silently: it runs as written, or one sentence says why
not.
"""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from grpo_core.advantages import ADVANTAGES
from grpo_core.losses import AVERAGES, KLS, LOSSES
from grpo_core.rewards import REWARDS
from grpo_core.schema import ConfigError, coerce, known


@dataclass(frozen=True)
class ModelConfig:
    path: str = "builtin:tiny"  # hub id, local folder, or builtin:tiny
    precision: Literal["auto", "bf16", "fp16", "fp32"] = (
        "auto"  # auto: bf16 where the GPU has it, fp16 on older ones, fp32 on CPU
    )
    attention: str = "sdpa"  # transformers' attn_implementation
    gradient_checkpointing: bool = False
    logprob_chunk: int = 1024  # tokens whose logits are held at once
    trust_remote_code: bool = False


@dataclass(frozen=True)
class LoraConfig:
    r: int = 16  # 0 trains all weights, and then there is no reference: kl_coef must be 0
    alpha: float = 32
    dropout: float = 0.0
    target_modules: list[str] | str = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])


@dataclass(frozen=True)
class DataConfig:
    path: str = "builtin:word_problems"  # hub id; folder or file (json, jsonl, csv, parquet); builtin:word_problems
    subset: str | None = None
    split: str = "train"
    limit: int | None = None  # use only the first so many rows
    eval_path: str | None = None  # null: the same path with eval_split
    eval_split: str | None = None  # both null: the built-in test split, or rows held out of the training data
    columns: dict[str, str] = field(default_factory=dict)  # our name -> the data set's, where they differ
    prompt: Literal["template", "chat"] = "template"
    template: str = "Question: {question}\n"  # with prompt: chat, the user's turn
    system: str | None = None  # with prompt: chat, the system turn
    max_prompt_tokens: int = 512  # longer prompts are left out, and counted


@dataclass(frozen=True)
class SamplingConfig:
    group_size: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0


@dataclass(frozen=True)
class RewardConfig:
    name: str
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdvantageConfig:
    name: str = "grpo"
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LossConfig:
    name: str = "grpo"
    args: dict[str, Any] = field(default_factory=dict)
    average: str = "sequence"
    kl: str = "k3"
    kl_coef: float = 0.04  # 0: no reference forward at all


@dataclass(frozen=True)
class TrainerConfig:
    num_steps: int | None = None  # null: from epochs
    epochs: float = 3
    completions_per_step: int = 64  # over all ranks
    micro_batch_size: int = 4  # completions in one forward on one rank; changes memory and speed, not the gradient
    num_minibatches: int = 1  # optimizer steps in one pass over a step's completions
    num_passes: int = 1


@dataclass(frozen=True)
class EngineConfig:
    learning_rate: float = 5e-5
    warmup_steps: int = 100  # optimizer steps
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warm-up
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping
    deepspeed: str | dict[str, Any] = "ds_zero2.json"  # a JSON file (beside the run config, or a path), or its content


@dataclass(frozen=True)
class EvaluationConfig:
    every: int | Literal["epoch"] = 0  # steps; 0: only before and after
    num_tasks: int = 500  # 0: no evaluation
    batch_size: int = 64  # prompts sampled at once on one rank
    reward: str = "correct_answer"  # 1.0 counts as correct


@dataclass(frozen=True)
class CheckpointConfig:
    every: int | Literal["epoch"] = "epoch"  # steps; 0: only at the end
    keep: int = 2


@dataclass(frozen=True)
class LogConfig:
    every: int = 10  # steps between lines on the terminal; the files get every step
    completions: bool = True  # write completions.jsonl
    verbose: bool = False  # let DeepSpeed, torch and transformers talk


@dataclass(frozen=True)
class TargetConfig:
    template: str
    share: float = 1.0


@dataclass(frozen=True)
class SftConfig:
    """Only read by the `sft` command."""

    targets: list[TargetConfig] = field(default_factory=lambda: [TargetConfig("<think>{cot}</think>\n{answer}")])
    new_model: dict[str, int] | None = None  # sizes of a new Qwen2 with its own tokenizer, instead of model.path
    output: str | None = None  # null: runs/<name>/model
    save_precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: as trained


@dataclass(frozen=True)
class RunConfig:
    name: str = "run"  # the run folder is <output_dir>/<name>
    output_dir: str = "runs"
    seed: int = 0
    resume: Literal["auto"] | None = None  # auto: go on from the newest checkpoint of this name, if there is one
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rewards: list[RewardConfig] = field(default_factory=lambda: [RewardConfig("correct_answer")])
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    sft: SftConfig = field(default_factory=SftConfig)

    @property
    def prompts_per_step(self) -> int:
        """Prompts of one step over all ranks."""
        return self.trainer.completions_per_step // self.sampling.group_size


def load(path: str | Path, overrides: list[str] = ()) -> RunConfig:
    """Read a YAML file, apply `section.key=value` overrides (values are YAML), and check what can be checked.

    Raises:
        ConfigError: a missing file, an unknown key, a value of the wrong type, or numbers that do not fit together.
    """
    path = Path(path)
    data = _read(path, yaml.safe_load, "YAML") or {}
    for override in overrides:
        _apply(data, override)
    config = build(RunConfig, data, "")
    deepspeed = config.engine.deepspeed
    if isinstance(deepspeed, str):  # the content, so that the written config.yaml alone re-runs the run
        beside = path.parent / deepspeed
        data.setdefault("engine", {})["deepspeed"] = _read(
            beside if beside.is_file() else Path(deepspeed), json.loads, "JSON"
        )
        config = build(RunConfig, data, "")
    check(config)
    return config


def dump(config: RunConfig) -> str:
    """The whole configuration as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True, width=120)


def build(cls: type, data: Any, key: str) -> Any:
    """A dataclass from nested mappings; list items that have only a name may be written as plain text.

    Raises:
        ConfigError: an unknown key, a missing value, or one of the wrong type.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{key or 'the config'} is {data!r}; it must be a mapping")
    hints, values = get_type_hints(cls), {}
    names = {f.name for f in fields(cls)}
    for name, value in data.items():
        if name not in names:
            raise ConfigError(f"unknown key {_join(key, name)}; {known(name, names)}")
        values[name] = _value(hints[name], value, _join(key, name))
    for f in fields(cls):
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{_join(key, f.name)} is missing")
    return cls(**values)


def check(config: RunConfig) -> None:
    """Names, arguments and ranges; what depends on the number of ranks is checked by `prompts_per_rank`.

    Raises:
        ConfigError: the first thing that does not hold.
    """
    ADVANTAGES.build(config.advantage.name, config.advantage.args, "advantage.args")
    LOSSES.build(config.loss.name, config.loss.args, "loss.args")
    KLS.get(config.loss.kl), AVERAGES.get(config.loss.average), REWARDS.get(config.evaluation.reward)
    for i, reward in enumerate(config.rewards):
        REWARDS.build(reward.name, reward.args, f"rewards[{i}].args")
    if len({reward.name for reward in config.rewards}) < len(config.rewards) or not config.rewards:
        raise ConfigError("rewards must name at least one reward, and each only once")
    if all(reward.weight == 0 for reward in config.rewards):
        raise ConfigError("rewards: every weight is 0, so there is nothing to learn")
    _check_numbers(config)


def _check_numbers(config: RunConfig) -> None:
    _at_least("sampling.group_size", config.sampling.group_size, 2)
    for name in ("completions_per_step", "micro_batch_size", "num_minibatches", "num_passes"):
        _at_least(f"trainer.{name}", getattr(config.trainer, name), 1)
    for name, value in (
        ("sampling.max_new_tokens", config.sampling.max_new_tokens),
        ("model.logprob_chunk", config.model.logprob_chunk),
        ("data.max_prompt_tokens", config.data.max_prompt_tokens),
        ("evaluation.batch_size", config.evaluation.batch_size),
        ("checkpoint.keep", config.checkpoint.keep),
        ("log.every", config.log.every),
    ):
        _at_least(name, value, 1)
    for name, value in (("trainer.num_steps", config.trainer.num_steps), ("data.limit", config.data.limit)):
        _at_least(name, 1 if value is None else value, 1)
    for name, value in (
        ("loss.kl_coef", config.loss.kl_coef),
        ("engine.max_grad_norm", config.engine.max_grad_norm),
        ("engine.warmup_steps", config.engine.warmup_steps),
        ("evaluation.num_tasks", config.evaluation.num_tasks),
        ("lora.r", config.lora.r),
        ("seed", config.seed),
    ):
        _at_least(name, value, 0)
    for name, every in (("evaluation.every", config.evaluation.every), ("checkpoint.every", config.checkpoint.every)):
        _at_least(name, 0 if every == "epoch" else every, 0)
    if config.sampling.group_size % config.trainer.num_minibatches:
        raise ConfigError(
            f"trainer.num_minibatches is {config.trainer.num_minibatches}; it must divide sampling.group_size "
            f"({config.sampling.group_size})"
        )
    if not 0 <= config.lora.dropout < 1:
        raise ConfigError(f"lora.dropout is {config.lora.dropout}; it must be from 0 up to, but not, 1")
    for name, value in (
        ("engine.learning_rate", config.engine.learning_rate),
        ("trainer.epochs", config.trainer.epochs),
    ):
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} is {value}; it must be above 0")
    if not config.sampling.temperature > 0 or config.sampling.temperature == math.inf:
        raise ConfigError(
            f"sampling.temperature is {config.sampling.temperature}; it must be above 0 (evaluation is greedy anyway)"
        )
    if config.lora.r == 0 and config.loss.kl_coef > 0:
        raise ConfigError(
            f"loss.kl_coef is {config.loss.kl_coef}, but lora.r is 0: without an adapter there is no reference"
        )


def prompts_per_rank(config: RunConfig, world_size: int) -> int:
    """N, the prompts of one step on one rank.

    Raises:
        ConfigError: completions_per_step does not divide into ranks and groups.
    """
    total, group = config.trainer.completions_per_step, config.sampling.group_size
    if total % (group * world_size):
        raise ConfigError(
            f"trainer.completions_per_step is {total}; it must be a multiple of sampling.group_size × processes "
            f"= {group} × {world_size} = {group * world_size}"
        )
    return total // group // world_size


def _value(kind: Any, value: Any, key: str) -> Any:
    if is_dataclass(kind):
        return build(kind, value, key)
    item = get_args(kind)[0] if get_origin(kind) is list else None
    if is_dataclass(item):
        items = value if isinstance(value, list) else [value]
        named = [{"name": x} if isinstance(x, str) and "name" in get_type_hints(item) else x for x in items]
        return [build(item, x, f"{key}[{i}]") for i, x in enumerate(named)]
    return coerce(value, kind, key)


def _apply(data: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not an override; write section.key=value")
    *sections, last = key.split(".")
    kind: Any = RunConfig
    for name in (*sections, last):
        kind = get_type_hints(kind).get(name) if is_dataclass(kind) else None
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"unknown key {key}; {section} has no keys of its own")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if kind in (str, str | None) and not isinstance(value, (str, type(None))):
        value = text  # a key that holds text: {question} is a template there, not a mapping
    data[last] = value


def _read(path: Path, parse: Any, kind: str) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not {kind}: {' '.join(str(error).split())}") from None


def _at_least(key: str, value: float, least: float) -> None:
    if not value >= least:  # NaN is refused too
        raise ConfigError(f"{key} is {value}; it must be at least {least}")


def _join(section: str, name: Any) -> str:
    return f"{section}.{name}" if section else str(name)
