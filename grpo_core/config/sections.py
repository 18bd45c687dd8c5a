"""The configuration of a run: the dataclasses below are the sections and keys of the YAML file.

A key that the file leaves out has the default given here; configs/tiny.yaml explains every key. A value that a user
wrote is used as written, or refused in one sentence (config/checks.py). config/files.py reads and writes
configurations.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from grpo_core.objective.reward_labels import label_rewards


@dataclass(frozen=True)
class ModelConfig:
    """The base model and how it is loaded."""

    path: str = "builtin:tiny"  # hub id, local folder, or builtin:tiny
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16, fp16 on GPUs without it, fp32 on the CPU
    attention: str = "sdpa"  # transformers' attn_implementation
    gradient_checkpointing: bool | Literal["auto"] = "auto"  # auto: on if the longest completion does not fit without
    trust_remote_code: bool = False
    revision: str | None = None  # branch, tag or commit of a hub id; null: its main branch
    rope: dict[str, Any] = field(default_factory=dict)  # laid over the rotary parameters in the model's configuration
    quantize: Literal["nf4"] | None = None  # the weights of the layers in 4 bits, by bitsandbytes
    double_quant: bool = True  # with quantize: the scales of the blocks are quantised, too


@dataclass(frozen=True)
class LoraConfig:
    """The LoRA adapter, which is what is trained."""

    r: int = 16  # rank; 0: no adapter, all weights are trained and there is no reference (loss.kl_coef must be 0)
    alpha: float = 32
    dropout: float = 0.0
    target_modules: list[str] | str = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    path: str | None = None  # folder of an adapter to start from, whose own settings count; null: a new adapter
    use_rslora: bool = False  # scale by alpha / sqrt(r) instead of alpha / r
    use_dora: bool = False  # learn the length of every weight's rows apart from their direction
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True  # true: A random, B zero; false: both random
    exclude_modules: list[str] | str | None = None  # modules of target_modules that are left out
    layers_to_transform: list[int] | int | None = None  # numbers of the layers that get an adapter; null: all
    rank_pattern: dict[str, int] = field(default_factory=dict)  # module name or regular expression -> its own r
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # module name or regular expression -> its own alpha
    modules_to_save: list[str] | None = None  # modules that are trained whole, such as lm_head
    target_parameters: list[str] | None = None  # weights that are no modules, such as experts.gate_up_proj
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None  # tokens whose embeddings are trained


@dataclass(frozen=True)
class CurriculumConfig:
    """The rules by which the pass rates of the prompts change their order; by default there is none."""

    rest_after: int = 0  # a prompt rests when all its completions were right this many times running; 0: never
    rest_epochs: int = 1  # epochs for which it rests
    prefer: list[float] = field(default_factory=list)  # [low, high]: others come every second epoch; []: all come

    @property
    def is_on(self) -> bool:
        """Return whether there is a rule."""
        return self.rest_after > 0 or bool(self.prefer)


@dataclass(frozen=True)
class DataConfig:
    """The training and evaluation data, and how a prompt is made from a row."""

    # hub id; folder; file (json, jsonl, csv, tsv, parquet); builtin:word_problems or builtin:large_word_problems;
    # reasoning_gym:TASK
    path: str = "builtin:word_problems"
    args: dict[str, Any] = field(default_factory=dict)  # arguments of a task of Reasoning Gym
    subset: str | None = None
    split: str = "train"
    limit: int | None = None  # number of rows to use, from the start; null: all
    eval_path: str | None = None  # null: data.path
    eval_split: str | None = None  # both null: the built-in test split, or held-out training rows
    columns: dict[str, str] = field(default_factory=dict)  # name used here -> column, or path such as extra_info.split
    prompt: Literal["template", "chat"] = "template"
    template: str = "Question: {question}\n"  # the prompt; with prompt chat, the user's turn
    last_turn: Literal["gold", "drop", "continue"] = "gold"  # the assistant's turn at the end of a conversation
    system: str | None = None  # with prompt chat, the system turn
    chat_template: str | None = None  # Jinja file, or its content, in place of the model's own chat template
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # variables of the chat template
    max_prompt_tokens: int = 512
    long_prompts: Literal["drop", "truncate_left", "error"] = "drop"  # what to do with longer prompts
    bad_rows: Literal["error", "drop"] = "error"  # what to do with rows that cannot be tasks
    max_unjudged: float = 0.05  # share of gold answers that a reward cannot judge, above which the run is refused
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    sources: list[SourceConfig] = field(default_factory=list)  # several sources, mixed, in place of path


@dataclass(frozen=True)
class SamplingConfig:
    """The sampling of completions for training."""

    group_size: int = 8  # completions per prompt
    max_new_tokens: int = 256
    temperature: float = 1.0
    dynamic_attempts: int = 0  # times per step that tied groups are replaced by new prompts; 0: never
    rows_at_once: int | None = None  # completions decoded together on one rank; null: all that fit
    decoder: Literal["auto", "modules", "plain"] = "auto"  # auto: the fastest that supports the model (docs/models.md)
    stop: list[str] | str = field(default_factory=list)  # texts that end a completion and stay in it; one, or a list
    replay_routing: bool = False  # train a mixture of experts with the experts that the sampler chose

    @property
    def stop_strings(self) -> list[str]:
        """Return the texts that end a completion."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


