"""The policy: a Hugging Face causal LM with a LoRA adapter. The reference is the same weights, adapter off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from grpo_core.batch import Rollouts
from grpo_core.config.sections import LoraConfig, ModelConfig
from grpo_core.model import fast_layers, packed_attention
from grpo_core.model.loading import model_path
from grpo_core.model.logprobs import Statistics, is_frozen_linear, softmax_statistics, token_divergence, token_logprobs
from grpo_core.model.packing import Budget, Layout, Packing, Plan, plan
from grpo_core.schema import ConfigError, first_line


@dataclass(frozen=True)
class TokenStats:
    """Of every completion token, [B, C] float32, 0 where masked."""

    logprobs: Tensor  # with gradient
    entropy: Tensor  # nats
    divergence: Tensor | None = None


class Policy:
    """Log-probs of completions under the model, its reference, and the adapter's way in and out.

    The model stays in evaluation mode (no dropout) except inside `training()`.
    """

    def __init__(
        self, model: PeftModel | PreTrainedModel, *, temperature: float = 1.0, chunk_size: int | None = None
    ) -> None:
        self.model = model.eval()
        self.causal_lm: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        self.temperature, self.chunk_size = temperature, chunk_size
        self._reference: list[Tensor] | None = None  # the adapter of a reference that moves

    @cached_property
    def layout(self) -> Layout:
        """How rows share a forward of this model (packing.py); seen by trying, in evaluation mode."""
        with torch.no_grad(), self._without_dropout():
            return packed_attention.layout(self.causal_lm, self._hidden)

    def plan(self, rollouts: Rollouts, budget: Budget | None = None, rows: Sequence[int] | None = None) -> Plan:
        """The forwards that `rows` (default: all) divide into: as few as `budget` allows. Reads the device once."""
        return plan(rollouts, budget or Budget(math.inf), rows, self.layout)

    def logprobs(self, rollouts: Rollouts) -> Tensor:
        """Log-prob of every completion token at the sampling temperature, [B, C] float32; 0 where masked."""
        return self.forward(rollouts).logprobs

    def forward(
        self,
        rollouts: Rollouts,
        packing: Packing | None = None,
        *,
        entropy_gradient: bool = False,
        divergence: Callable | None = None,
    ) -> TokenStats:
        """Log-probs and entropies of the completion tokens; with `divergence` (see kl.py) also that from the reference.

        `packing` lays out the `rollouts`, its rows; without it they share one forward. The divergence costs a forward
        of the reference.
        """
        packing = packing or next(iter(self.plan(rollouts)))
        hidden = self._hidden(rollouts, packing)
        ids = rollouts.completion_ids.flatten()[packing.places]
        how = self._how
        values = [
            *token_logprobs(
                hidden, self._head, ids, entropy_gradient=entropy_gradient, statistics=self._statistics, **how
            )
        ]
        if divergence is not None:
            with torch.no_grad(), self.reference(), self._without_dropout():
                ref_hidden = self._hidden(rollouts, packing)
            values.append(
                token_divergence(hidden, ref_hidden, self._head, divergence, ref_lm_head=self._reference_head, **how)
            )
        shape = rollouts.completion_ids.shape
        return TokenStats(*(x.new_zeros(shape.numel()).index_copy(0, packing.places, x).view(shape) for x in values))

    @torch.no_grad()
    def divergence(self, rollouts: Rollouts, packing: Packing, function: Callable, keep: Tensor) -> Tensor:
        """`function` (see kl.py) between policy and reference at the tokens where `keep` [b, C] bool, [n] float32."""
        keep = keep.flatten()[packing.places]
        hidden = self._hidden(rollouts, packing)[keep]
        with self.reference():
            ref_hidden = self._hidden(rollouts, packing)[keep]
        return token_divergence(hidden, ref_hidden, self._head, function, ref_lm_head=self._reference_head, **self._how)

    def _hidden(self, rollouts: Rollouts, packing: Packing) -> Tensor:
        """The hidden states that predict the completion tokens, [n, H] in the order of `packing.places`."""
        ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], dim=1).flatten()[packing.source]
        base, positions = self.causal_lm.base_model, packing.positions
        if packing.mask is not None:
            shape, mask = packing.mask.shape, packing.mask.long()
            out = base(ids.view(shape), attention_mask=mask, position_ids=positions.view(shape), use_cache=False)
            return packing.predictors(out.last_hidden_state.flatten(0, 1))
        unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)  # 4-D: no mask is made of it
        out = base(
            ids[None],
            attention_mask=unread,
            position_ids=positions[None],
            use_cache=False,
            packing=packing.attention,
        )
        return packing.predictors(out.last_hidden_state[0])

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the policy answers as the reference: the frozen base model, or what `move_reference` made of it."""
        if self._reference is None:
            with self.model.disable_adapter():
                yield
            return
        parameters = self.parameters()
        own = [parameter.data for parameter in parameters]
        try:
            for parameter, value in zip(parameters, self._reference, strict=True):
                parameter.data = value
            yield
        finally:
            for parameter, value in zip(parameters, own, strict=True):
                parameter.data = value

    @torch.no_grad()
    def move_reference(self, mixing: float = 1.0) -> None:
        """Reference <- mixing * policy + (1 - mixing) * reference, in the adapter's factors. arXiv:2404.09656.

        With mixing 1 it becomes the policy. Below 1 LoRA's two factors are mixed each by itself, as TRL mixes
        parameters, which is not the mixture of their products. Called on a fresh adapter, whose product is 0, it
        makes a reference that equals the base model.
        """
        now = [parameter.detach() for parameter in self.parameters()]
        if self._reference is None:
            self._reference = [value.clone() for value in now]
        for old, new in zip(self._reference, now, strict=True):
            old.lerp_(new, mixing)

    def reference_state(self) -> list[Tensor] | None:
        """What a checkpoint must keep of a reference that moves; None for one that does not."""
        return self._reference

    def load_reference(self, state: list[Tensor]) -> None:
        """Take back what `reference_state` gave."""
        assert self._reference is not None
        for own, value in zip(self._reference, state, strict=True):
            own.copy_(value)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside, dropout and gradient checkpointing are on."""
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        training = self.model.training
        self._switch(False)
        try:
            yield
        finally:
            self._switch(training)

    def _switch(self, training: bool) -> None:
        for module in self._modules:
            vars(module)["training"] = training  # what train() and eval() set, 20 ms a step faster

    @cached_property
    def _modules(self) -> list[nn.Module]:
        return [*self.model.modules()]

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        own = (p for module in self._modules for p in module._parameters.values())
        return [p for p in dict.fromkeys(own) if p is not None and p.requires_grad]  # one that is shared, once

    def flops_per_token(self) -> float:
        """Of forward and backward: 2 for each weight forward, 2 for its input's gradient, 2 for its own if trained."""
        parts = {id(p): p for p in self.model.parameters()}
        table = self.causal_lm.get_input_embeddings().weight
        if self.causal_lm.get_output_embeddings().weight is not table:
            parts.pop(id(table), None)  # a look-up
        return float(sum(p.numel() * (6 if p.requires_grad else 4) for p in parts.values()))

    def norm(self) -> Tensor:
        """L2 norm of the adapter's change to the weights' factors (all trained weights), a scalar.

        LoRA's B starts at 0, so a norm that never moves is a run that never trained.
        """
        norms = torch._foreach_norm([p.detach() for p in self.parameters()], 2.0, torch.float32)
        return torch.stack(norms).double().square().sum().sqrt()

    def save(self, folder: Path) -> None:
        """The adapter in PEFT's format, or the whole model where there is none."""
        self.model.save_pretrained(folder)

    @cached_property
    def _logit_scale(self) -> float:
        """What the model multiplies its head's output by; Granite, Cohere and Falcon-H1 do. Measured."""
        ids = torch.arange(8, device=self.causal_lm.device)[None] % self.causal_lm.config.vocab_size
        with torch.no_grad(), self._without_dropout():
            logits = self.causal_lm(ids, use_cache=False).logits.double()
            ours = self._head(self.causal_lm.base_model(ids, use_cache=False).last_hidden_state).double()
        scale = float((logits * ours).sum() / ours.square().sum())
        allowed = 1e-3 if self.causal_lm.dtype == torch.float32 else 0.05
        if not (logits - scale * ours).norm() <= allowed * logits.norm():
            raise ConfigError(
                f"this {self.causal_lm.config.model_type} model's logits are not its head's output times a number; "
                f"log-probs of it would be wrong"
            )
        return 1.0 if abs(scale - 1) < 1e-3 else scale

    @property
    def _how(self) -> dict[str, Any]:
        return {"temperature": self.temperature / self._logit_scale, "chunk_size": self.chunk_size}

    @property
    def _head(self) -> Callable[[Tensor], Tensor]:
        head, cap = (
            self.causal_lm.get_output_embeddings(),
            getattr(self.causal_lm.config, "final_logit_softcapping", None),
        )
        return head if cap is None else lambda hidden: torch.tanh(head(hidden) / cap) * cap

    @property
    def _reference_head(self) -> Callable[[Tensor], Tensor]:
        if is_frozen_linear(self.causal_lm.get_output_embeddings()):
            return self._head

        def head(hidden: Tensor) -> Tensor:  # it has an adapter
            with self.reference():
                return self._head(hidden)

        return head

    @property
    def _statistics(self) -> Statistics:
        if self.causal_lm.device.type != "cuda":
            return softmax_statistics
        from grpo_core.model.kernels import softmax_statistics as fused  # triton is there where CUDA is

        return fused


