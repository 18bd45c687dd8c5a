"""The teacher: a frozen model that computes the log-probs of the tokens of the policy's completions.

It is another model, the policy's own base with a second adapter, or the policy itself with more in its prompt. Nothing
of it is trained, saved or sampled from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from grpo_core.batch import Rollouts
from grpo_core.config.lora_checks import check_adapter_weights, read_adapter
from grpo_core.config.sections import LoraConfig, ModelConfig, RunConfig
from grpo_core.model.adapter import check_complete, explaining_misfit, fit_quantized
from grpo_core.model.composite import map_keys
from grpo_core.model.finite_weights import check_finite
from grpo_core.model.loading import (
    check_vocabulary,
    load_model_config,
    load_tokenizer,
    using_key,
)
from grpo_core.model.logprobs import TeacherStates, is_frozen_linear
from grpo_core.model.packing import Budget
from grpo_core.model.policy import Policy, load_policy
from grpo_core.schema import ConfigError

TEACHER_ADAPTER = "teacher"  # name of the second adapter on the policy's base


@dataclass(frozen=True)
class Teacher:
    """A frozen model, and the adapter with which it computes."""

    policy: Policy  # with a model of its own, or the run's policy, whose base it shares
    adapter: str | None = None  # of the run's policy, in place of the trained one; None: as the policy computes
    shares_policy: bool = True

    @contextmanager
    def active(self) -> Iterator[Policy]:
        """Let the model compute as the teacher, without gradient and dropout."""
        with self.policy.evaluating(self.adapter):
            yield self.policy

    def states(self, rollouts: Rollouts, budget: Budget, function: Callable) -> TeacherStates:
        """Return the distributions of the next token for `function`, a divergence over the vocabulary (kl.py).

        `rollouts` has the teacher's prompts.
        """
        with self.active() as policy:
            hidden = policy.hidden_states(rollouts, budget)
            temperature = policy._logprob_options["temperature"]
        return TeacherStates(hidden, self._head, temperature, function)

    def _head(self, hidden: Tensor) -> Tensor:
        """Return the logits, whichever adapter is active when they are computed."""
        if is_frozen_linear(self.policy.causal_lm.get_output_embeddings()):
            return self.policy._head(hidden)
        with self.active() as policy:
            return policy._head(hidden)

    def own_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the names and weights that are there for the teacher alone."""
        named = [*self.policy.model.named_parameters()]
        if not self.shares_policy:
            return named
        return [(name, p) for name, p in named if self.adapter is not None and f".{self.adapter}." in name]


def model_of_teacher(config: RunConfig) -> ModelConfig:
    """Return how the model at teacher.path is loaded: as the policy's, without what is about that model alone."""
    assert config.teacher.path is not None
    return replace(config.model, path=config.teacher.path, gradient_checkpointing=False, revision=None, rope={})


def check_teacher(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check what can be known of the teacher before weights load. `tokenizer` is the policy's.

    Raises:
        ConfigError: its model or adapter cannot be found, or its vocabulary is not the policy's.
    """
    teacher = config.teacher
    if teacher.path is not None:
        with using_key("teacher.path"):
            own = load_tokenizer(teacher.path, config.model.trust_remote_code)
            model_config = load_model_config(model_of_teacher(config))
            check_vocabulary(model_config, tokenizer)
        _check_same_vocabulary(teacher.path, own.get_vocab(), tokenizer.get_vocab())
        size = model_config.get_text_config().vocab_size
        needed = load_model_config(config.model).get_text_config().vocab_size
        if size < needed:
            raise ConfigError(
                f"teacher.path is {teacher.path!r}, which has {size} logits, fewer than the {needed} of model.path"
            )
    if teacher.adapter is not None:
        _check_adapter(teacher.adapter, is_shared=teacher.path is None)


def _check_same_vocabulary(path: str, theirs: dict[str, int], ours: dict[str, int]) -> None:
    """Refuse a teacher for which some text or id means another token."""
    if theirs == ours:
        return
    token = min((t for t in theirs.keys() | ours.keys() if theirs.get(t) != ours.get(t)), key=lambda t: (len(t), t))
    there, here = (f"has the id {known[token]}" if token in known else "is missing" for known in (theirs, ours))
    raise ConfigError(
        f"teacher.path is {path!r}, whose vocabulary is not that of model.path: the token {token!r} {there} there and "
        f"{here} here; choose a teacher with the policy's tokenizer"
    )


def _check_adapter(path: str, *, is_shared: bool) -> None:
    """Refuse a folder that holds no adapter, or one that cannot be loaded beside the policy's."""
    settings, key = read_adapter("teacher.adapter", path), f"teacher.adapter is {path!r}"
    other = next((name for name in ("modules_to_save", "trainable_token_indices") if settings.get(name)), None)
    other = other or (f"bias {settings['bias']}" if settings.get("bias", "none") != "none" else None)
    if settings.get("peft_type") != "LORA":
        other = f"peft_type {settings.get('peft_type')}"
    if is_shared and other:
        raise ConfigError(
            f"{key}, which is not LoRA alone ({other}), so it cannot share the policy's base; set teacher.path to "
            f"its base model"
        )
    check_adapter_weights("teacher.adapter", path)


def load_teacher(config: RunConfig, policy: Policy, dtype: torch.dtype, device: torch.device) -> Teacher | None:
    """Load the teacher's weights; a second adapter goes onto the base of `policy`. None without a teacher.

    Raises:
        ConfigError: the model cannot be loaded, or the adapter does not fit.
    """
    settings = config.teacher
    if not settings.exists:
        return None
    adapter = None if settings.adapter is None else Path(settings.adapter)
    if settings.path is not None:
        model = model_of_teacher(config)
        with using_key("teacher.path"):
            own = load_policy(model, LoraConfig(r=0), dtype=dtype, temperature=policy.temperature, adapter=adapter)
        own.model.requires_grad_(False).to(device)
        return Teacher(own, shares_policy=False)
    if adapter is None:
        return Teacher(policy)
    options: Any = {"autocast_adapter_dtype": False, "key_mapping": map_keys(policy.causal_lm)}
    with explaining_misfit(f"the adapter in {adapter} (teacher.adapter)", adapter, config.model.path):
        report = policy.model.load_adapter(adapter, TEACHER_ADAPTER, is_trainable=False, **options)
    check_complete(report, TEACHER_ADAPTER, f"the adapter in {adapter} (teacher.adapter)", config.model.path)
    fit_quantized(policy.model, f"the adapter in {adapter}")
    teacher = Teacher(policy, TEACHER_ADAPTER)
    for _, parameter in teacher.own_parameters():
        parameter.requires_grad_(False)
    check_finite(policy.model, f"the adapter in {adapter}")
    return teacher
