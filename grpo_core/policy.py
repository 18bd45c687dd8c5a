"""The policy: a Hugging Face causal LM with a LoRA adapter. The reference is the same weights, adapter off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
from grpo_core.logprobs import token_logprobs
from grpo_core.schema import ConfigError


class Policy:
    """Log-probs of completions under the model, its reference, and the adapter's way in and out.

    The model stays in evaluation mode (no dropout) except inside `training()`.
    """

    def __init__(self, model: PeftModel | PreTrainedModel, *, temperature: float = 1.0, chunk_size: int = 1024) -> None:
        self.model = model.eval()
        self.causal_lm: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        self.temperature, self.chunk_size = temperature, chunk_size

    def logprobs(self, rollouts: Rollouts) -> Tensor:
        """Log-prob of every completion token at the sampling temperature, [B, C] float32; 0 where masked."""
        return self.logprobs_and_entropy(rollouts)[0]

    def logprobs_and_entropy(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """As `logprobs`, with the entropy of every token's distribution (nats, no gradient), both [B, C]."""
        width = rollouts.completion_ids.shape[1]
        used = max(1, int(rollouts.lengths().max()))  # no row of these has a token further right
        completion_ids, completion_mask = rollouts.completion_ids[:, :used], rollouts.completion_mask[:, :used]
        mask = torch.cat([rollouts.prompt_mask, completion_mask], dim=1).long()
        hidden = self.causal_lm.base_model(
            input_ids=torch.cat([rollouts.prompt_ids, completion_ids], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        predicting = hidden.gather(
            1, _predictors(rollouts.prompt_mask, used)[..., None].expand(-1, -1, hidden.shape[2])
        )
        logprobs, entropy = token_logprobs(
            predicting, self._logits, completion_ids, temperature=self.temperature, chunk_size=self.chunk_size
        )
        return tuple(F.pad(x * completion_mask, (0, width - used)) for x in (logprobs, entropy))

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the policy answers as the frozen base model."""
        with self.model.disable_adapter():
            yield

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
