"""A run's configuration: the YAML's sections and keys are the fields below, and configs/tiny.yaml comments every one.

Whatever the file leaves out has the default given here. Nothing that a user wrote is changed silently: it runs as
written, or one sentence says why not (config_check.py). config_file.py reads and writes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ModelConfig:
    path: str = "builtin:tiny"  # hub id, local folder, or builtin:tiny
    precision: Literal["auto", "bf16", "fp16", "fp32"] = (
        "auto"  # auto: bf16 where the GPU has it, fp16 on older ones, fp32 on CPU
    )
    attention: str = "sdpa"  # transformers' attn_implementation
    gradient_checkpointing: bool | Literal["auto"] = "auto"  # auto: only where the longest completion needs it
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
    max_prompt_tokens: int = 512
    long_prompts: Literal["drop", "truncate_left", "error"] = "drop"  # longer ones: left out and counted; cut; refused


@dataclass(frozen=True)
class SamplingConfig:
    group_size: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    dynamic_attempts: int = 0  # how often tied groups are replaced by freshly drawn prompts in a step; 0: never
    rows_at_once: int | None = None  # completions decoded at once on one rank; null: all that fit
    decoder: Literal["auto", "plain"] = "auto"  # plain: the model's own forward; auto: a faster one where there is


@dataclass(frozen=True)
class RewardConfig:
    name: str
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FunctionConfig:
    """A function by name, and its keyword-only arguments."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdvantageConfig:
    name: str = "grpo"
    args: dict[str, Any] = field(default_factory=dict)
    min_group_std: float = 0.0  # a group whose rewards spread less counts as tied


@dataclass(frozen=True)
class LossConfig:
    """Of a token: the surrogate, masked and weighed, + kl_coef KL; averaged, less entropy_coef * mean entropy."""

    name: str = "grpo"
    args: dict[str, Any] = field(default_factory=dict)
    average: str = "sequence"
    kl: str = "k3"
    kl_coef: float = 0.04  # 0: no reference forward at all
    kl_in: Literal["loss", "reward"] = "loss"
    kl_target: float | None = None  # KL per token that kl_coef is steered to; null: it stays
    kl_horizon: int = 10_000  # completions over which it is
    entropy_coef: float = 0.0
    entropy_target: float | None = None  # nats per token that entropy_coef is steered to; null: it stays
    entropy_delta: float = 0.005  # its change in a step
    entropy_min: float = 0.0
    entropy_max: float = 1.0
    top_entropy: float = 1.0  # the share of tokens, those of the highest entropy, that the surrogate trains
    off_policy_mask: float | None = None  # completions with A < 0 whose mean l_roll - l is above it are left out
    rollout_correction: FunctionConfig = field(default_factory=lambda: FunctionConfig("none"))


@dataclass(frozen=True)
class ReferenceConfig:
    every: int = 0  # steps after which the reference moves towards the policy; 0: it stays the base model
    mixing: float = 1.0  # how far: 1 is all the way


@dataclass(frozen=True)
class TrainerConfig:
    num_steps: int | None = None  # null: from epochs
    epochs: float = 3
    completions_per_step: int = 64  # over all ranks
    tokens_per_micro_batch: int | Literal["auto"] = "auto"  # in one forward and backward on one rank; auto: what fits
    num_minibatches: int = 1  # optimizer steps in one pass over a step's completions
    num_passes: int = 1
    max_skipped_steps: int = 10  # steps in a row whose gradient is not finite, after which the run ends
    hang_timeout: float = 1200  # seconds that a rank may stand still before the run ends; 0: for ever
    reward_timeout: float = 30  # seconds that a reward of your own may take for a step's completions of one rank
    max_failed_rewards: float = 0.5  # the share of the last 10 steps' completions that one reward may fail on
    max_restarts: int = 0  # how often the launcher starts again from the last checkpoint after a rank has died


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
    deepspeed: str | dict[str, Any] = field(default_factory=dict)  # a JSON file (beside the run config, or a path), or
    # its content; what it leaves out is as in configs/ds_zero2.json


@dataclass(frozen=True)
class EvaluationConfig:
    every: int | Literal["epoch"] = 0  # steps; 0: only before and after
    num_tasks: int = 500  # 0: no evaluation
    batch_size: int = 64  # prompts sampled at once on one rank
    reward: str = "correct_answer"  # 1.0 counts as correct
    temperature: float = 0.0  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    every: int | Literal["epoch"] = "epoch"  # steps; 0: only at the end
    keep: int = 2


@dataclass(frozen=True)
class LogConfig:
    every: int = 10  # steps between lines on the terminal; the files get every step
    completions: bool = True  # write completions.jsonl
    evaluation_completions: int = 20  # of the first held-out tasks, at every evaluation: evaluation_completions.jsonl
    verbose: bool = False  # let DeepSpeed, torch and transformers talk
    exact_kl_every: int = 0  # steps between measurements of the KL over the whole vocabulary; 0: none
    exact_kl_tokens: int = 256  # on how many tokens of each rank
    tensorboard: bool = False  # event files in <run folder>/tensorboard
    wandb: str | None = None  # a project of Weights & Biases


@dataclass(frozen=True)
class DebugConfig:
    dump_batches: int = 0  # steps between batches that are kept in batches/, for `replay`; 0: none


@dataclass(frozen=True)
class TargetConfig:
    template: str  # what the model shall answer; columns in braces
    share: float = 1.0  # of the tasks, beside the other targets' shares


@dataclass(frozen=True)
class SftConfig:
    """Only read by the `sft` command."""

    targets: list[TargetConfig] = field(default_factory=lambda: [TargetConfig("<think>{cot}</think>\n{answer}")])
    new_model: dict[str, int] | None = None  # sizes of a new Qwen2 with its own tokenizer, instead of model.path
    output: str | None = None  # null: <run folder>/model, or <run folder>/adapter where lora.r is above 0
    save_precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: as trained


@dataclass(frozen=True)
class RunConfig:
    name: str = "run"  # the run folder is <output_dir>/<name>
    output_dir: str = "runs"
    seed: int = 0
    alerts: Literal["warn", "stop"] = "warn"  # what to do when the metrics say that something goes wrong
    resume: str | None = None  # auto: from the newest checkpoint of this name, if there is one; force; or a run folder
    overwrite: bool = False  # a run that lies in the run folder is removed; else it is refused
    preset: str | None = None  # a published objective; what the file says itself comes before it
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rewards: list[RewardConfig] = field(default_factory=lambda: [RewardConfig("correct_answer")])
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    truncation: FunctionConfig = field(default_factory=lambda: FunctionConfig("keep"))
    loss: LossConfig = field(default_factory=LossConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    sft: SftConfig = field(default_factory=SftConfig)

    @property
    def prompts_per_step(self) -> int:
        """Prompts of one step over all ranks."""
        return self.trainer.completions_per_step // self.sampling.group_size
