"""The policy: a Hugging Face causal LM with a LoRA adapter. The reference is the same weights, adapter off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from grpo_core.batch import Rollouts
from grpo_core.config import LoraConfig, ModelConfig
from grpo_core.data import model_path
from grpo_core.logprobs import token_divergence, token_logprobs
from grpo_core.schema import ConfigError


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

    def __init__(self, model: PeftModel | PreTrainedModel, *, temperature: float = 1.0, chunk_size: int = 1024) -> None:
        self.model = model.eval()
        self.causal_lm: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        self.temperature, self.chunk_size = temperature, chunk_size
        self._reference: list[Tensor] | None = None  # the adapter of a reference that moves

    def logprobs(self, rollouts: Rollouts) -> Tensor:
        """Log-prob of every completion token at the sampling temperature, [B, C] float32; 0 where masked."""
        return self.forward(rollouts).logprobs

    def forward(
        self, rollouts: Rollouts, *, entropy_gradient: bool = False, divergence: Callable | None = None
    ) -> TokenStats:
        """Log-probs and entropies of the completion tokens; with `divergence` (see kl.py) also that from the reference.

        The divergence costs a forward of the reference.
        """
        hidden = self._hidden(rollouts)
        ids = rollouts.completion_ids[:, : hidden.shape[1]]
        how = {"temperature": self.temperature, "chunk_size": self.chunk_size}
        values = [*token_logprobs(hidden, self._logits, ids, entropy_gradient=entropy_gradient, **how)]
        if divergence is not None:
            with torch.no_grad(), self.reference():
                ref_hidden = self._hidden(rollouts)
            values.append(token_divergence(hidden, ref_hidden, self._logits, divergence, **how))
        mask, width = rollouts.completion_mask, rollouts.completion_mask.shape[1]
        return TokenStats(*(F.pad(x * mask[:, : x.shape[1]], (0, width - x.shape[1])) for x in values))

    @torch.no_grad()
    def divergence(self, rollouts: Rollouts, function: Callable, keep: Tensor) -> Tensor:
        """`function` (see kl.py) between policy and reference at the tokens where `keep` [B, C] bool, [n] float32."""
        hidden = self._hidden(rollouts)
        with self.reference():
            ref_hidden = self._hidden(rollouts)
        keep = keep[:, : hidden.shape[1]]
        return token_divergence(
            hidden[keep],
            ref_hidden[keep],
            self._logits,
            function,
            temperature=self.temperature,
            chunk_size=self.chunk_size,
        )

    def _hidden(self, rollouts: Rollouts) -> Tensor:
        """The hidden states that predict the completion tokens, [B, up to C, H]: none beyond the longest row."""
        used = max(1, int(rollouts.lengths().max()))
        mask = torch.cat([rollouts.prompt_mask, rollouts.completion_mask[:, :used]], dim=1).long()
        hidden = self.causal_lm.base_model(
            input_ids=torch.cat([rollouts.prompt_ids, rollouts.completion_ids[:, :used]], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        return hidden.gather(1, _predictors(rollouts.prompt_mask, used)[..., None].expand(-1, -1, hidden.shape[2]))

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
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def norm(self) -> Tensor:
        """L2 norm of the adapter's change to the weights' factors (all trained weights), a scalar.

        LoRA's B starts at 0, so a norm that never moves is a run that never trained.
        """
        return torch.stack([p.detach().float().square().sum() for p in self.parameters()]).sum().sqrt()

    def save(self, folder: Path) -> None:
        """The adapter in PEFT's format, or the whole model where there is none."""
        self.model.save_pretrained(folder)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.causal_lm.get_output_embeddings()(hidden)
        cap = getattr(self.causal_lm.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _predictors(prompt_mask: Tensor, width: int) -> Tensor:
    """The positions whose hidden states predict completion tokens 0 .. width-1, [B, width].

    The one shift by one in the package: token t is predicted at the place before it, and token 0 at the prompt's last
    real token, wherever the padding stands.
    """
    places = torch.arange(prompt_mask.shape[1], device=prompt_mask.device)
    last = (prompt_mask * places).argmax(dim=1, keepdim=True)
    rest = prompt_mask.shape[1] + torch.arange(width - 1, device=prompt_mask.device)
    return torch.cat([last, rest.expand(len(prompt_mask), -1)], dim=1)


def load_policy(model: ModelConfig, lora: LoraConfig, *, dtype: torch.dtype, temperature: float) -> Policy:
    """The base model of `model.path` in `dtype`, frozen, with a fresh LoRA adapter (or fully trainable with r = 0).

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
        raise ConfigError(
            f"model.path is {model.path!r}, and it cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    return wrap(base, model, lora, temperature=temperature)


def wrap(base: PreTrainedModel, model: ModelConfig, lora: LoraConfig, *, temperature: float) -> Policy:
    """Put the adapter on and switch gradient checkpointing as configured."""
    if model.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
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
            raise ConfigError(
                f"lora.target_modules is {lora.target_modules!r}: {str(error).splitlines()[0]}"
            ) from error
    return Policy(base, temperature=temperature, chunk_size=model.logprob_chunk)