@dataclass(frozen=True)
class RewardConfig:
    """One reward function; the reward of a completion is the weighted sum of all."""

    name: str
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceConfig:
    """One of several sources of the data; its evaluation set has its name."""

    path: str  # as data.path
    args: dict[str, Any] = field(default_factory=dict)  # as data.args
    name: str = ""  # of its metrics and its evaluation set; "": made from the path
    weight: float = 1.0  # share of the prompts, relative to the other sources
    subset: str | None = None
    split: str = "train"
    limit: int | None = None  # null: data.limit
    eval_path: str | None = None  # null: path
    eval_split: str | None = None  # both null: the built-in test split, or held-out rows of the source
    columns: dict[str, str] | None = None  # null: data.columns
    template: str | None = None  # null: data.template
    prompt: Literal["template", "chat"] | None = None  # null: data.prompt
    system: str | None = None  # null: data.system; "": none
    rewards: list[RewardConfig] = field(default_factory=list)  # of its completions; []: the run's rewards
    eval_reward: str | None = None  # null: evaluation.reward

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", name_source(self.path))


def name_source(path: str) -> str:
    """Return the name of a source without one: the last part of its path, without the ending of a file.

    >>> [name_source(path) for path in ("data/algebra.jsonl", "openai/gsm8k", "builtin:word_problems")]
    ['algebra', 'gsm8k', 'word_problems']
    """
    last = re.split("[/:]", path.rstrip("/"))[-1]
    return re.sub(r"[^A-Za-z0-9_.-]", "-", re.sub(r"\.(jsonl?|csv|tsv|parquet)$", "", last))


