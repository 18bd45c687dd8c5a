"""Hints for keys of verl's configuration, by the whole key or by its last part within a section that only verl has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SECTIONS = ("actor_rollout_ref", "algorithm", "critic", "custom_reward_function", "reward", "reward_model")
KEY_HINTS = {  # verl's key -> what to use here
    "data.train_files": "data.path",
    "data.val_files": "data.eval_path",
    "data.train_batch_size": "trainer.completions_per_step, which counts completions: verl's number of prompts times "
    "sampling.group_size",
    "data.val_batch_size": "evaluation.batch_size",
    "data.max_response_length": "sampling.max_new_tokens",
    "data.prompt_key": "data.template with the column in braces, as in data.template='{prompt}' data.prompt=chat",
    "data.reward_fn_key": "data.sources, whose items have rewards of their own",
    "data.filter_overlong_prompts": "data.long_prompts=drop",
    "data.truncation": "data.long_prompts=truncate_left or data.long_prompts=error",
    "data.train_max_samples": "data.limit",
    "data.val_max_samples": "evaluation.num_tasks",
    "data.seed": "seed",
    "data.apply_chat_template_kwargs": "data.chat_template_kwargs",
    "data.tool_config_path": "tools",
    "actor_rollout_ref.model.path": "model.path",
    "actor_rollout_ref.model.trust_remote_code": "model.trust_remote_code",
    "actor_rollout_ref.model.enable_gradient_checkpointing": "model.gradient_checkpointing",
    "actor_rollout_ref.model.lora_rank": "lora.r",
    "actor_rollout_ref.model.lora_alpha": "lora.alpha",
    "actor_rollout_ref.model.target_modules": "lora.target_modules",
    "actor_rollout_ref.model.exclude_modules": "lora.exclude_modules",
    "actor_rollout_ref.model.lora_adapter_path": "lora.path",
    "actor_rollout_ref.actor.optim.lr": "engine.learning_rate",
    "actor_rollout_ref.actor.optim.lr_warmup_steps": "engine.warmup_steps",
    "actor_rollout_ref.actor.optim.lr_scheduler_type": "engine.schedule",
    "actor_rollout_ref.actor.optim.weight_decay": "engine.weight_decay",
    "actor_rollout_ref.actor.optim.clip_grad": "engine.max_grad_norm",
    "actor_rollout_ref.actor.grad_clip": "engine.max_grad_norm",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "trainer.num_minibatches, which is data.train_batch_size / "
    "ppo_mini_batch_size",
    "actor_rollout_ref.actor.ppo_micro_batch_size": "trainer.tokens_per_micro_batch",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": "trainer.tokens_per_micro_batch",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": "trainer.tokens_per_micro_batch",
    "actor_rollout_ref.actor.ppo_epochs": "trainer.num_passes",
    "actor_rollout_ref.actor.clip_ratio": "clip_low and clip_high in loss.args",
    "actor_rollout_ref.actor.clip_ratio_low": "clip_low in loss.args",
    "actor_rollout_ref.actor.clip_ratio_high": "clip_high in loss.args",
    "actor_rollout_ref.actor.clip_ratio_c": "delta in loss.args",
    "actor_rollout_ref.actor.loss_agg_mode": "loss.average: token for token-mean, sequence for "
    "seq-mean-token-mean, constant for seq-mean-token-sum-norm",
    "actor_rollout_ref.actor.policy_loss.loss_mode": "loss.name",
    "actor_rollout_ref.actor.use_kl_loss": "loss.kl_coef above 0",
    "actor_rollout_ref.actor.kl_loss_coef": "loss.kl_coef",
    "actor_rollout_ref.actor.kl_loss_type": "loss.kl: k1 for kl, abs for abs, k2 for mse, k3 for low_var_kl",
    "actor_rollout_ref.actor.entropy_coeff": "loss.entropy_coef",
    "actor_rollout_ref.rollout.n": "sampling.group_size",
    "actor_rollout_ref.rollout.temperature": "sampling.temperature",
    "actor_rollout_ref.rollout.response_length": "sampling.max_new_tokens",
    "actor_rollout_ref.rollout.prompt_length": "data.max_prompt_tokens",
    "actor_rollout_ref.rollout.multi_turn.max_assistant_turns": "environment.max_turns",
    "actor_rollout_ref.rollout.multi_turn.tool_config_path": "tools",
    "actor_rollout_ref.rollout.val_kwargs.temperature": "evaluation.temperature",
    "actor_rollout_ref.rollout.val_kwargs.top_p": "evaluation.top_p",
    "actor_rollout_ref.rollout.val_kwargs.top_k": "evaluation.top_k",
    "algorithm.adv_estimator": "advantage.name",
    "algorithm.norm_adv_by_std_in_grpo": "advantage.name: grpo for true, dr_grpo for false",
    "algorithm.use_kl_in_reward": "loss.kl_in=reward",
    "algorithm.kl_penalty": "loss.kl",
    "algorithm.kl_ctrl.kl_coef": "loss.kl_coef with loss.kl_in=reward",
    "algorithm.kl_ctrl.target_kl": "loss.kl_target",
    "algorithm.kl_ctrl.horizon": "loss.kl_horizon",
    "algorithm.filter_groups.enable": "sampling.dynamic_attempts above 0",
    "algorithm.filter_groups.max_num_gen_batches": "sampling.dynamic_attempts",
    **{
        f"{section}custom_reward_function.{name}": hint
        for section in ("", "reward.")  # of newer versions
        for name, hint in (
            ("path", "rewards, as in rewards=my_rewards.py:my_reward"),
            ("name", "rewards, as in rewards=my_rewards.py:my_reward"),
            ("reward_kwargs", "args of an item of rewards"),
        )
    },
    "reward_model.model.path": "rewards='{name: reward_model, args: {path: ORG/MODEL}}'",
    "trainer.total_epochs": "trainer.epochs",
    "trainer.total_training_steps": "trainer.num_steps",
    "trainer.save_freq": "checkpoint.every",
    "trainer.test_freq": "evaluation.every",
    "trainer.val_before_train": "evaluation.num_tasks, which is 0 for no evaluation; otherwise a run begins with one",
    "trainer.experiment_name": "name",
    "trainer.project_name": "log.wandb=PROJECT, log.trackio=PROJECT or log.mlflow=EXPERIMENT",
    "trainer.logger": "log.tensorboard=true, log.wandb=PROJECT, log.trackio=PROJECT or log.mlflow=EXPERIMENT",
    "trainer.default_local_dir": "output_dir",
    "trainer.resume_mode": "resume",
    "trainer.resume_from_path": "resume",
    "trainer.max_actor_ckpt_to_keep": "checkpoint.keep",
    "trainer.n_gpus_per_node": "the number behind bash launch.sh",
    "trainer.nnodes": "torchrun, one command on each machine",
}
REASONS = {  # verl's key without a counterpart -> why
    "data.shuffle": "because every epoch is a seeded permutation",
    "data.return_raw_chat": "because a prompt of messages is recognised as such",
    "data.image_key": "because only text is supported",
    "data.video_key": "because only text is supported",
    "trainer.balance_batch": "because micro-batches are always cut by their number of tokens",
    "trainer.device": "because a GPU is used where there is one",
}


def key_hint(key: str, value: Any = None) -> str | None:
    """Return a hint for an unknown dotted key that is verl's, or None; `value` may have the rest of the key."""
    section, is_section = key.partition(".")[0], isinstance(value, Mapping)
    while key not in KEY_HINTS and isinstance(value, Mapping) and value:
        name, value = next(iter(value.items()))
        key = f"{key}.{name}"
    if key in KEY_HINTS:
        return f"instead of verl's {key} use {KEY_HINTS[key]}"
    if key in REASONS:
        return f"verl's {key} has no counterpart, {REASONS[key]}"
    return f"verl's {key} has no counterpart" if is_section and section in SECTIONS else None