def checkpoint_gradients(model: PreTrainedModel) -> None:
    """Keep only the states between layers for backward, which computes the rest again."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def load_policy(
    model: ModelConfig, lora: LoraConfig, *, dtype: torch.dtype, temperature: float, adapter: Path | None = None
) -> Policy:
    """The base model of `model.path` in `dtype`, frozen, with a fresh LoRA adapter (or fully trainable with r = 0).

    With `adapter` it has the one of that folder, in PEFT's format.

    Raises:
        ConfigError: a model that cannot be loaded, or target modules that it does not have.
    """
    folder = model_path(model.path)
    try:
        base = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=model.attention,
            trust_remote_code=model.trust_remote_code,
        )
    except (OSError, ValueError, ImportError) as error:
        if "attention implementation" in str(error):
            raise ConfigError(
                f"model.attention is {model.attention}, which this model does not have; try eager"
            ) from error
        raise ConfigError(f"model.path is {model.path!r}, and it cannot be loaded: {first_line(error)}") from error
    if adapter is None:
        return wrap(base, model, lora, temperature=temperature)
    try:
        base = PeftModel.from_pretrained(base, adapter, is_trainable=True, autocast_adapter_dtype=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"the adapter in {adapter} does not go on {model.path}: {first_line(error)}") from error
    fast_layers.install(base)
    return Policy(base, temperature=temperature)


def wrap(base: PreTrainedModel, model: ModelConfig, lora: LoraConfig, *, temperature: float) -> Policy:
    """Put the adapter on and switch gradient checkpointing as configured; auto leaves it off."""
    if model.gradient_checkpointing is True:
        checkpoint_gradients(base)
    if lora.r:
        adapter = PeftLoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        )
        try:
            base = get_peft_model(base, adapter, autocast_adapter_dtype=False)
        except ValueError as error:
            raise ConfigError(f"lora.target_modules is {lora.target_modules!r}: {first_line(error)}") from error
    fast_layers.install(base)
    return Policy(base, temperature=temperature)