@dataclass(frozen=True)
class FunctionConfig:
    """A function by name, with its keyword-only arguments."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)


ENVIRONMENT_REWARD = "environment"  # name of the reward that is the sum of an environment's rewards of turns


@dataclass(frozen=True)
class EnvironmentConfig:
    """The environment that answers the policy between its turns; the limits also hold for tools."""

    name: str | None = None  # my_env.py:MyEnvironment, a class; null: a completion is one turn, unless there are tools
    args: dict[str, Any] = field(default_factory=dict)
    max_turns: int = 8  # of the policy in a completion; the last one gets no answer
    max_turn_tokens: int | None = None  # that the policy draws in one turn; null: as many as are left
    max_answer_tokens: int | None = None  # of an answer's text, which is cut to that; null: as many as are left
    timeout: float = 30.0  # seconds for one step of a completion's environment, or for the tool calls of a turn
    reward_weight: float = 1.0  # of the sum of the turns' rewards in the reward; 0: they are logged only

    @property
    def gives_reward(self) -> bool:
        """Return whether there is an environment whose rewards are trained."""
        return self.name is not None and self.reward_weight != 0


@dataclass(frozen=True)
class AdvantageConfig:
    """The advantage function."""

    name: str = "grpo"
    args: dict[str, Any] = field(default_factory=dict)
    min_group_std: float = 0.0  # a group whose rewards have a smaller std counts as tied


@dataclass(frozen=True)
class LossConfig:
    """The loss: sum over tokens of (surrogate + kl_coef KL) * token weight, minus entropy_coef * mean entropy.

    The surrogate is masked and weighted before the KL is added; config/formula.py renders the formula of a run.
    """

    name: str = "grpo"
    args: dict[str, Any] = field(default_factory=dict)
    average: str = "sequence"
    kl: str = "k3"
    kl_coef: float = 0.04  # 0: the reference is not computed
    kl_in: Literal["loss", "reward"] = "loss"
    kl_target: float | None = None  # KL per token to which kl_coef adapts; null: kl_coef is constant
    kl_horizon: int = 10_000  # completions over which kl_coef adapts; more is slower
    entropy_coef: float = 0.0
    entropy_target: float | None = None  # nats per token to which entropy_coef adapts; null: constant
    entropy_delta: float = 0.005  # change of entropy_coef per step
    entropy_min: float = 0.0
    entropy_max: float = 1.0
    top_entropy: float = 1.0  # the surrogate acts on this share of the tokens, those of highest entropy
    off_policy_mask: float | None = None  # leaves out completions with A < 0 and mean(l_roll - l) above this
    rollout_correction: FunctionConfig = field(default_factory=lambda: FunctionConfig("none"))
    normalize_correction: bool = False  # divide the weights by their mean over the optimizer step
    rejection: FunctionConfig = field(default_factory=lambda: FunctionConfig("none"))
    rejection_in: Literal["loss", "surrogate"] = "loss"  # surrogate: rejected tokens still count in the average
    log_ratio_coef: float = 0.0  # weight of (l - l_roll)^2, on all tokens
    positive_nll_coef: float = 0.0  # weight of the mean -l over the completions that are positive examples
    positive_nll_above: float = 0.0  # a completion with a reward above this is one
    echo_coef: float = 0.0  # weight of the mean -l over the tokens that the environment gave
    router_aux_coef: float = 0.0  # weight of the load-balancing loss of a mixture of experts, a mean over completions


@dataclass(frozen=True)
class ReferenceConfig:
    """Updates of the reference of the KL term."""

    every: int = 0  # steps between moves of the reference towards the policy; 0: the reference is the base model
    mixing: float = 1.0  # share of the way to the policy; 1: the reference becomes the policy


@dataclass(frozen=True)
class TeacherConfig:
    """A frozen model whose probabilities the policy learns, on completions that the policy itself draws.

    With path, adapter and prompt null there is no teacher. With path null the teacher shares the policy's base: it is
    that base with another adapter, or the policy itself with more in its prompt.
    """

    path: str | None = None  # model of the same vocabulary: hub id, local folder, or builtin:tiny; null: the policy's
    adapter: str | None = None  # folder of a LoRA adapter of that model
    prompt: str | None = None  # template with {prompt} and the row's columns; null: the policy's prompt
    coef: float = 1.0  # weight of l_teacher - l_old as advantage of each token; 0: not in the advantage
    kl: Literal["reverse", "forward"] | None = None  # KL over the vocabulary added to the loss; null: none
    kl_coef: float = 1.0  # its coefficient

    @property
    def exists(self) -> bool:
        """Return whether there is a teacher."""
        return any(value is not None for value in (self.path, self.adapter, self.prompt))

    @property
    def trains(self) -> bool:
        """Return whether the teacher has a part in the gradient."""
        return self.exists and (self.coef > 0 or (self.kl is not None and self.kl_coef > 0))


@dataclass(frozen=True)
class TrainerConfig:
    """The length of the run, the batch, and the limits after which a run ends."""

    num_steps: int | None = None  # sampling phases; null: from epochs
    epochs: float = 3
    completions_per_step: int = 64  # over all ranks
    tokens_per_micro_batch: int | Literal["auto"] = "auto"  # in one forward on one rank; auto: what fits
    num_minibatches: int = 1  # optimizer steps per pass over the completions of a step
    num_passes: int = 1  # passes over the completions of a step
    max_skipped_steps: int = 10  # consecutive steps without a finite gradient, after which the run ends
    hang_timeout: float = 1200  # seconds without progress on a rank, after which the run ends; 0: no limit
    reward_timeout: float = 30  # seconds for one call of a user's reward: a step's completions of one rank
    max_failed_rewards: float = 0.5  # the run ends if a reward fails on more of the last 10 steps' completions
    early_stopping: int = 0  # evaluations in a row without an improvement, after which the run ends; 0: never
    early_stopping_delta: float = 0.0  # least rise of the accuracy of evaluation.select that is an improvement
    max_restarts: int = 0  # restarts from the last checkpoint by the launcher after a rank has died


@dataclass(frozen=True)
class EngineConfig:
    """The optimizer and DeepSpeed."""

    learning_rate: float = 5e-5
    warmup_steps: int = 100  # optimizer steps
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warm-up
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping
    # a DeepSpeed JSON file, or its content; keys that it leaves out are as in configs/ds_zero2.json
    deepspeed: str | dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationSetConfig:
    """One of several evaluation sets; without path and split it is a part of the run's own held-out rows."""

    name: str  # its figures are eval/NAME/accuracy and so on
    path: str | None = None  # null: data.path
    subset: str | None = None  # null, without a path: data.subset
    split: str | None = None  # null: train; path and split both null: rows that are held out as without sets
    num_tasks: int | None = None  # null: evaluation.num_tasks


