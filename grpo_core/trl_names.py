"""Hints for options named as in TRL, and for keys that this configuration refuses or has renamed.

docs/from_trl.md lists all of TRL's options. This table has each of them but those that have the name of a key here,
which config/nearest.py finds.
"""

from __future__ import annotations

from typing import Any

_TRUNCATION = "training samples from the whole distribution, whose log-probs the loss uses; only evaluation.{} exists"
KEY_HINTS = {f"sampling.{name}": _TRUNCATION.format(name) for name in ("top_k", "top_p", "min_p")}  # whole key -> hint
KEY_HINTS["trainer.micro_batch_size"] = "use trainer.tokens_per_micro_batch, which counts tokens instead of rows"

OPTION_HINTS = {  # TRL option -> what to use here
    "bf16": "model.precision=bf16",
    "fp16": "model.precision=fp16",
    "peft_config": "the section lora, whose keys have the names of PEFT's options but for alpha and dropout",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "max_prompt_length": "data.max_prompt_tokens; data.long_prompts decides what happens to longer prompts",
    "num_generations": "sampling.group_size",
    "num_generations_eval": "the command python -m grpo_core evaluate RUN --samples N after the run",
    "max_completion_length": "sampling.max_new_tokens",
    "temperature": "sampling.temperature",
    "reward_funcs": "rewards",
    "reward_weights": "weight in each item of rewards, as in rewards='[{name: correct_answer, weight: 0.5}]'",
    "scale_rewards": "advantage.name: grpo for group or true, batch_std for batch, dr_grpo for none or false",
    "mask_truncated_completions": "truncation.name=mask_loss",
    "loss_type": "loss.name and loss.average, or preset=NAME for a complete published objective",
    "importance_sampling_level": "loss.name: grpo for token, gspo for sequence",
    "beta": "loss.kl_coef",
    "router_aux_loss_coef": "loss.router_aux_coef",
    "environment_factory": "environment.name, a class of another form",
    "max_tool_calling_iterations": "environment.max_turns, which counts the turns of the policy: one more",
    "use_bias_correction_kl": "loss.kl=k3_corrected",
    "epsilon": "clip_low in loss.args, and the same value for clip_high unless epsilon_high is set",
    "epsilon_high": "clip_high in loss.args, or cap there for the loss cispo",
    "delta": "delta in loss.args of the losses grpo and gspo",
    "top_entropy_quantile": "loss.top_entropy",
    "off_policy_mask_threshold": "loss.off_policy_mask",
    "vllm_importance_sampling_correction": "loss.rollout_correction",
    "vllm_importance_sampling_mode": "loss.rollout_correction.name",
    "sync_ref_model": "reference.every above 0",
    "ref_model_sync_steps": "reference.every, which counts sampling phases",
    "ref_model_mixup_alpha": "reference.mixing",
    "max_steps": "trainer.num_steps, which counts sampling phases",
    "num_train_epochs": "trainer.epochs",
    "per_device_train_batch_size": "trainer.tokens_per_micro_batch, which counts tokens; the completions of a step, "
    "over all processes, are trainer.completions_per_step",
    "generation_batch_size": "trainer.completions_per_step",
    "steps_per_generation": "trainer.num_minibatches, which is steps_per_generation / gradient_accumulation_steps",
    "num_iterations": "trainer.num_passes",
    "learning_rate": "engine.learning_rate",
    "lr_scheduler_type": "engine.schedule",
    "warmup_steps": "engine.warmup_steps",
    "warmup_ratio": "engine.warmup_steps, which counts optimizer steps",
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
    "load_best_model_at_end": "checkpoint.keep_best",
    "resume_from_checkpoint": "resume",
    "run_name": "name",
    "logging_steps": "log.every",
    "log_completions": "log.completions",
    "report_to": "log.tensorboard=true, log.wandb=PROJECT, log.trackio=PROJECT or log.mlflow=EXPERIMENT",
    "push_to_hub": "the command python -m grpo_core export RUN --push ORG/NAME after the run",
    "hub_private_repo": "the command python -m grpo_core export RUN --push ORG/NAME --private after the run",
    "hub_model_id": "the command python -m grpo_core export RUN --push ORG/NAME after the run",
    "model_init_kwargs": "model.precision, model.attention, model.revision and model.rope",
    "quantization_config": "model.quantize=nf4 and model.double_quant, for 4 bits",
    "disable_dropout": "lora.dropout=0; the base model's dropout is always off",
    "generation_kwargs": "sampling.stop for stop_strings; others would change the distribution in the sampler alone",
    "vllm_max_model_length": "data.max_prompt_tokens and sampling.max_new_tokens",
    "vllm_gpu_memory_utilization": "sampling.rows_at_once, which limits the completions that are decoded together",
    "vllm_importance_sampling_clip_max": "clip_max in loss.rollout_correction.args",
    "vllm_importance_sampling_clip_min": "clip_min in loss.rollout_correction.args",
    "vllm_importance_sampling_cap": "clip_max in loss.rollout_correction.args",
    "sapo_temperature_pos": "tau_pos in loss.args of the loss sapo",
    "sapo_temperature_neg": "tau_neg in loss.args of the loss sapo",
    "vespo_k_pos": "k_pos in loss.args of the loss vespo",
    "vespo_k_neg": "k_neg in loss.args of the loss vespo",
    "vespo_lambda_pos": "lambda_pos in loss.args of the loss vespo",
    "vespo_lambda_neg": "lambda_neg in loss.args of the loss vespo",
    "multi_objective_aggregation": "advantage.name=gdpo for normalize_then_sum",
    "use_adaptive_entropy": "loss.entropy_target",
    "entropy_coef_min": "loss.entropy_min",
    "entropy_coef_max": "loss.entropy_max",
    "entropy_coef_delta": "loss.entropy_delta",
    "auto_find_batch_size": "trainer.tokens_per_micro_batch=auto",
    "logging_strategy": "log.every",
    "log_level": "log.verbose",
    "do_eval": "evaluation.num_tasks, which is 0 for no evaluation",
    "eval_on_start": "evaluation.num_tasks, which is 0 for no evaluation; otherwise a run begins with one",
    "metric_for_best_model": "evaluation.select, whose accuracy decides",
    "greater_is_better": "evaluation.select, whose accuracy decides",
    "data_seed": "seed",
    "ddp_timeout": "trainer.hang_timeout",
    "train_dataset": "data.path",
    "eval_dataset": "data.eval_path or data.eval_split",
    "processing_class": "model.path, whose tokenizer is loaded",
    "tokenizer": "model.path, whose tokenizer is loaded",
    "layers_pattern": "a regular expression in lora.target_modules",
}
NO_COUNTERPART = {  # TRL option -> why there is no such option here
    "use_vllm": "the sampler draws from the live weights in the training process",
    "optim": "the optimizer is AdamW; engine.learning_rate, engine.beta1 and the other keys of engine set it",
    "gradient_accumulation_steps": "a step has as many micro-batches as it needs; the completions of a step, over all "
    "processes, are trainer.completions_per_step",
    **dict.fromkeys(
        (
            *("vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_server_base_url", "vllm_server_host"),
            *("vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
        ),
        "the sampler draws from the live weights in the training process",
    ),
    "vllm_structured_outputs_regex": "it would restrict the distribution",
    "vllm_tensor_parallel_size": "each process has the whole model",
    "cast_lm_head_to_fp32": "logits are computed in the run's precision, then converted to float32",
    "remove_unused_columns": "all columns are kept, and a reward gets those that its signature names",
    "ds3_gather_for_generation": "the sampler needs whole weights, so ZeRO-3 is refused",
    "shuffle_dataset": "every epoch is a permutation, a function of seed",
    "pad_to_multiple_of": "rows are packed",
    "repetition_penalty": "the penalised distribution is not the policy's",
    "cache_implementation": "the sampler has its own cache; sampling.decoder chooses among its decoders",
    "log_multimodal": "only text is supported",
    "num_completions_to_print": "no completion is printed, and all are written to the run folder",
    "log_unique_prompts": "no completion is printed, and all are written to the run folder",
    "log_completions_hub_repo": "nothing is uploaded",
    **dict.fromkeys(
        ("use_transformers_continuous_batching", "transformers_continuous_batching_config", "use_transformers_paged"),
        "the sampler belongs to grpo_core",
    ),
    "lr_scheduler_kwargs": "the schedules have no arguments",
    "optim_args": "the optimizer is AdamW; engine.beta1 and the other keys of engine set it",
    "optimizers": "the optimizer is AdamW; engine.learning_rate and the other keys of engine set it",
    "tf32": "torch's default is kept",
    "gradient_checkpointing_kwargs": "it is always use_reentrant=False; model.gradient_checkpointing switches it",
    "torch_compile": "the sampler captures CUDA graphs itself, and the update is not compiled",
    "use_liger_kernel": "grpo_core has its own fast versions of known layers",
    "neftune_noise_alpha": "it is for supervised training",
    "label_smoothing_factor": "it is for supervised training",
    "average_tokens_across_devices": "averages are always taken over all processes",
    "torch_empty_cache_steps": "the sampler frees its memory after every call",
    "logging_first_step": "the files contain every step",
    "logging_nan_inf_filter": "nothing is filtered",
    "disable_tqdm": "the progress bar is shown only on a terminal",
    "save_only_model": "a checkpoint is for resuming; the adapter alone is written at the end",
    "hub_token": "a token must not be in a configuration: set HF_TOKEN in the environment",
    "ignore_data_skip": "a step's batch is a function of seed and step",
    "full_determinism": "GPU kernels may add in any order",
    "use_cpu": "an empty CUDA_VISIBLE_DEVICES in the environment does the same",
    **dict.fromkeys(
        ("dataloader_num_workers", "dataloader_pin_memory"), "prompts are tokenised once, before the first step"
    ),
    "dataloader_drop_last": "a step may have the end of one epoch and the start of the next",
    "ddp_backend": "it is NCCL on GPUs and gloo on CPUs",
    "ddp_find_unused_parameters": "the engine is DeepSpeed",
    "fsdp": "the engine is DeepSpeed",
    "accelerator_config": "accelerate is not used",
    "parallelism_config": "each process has the whole model",
    "skip_memory_metrics": "the metrics of every step have the memory",
    "reward_processing_classes": "a reward function loads its own models",
    "callbacks": "the loop in the module trainer is short and meant to be changed",
    "rollout_func": "the sampler is part of the run",
    "task_type": "it is always CAUSAL_LM",
    "bias": "no bias is trained",
    "lora_bias": "no bias is trained",
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
PRESET_NAMES = (  # presets; loss.name with one of them gets a hint
    *("grpo_paper", "dr_grpo", "dapo", "gspo", "cispo", "rloo"),
    *("dppo", "m2po", "trl_1_16_default", "verl_default", "verl_rollout_correction"),
    *("open_instruct_default", "prime_rl_default", "nemo_seq_mask_tis"),
)
SCALES = {"group": "grpo", "batch": "batch_std", "none": "dr_grpo"}  # TRL's scale_rewards -> advantage.name
SCHEDULES = {"constant_with_warmup": "constant, with engine.warmup_steps"}  # transformers' lr_scheduler_type

REWARDS = {  # TRL's reward functions -> built-in ones
    "accuracy_reward": "math_equal",
    "reasoning_accuracy_reward": "math_equal, with outside_thinking: true",
    "think_format_reward": "think_format",
}


def key_hint(key: str, value: Any = None) -> str | None:
    """Return a hint for an unknown dotted key and its value, or None.

    Options of TRL are recognised with or without a section before them.
    """
    section, _, option = key.rpartition(".")
    if key in KEY_HINTS:
        return KEY_HINTS[key]
    if section.endswith("args") and section != "loss.args":  # an argument of a function, which may have such a name
        return None
    if option == "loss_type" and (hint := value_hint("loss", value)):
        return hint
    if option in NO_COUNTERPART:
        return f"TRL's {option} has no counterpart, because {NO_COUNTERPART[option]}"
    return f"instead of TRL's {option} use {OPTION_HINTS[option]}" if option in OPTION_HINTS else None


def value_hint(kind: str, value: Any) -> str | None:
    """Return a hint for an unknown value, or None; `kind` is loss, advantage, reward or engine.schedule."""
    hints, value = [], str(value)
    if kind == "loss" and value in LOSS_TYPES:
        loss, average = LOSS_TYPES[value]
        hints.append(f"TRL's {value} is loss.name={loss} with loss.average={average}")
    if kind == "loss" and value in PRESET_NAMES:
        hints.append(f"preset={value} sets the complete objective of that name")
    if kind == "advantage" and value in SCALES:
        hints.append(f"TRL's scale_rewards={value} is advantage.name={SCALES[value]}")
    if kind == "reward" and value in REWARDS:
        hints.append(f"instead of TRL's {value} use {REWARDS[value]}")
    if kind == "engine.schedule" and value in SCHEDULES:
        hints.append(f"use {SCHEDULES[value]}")
    if kind == "reward" and "/" in value:
        hints.append(f"the reward of a model is {{name: reward_model, args: {{path: {value}}}}}")
    return "; ".join(hints) or None
