"""Names that are not here, most of them TRL's, and what they are called here: the end of the sentence that refuses one.

docs/from_trl.md has all of TRL's options; here are those that are typed most.
"""

from __future__ import annotations

from typing import Any

_CUT = "training samples from the whole distribution, whose log-probs the loss uses; evaluation.{} cuts it off there"
REFUSED = {f"sampling.{name}": _CUT.format(name) for name in ("top_k", "top_p", "min_p")}  # key -> why there is none
REFUSED["trainer.micro_batch_size"] = "it is trainer.tokens_per_micro_batch now, and counts tokens instead of rows"

OPTION_HINTS = {  # name -> what it is here; with or without a section before it
    "model_name_or_path": "model.path",
    "attn_implementation": "model.attention",
    "bf16": "model.precision=bf16",
    "fp16": "model.precision=fp16",
    "peft_config": "the section lora: r, alpha, dropout, target_modules",
    "use_peft": "lora.r above 0",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "dataset_name": "data.path",
    "dataset_config": "data.subset",
    "dataset_train_split": "data.split",
    "dataset_test_split": "data.eval_split",
    "max_prompt_length": "data.max_prompt_tokens, and data.long_prompts says what becomes of longer ones",
    "num_generations": "sampling.group_size",
    "num_generations_eval": "a command after the run, python -m grpo_core evaluate RUN --samples N",
    "max_completion_length": "sampling.max_new_tokens",
    "temperature": "sampling.temperature",
    "use_vllm": "nothing: the sampler draws from the live weights in the training process",
    "reward_funcs": "rewards",
    "reward_weights": "the weight of each of rewards, as in rewards='[{name: correct_answer, weight: 0.5}]'",
    "scale_rewards": "advantage.name: grpo for group, batch_std for batch, dr_grpo for none",
    "mask_truncated_completions": "truncation.name=mask_loss",
    "loss_type": "loss.name and loss.average; preset=NAME sets a published objective whole",
    "importance_sampling_level": "loss.name: grpo for token, gspo for sequence",
    "beta": "loss.kl_coef",
    "use_bias_correction_kl": "loss.kl=k3_corrected",
    "epsilon": "clip_low in loss.args, and clip_high too where epsilon_high is not given",
    "epsilon_high": "clip_high in loss.args; for cispo it is cap there",
    "delta": "delta in loss.args, of the losses grpo and gspo",
    "top_entropy_quantile": "loss.top_entropy",
    "off_policy_mask_threshold": "loss.off_policy_mask",
    "vllm_importance_sampling_correction": "loss.rollout_correction",
    "vllm_importance_sampling_mode": "loss.rollout_correction.name",
    "sync_ref_model": "reference.every above 0",
    "ref_model_sync_steps": "reference.every, in steps of sampling",
    "ref_model_mixup_alpha": "reference.mixing",
    "max_steps": "trainer.num_steps, in steps of sampling",
    "num_train_epochs": "trainer.epochs",
    "per_device_train_batch_size": "trainer.tokens_per_micro_batch, which counts tokens; a step's completions, over "
    "all processes, are trainer.completions_per_step",
    "gradient_accumulation_steps": "nothing: a step has as many micro-batches as it needs; a step's completions, over "
    "all processes, are trainer.completions_per_step",
    "generation_batch_size": "trainer.completions_per_step",
    "steps_per_generation": "trainer.num_minibatches, which is it over gradient_accumulation_steps",
    "num_iterations": "trainer.num_passes",
    "learning_rate": "engine.learning_rate",
    "lr_scheduler_type": "engine.schedule",
    "warmup_steps": "engine.warmup_steps",
    "warmup_ratio": "engine.warmup_steps, a number of optimizer steps",
    "weight_decay": "engine.weight_decay",
    "adam_beta1": "engine.beta1",
    "adam_beta2": "engine.beta2",
    "adam_epsilon": "engine.adam_eps",
    "max_grad_norm": "engine.max_grad_norm",
    "eval_strategy": "evaluation.every",
    "eval_steps": "evaluation.every",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "save_strategy": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "resume_from_checkpoint": "resume",
    "run_name": "name",
    "logging_steps": "log.every",
    "log_completions": "log.completions",
    "report_to": "log.tensorboard=true or log.wandb=PROJECT",
    "push_to_hub": "a command after the run, python -m grpo_core export RUN --push ORG/NAME",
    "hub_model_id": "a command after the run, python -m grpo_core export RUN --push ORG/NAME",
}
LOSS_TYPES = {  # TRL's loss_type -> loss.name, loss.average
    "grpo": ("grpo", "sequence"),
    "dr_grpo": ("grpo", "constant"),
    "dapo": ("grpo", "token"),
    "bnpo": ("grpo", "micro_token"),
    "cispo": ("cispo", "token"),
    "sapo": ("sapo", "sequence"),
    "luspo": ("luspo", "row_sum"),
    "vespo": ("vespo", "token"),
}
PRESET_NAMES = (  # presets, some of which are no loss
    *("grpo_paper", "dr_grpo", "dapo", "gspo", "cispo", "rloo"),
    *("trl_1_16_default", "verl_default", "open_instruct_default"),
)
SCALES = {"group": "grpo", "batch": "batch_std", "none": "dr_grpo"}  # TRL's scale_rewards -> advantage.name
SCHEDULES = {"constant_with_warmup": "constant, with engine.warmup_steps"}  # transformers' lr_scheduler_type


def key_hint(name: str, value: Any = None) -> str | None:
    """What there is instead of the dotted key `name`, in words; None where nothing is known of it."""
    section, _, last = name.rpartition(".")
    if name in REFUSED:
        return REFUSED[name]
    if last not in OPTION_HINTS or (section.endswith("args") and section != "loss.args"):  # a function's own arguments
        return None
    if last == "loss_type" and (said := value_hint("loss", value)):
        return said
    return f"instead of TRL's {last} there is {OPTION_HINTS[last]}"


def value_hint(kind: str, value: Any) -> str | None:
    """The same of a value that is not there: a loss, an advantage, or what engine.schedule may be."""
    said, value = [], str(value)
    if kind == "loss" and value in LOSS_TYPES:
        said.append("TRL's {} is loss.name={} with loss.average={}".format(value, *LOSS_TYPES[value]))
    if kind == "loss" and value in PRESET_NAMES:
        said.append(f"the whole objective of that name is preset={value}")
    if kind == "advantage" and value in SCALES:
        said.append(f"TRL's scale_rewards={value} is advantage.name={SCALES[value]}")
    if kind == "engine.schedule" and value in SCHEDULES:
        said.append(f"here that is {SCHEDULES[value]}")
    return "; ".join(said) or None