@dataclass(frozen=True)
class EvaluationConfig:
    """The evaluation on held-out tasks."""

    every: int | Literal["epoch"] = 0  # steps between evaluations; 0: only before and after training
    num_tasks: int = 500  # 0: no evaluation
    batch_size: int = 64  # prompts sampled together on one rank
    reward: str = "correct_answer"  # a task is correct if this reward is 1.0
    temperature: float = 0.0  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    sets: list[EvaluationSetConfig] = field(default_factory=list)  # []: one set without a name
    select: str | None = None  # name of the set whose accuracy selects; null: the first of sets, or of data.sources


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, from which a run can be resumed."""

    every: int | Literal["epoch"] = "epoch"  # steps between checkpoints; 0: only at the end
    keep: int = 2  # number of checkpoints to keep
    keep_best: bool = False  # also keep the one with the best accuracy of evaluation.select, as checkpoints/best


@dataclass(frozen=True)
class LogConfig:
    """Terminal output, log files and trackers."""

    every: int = 10  # steps between lines on the terminal; the files have every step
    completions: bool = True  # write completions.jsonl
    evaluation_completions: int = 20  # completions per evaluation in evaluation_completions.jsonl
    verbose: bool = False  # show the messages of DeepSpeed, torch and transformers
    exact_kl_every: int = 0  # steps between measurements of the KL over the whole vocabulary; 0: none
    exact_kl_tokens: int = 256  # tokens per rank on which the KL is measured
    tensorboard: bool = False  # event files in <run folder>/tensorboard
    wandb: str | None = None  # name of a Weights & Biases project; null: off
    trackio: str | None = None  # name of a trackio project; null: off
    mlflow: str | None = None  # name of an MLflow experiment; null: off


@dataclass(frozen=True)
class DebugConfig:
    """Data for the command `replay`."""

    dump_batches: int = 0  # steps between batches saved in batches/; 0: none


@dataclass(frozen=True)
class TargetConfig:
    """One answer that the supervised command `sft` trains."""

    template: str  # the answer, with columns in braces
    share: float = 1.0  # share of the tasks that get this target, relative to those of the other targets


@dataclass(frozen=True)
class SftConfig:
    """The section of the command `sft`; other commands ignore it."""

    targets: list[TargetConfig] = field(default_factory=lambda: [TargetConfig("<think>{cot}</think>\n{answer}")])
    new_model: dict[str, int] | None = None  # sizes of a new Qwen2 with its own tokenizer, which replaces model.path
    output: str | None = None  # null: <run folder>/model, or <run folder>/adapter where lora.r is above 0
    save_precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: as trained


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run."""

    name: str = "run"  # the run folder is <output_dir>/<name>
    output_dir: str = "runs"
    seed: int = 0
    alerts: Literal["warn", "stop"] = "warn"  # what to do when a metric shows a problem; stop: end the run
    resume: str | None = (
        None  # auto: continue this run from its newest checkpoint; force; a run's folder or a checkpoint's
    )
    overwrite: bool = False  # true: replace an existing run of this name; false: refuse to start
    preset: str | None = None  # a published objective by name; keys of the file override it
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    tools: list[str] = field(default_factory=list)  # functions that the policy may call: my_tools.py:search
    tool_parser: str | None = None  # my_parser.py:parse, which reads calls in a turn; null: as the chat template has it
    rewards: list[RewardConfig] = field(default_factory=lambda: [RewardConfig("correct_answer")])
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    truncation: FunctionConfig = field(default_factory=lambda: FunctionConfig("keep"))
    loss: LossConfig = field(default_factory=LossConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    sft: SftConfig = field(default_factory=SftConfig)

    @property
    def prompts_per_step(self) -> int:
        """Return the number of prompts of one step over all ranks."""
        return self.trainer.completions_per_step // self.sampling.group_size

    @property
    def selecting_set(self) -> str:
        """Return the name of the evaluation set whose accuracy selects; "" without named sets."""
        names = [part.name for part in self.evaluation.sets] or self.source_names
        return self.evaluation.select or names[0]

    @property
    def source_names(self) -> list[str]:
        """Return the names of data.sources; without sources the data has the name ""."""
        return [source.name for source in self.data.sources] or [""]

    @property
    def all_rewards(self) -> list[RewardConfig]:
        """Return the rewards of all sources, each name once: those of the run, where a source uses them, come first.

        Of several weights of a name the first that is not 0 counts. The last is the reward of the environment, if any.
        """
        sources, by_name = self.data.sources, dict[str, RewardConfig]()
        shared = self.rewards if not all(source.rewards for source in sources) or not sources else []
        for reward in [*shared, *(reward for source in sources for reward in source.rewards)]:
            if reward.name not in by_name or not by_name[reward.name].weight:
                by_name[reward.name] = reward
        return [*by_name.values(), *self.environment_rewards]

    @property
    def environment_rewards(self) -> list[RewardConfig]:
        """Return the reward of the environment, if there is one."""
        return [RewardConfig(ENVIRONMENT_REWARD, self.environment.reward_weight)] if self.environment.name else []

    @property
    def has_turns(self) -> bool:
        """Return whether completions have several turns."""
        return self.environment.name is not None or bool(self.tools)

    def label_reward(self, name: str) -> str:
        """Return the name in metrics of a reward, by its name here."""
        every = [*self.rewards, *(reward for source in self.data.sources for reward in source.rewards)]
        return label_rewards(reward.name for reward in every).get(name, name)

    def of_source(self, name: str) -> RunConfig:
        """Return the configuration of a run whose only data is the source `name`; without sources it is this one."""
        source = next((source for source in self.data.sources if source.name == name), None)
        if source is None:
            return self
        own = {key: getattr(source, key) for key in ("path", "args", "subset", "split", "eval_path", "eval_split")}
        for key in ("limit", "columns", "template", "prompt", "system"):
            value = getattr(source, key)
            own[key] = getattr(self.data, key) if value is None else value
        evaluation = replace(self.evaluation, reward=source.eval_reward or self.evaluation.reward)
        data = replace(self.data, sources=[], **own)
        return replace(self, data=data, rewards=source.rewards or self.rewards, evaluation=evaluation)


def use_supervised_objective(config: RunConfig) -> RunConfig:
    """Return `config` with the objective of the command `sft` instead of its own: the mean cross-entropy per token."""
    return replace(
        config,
        loss=LossConfig(name="reinforce", average="token", kl_coef=0.0),
        advantage=AdvantageConfig("dr_grpo"),
        truncation=FunctionConfig("keep"),
        reference=ReferenceConfig(),
        teacher=TeacherConfig(),
        log=replace(config.log, exact_kl_every=0),
    )
