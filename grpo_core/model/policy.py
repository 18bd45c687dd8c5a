"""The policy: a causal language model of transformers with a LoRA adapter, and its reference.

The reference is the same model with the adapter off, or with an earlier state of the adapter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_core.batch import Rollouts, take
from grpo_core.config.lora_checks import use_settings_of_adapter
from grpo_core.config.sections import LoraConfig, ModelConfig
from grpo_core.model import fast_layers, packed_attention
from grpo_core.model.adapter import add_adapter, base_values, load_adapter, save_adapter, use_adapter
from grpo_core.model.base_model import load_base_model
from grpo_core.model.logprobs import (
    Statistics,
    TeacherStates,
    find_statistics,
    is_frozen_linear,
    softmax_statistics,
    token_divergence,
    token_logprobs,
)
from grpo_core.model.optional_kernels import drop_wrong_kernels, use_convolution_kernel
from grpo_core.model.packing import Budget, Layout, Packing, Plan, pack_routed_experts, plan
from grpo_core.model.peft_names import BaseTunerLayer, PeftModel
from grpo_core.model.quantized import count_weights
from grpo_core.model.rotation import find_rotations, forget_lengths
from grpo_core.model.routing import RoutedForward, Routers, find_routers, watching
from grpo_core.model.update_mode import enable_gradient_checkpointing, evaluation_mode, update_mode
from grpo_core.monitor.file_modes import apply_umask
from grpo_core.schema import ConfigError


@dataclass(frozen=True)
class TokenStats:
    """Statistics of every completion token, [B, C] float32, 0 where masked."""

    logprobs: Tensor  # with gradient
    entropy: Tensor  # nats
    divergence: Tensor | None = None  # from the reference; None if not asked for
    sum_p_squared: Tensor | None = None  # sum over the vocabulary of the squared probabilities, without gradient
    teacher_divergence: Tensor | None = None  # from the teacher; None if not asked for
    routing_mismatch: Tensor | None = None  # share of routers that chose other experts in the sampler; None: unknown
    router_balance: Tensor | None = None  # [B, 1] load-balancing loss of each row; None if not asked for


class Policy:
    """A causal language model, with an adapter or without, that computes log-probs of completions.

    The model stays in evaluation mode (no dropout). Inside `training()` the adapter's dropout acts, and only that. With
    `replays_routing`, policy and reference compute with the experts that the sampler chose, where rollouts have them.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        *,
        temperature: float = 1.0,
        chunk_size: int | None = None,
        replays_routing: bool = False,
    ) -> None:
        self.model = model.eval()
        self.causal_lm: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        self.temperature, self.chunk_size, self.replays_routing = temperature, chunk_size, replays_routing
        self._reference: list[Tensor] | None = None  # its trained weights in float32; None: the adapter is off
        self._rounded_reference: list[Tensor] | None = None  # the same in the dtype of the parameters
        self._rotations = find_rotations(self.causal_lm.config)
        forget_lengths(self.causal_lm)

    @cached_property
    def layout(self) -> Layout:
        """The layout in which rows share a forward of this model (packing.py), found by trying in evaluation mode.

        Raises:
            ConfigError: rows cannot share a forward, not even in a grid.
        """
        with torch.no_grad(), evaluation_mode(self._modules):
            layout = packed_attention.find_layout(self.causal_lm, self._hidden)
            if layout == "grid":
                packed_attention.check_grid(self.causal_lm, self._hidden, self._body, self._rotations)
        return layout

    def choose_kernels(self) -> list[str]:
        """Stop using optional packages' functions that are wrong for this model; return a sentence for each.

        Where they leave it to torch, short convolutions are computed by a kernel on a GPU.
        """
        size = self.causal_lm.config.get_text_config().vocab_size
        ids = torch.arange(packed_attention.LONG_ROW, device=self.causal_lm.device)[None] % size
        with evaluation_mode(self._modules):
            sentences = drop_wrong_kernels(self.causal_lm, lambda: self._body(ids, use_cache=False))
            if ids.is_cuda:
                use_convolution_kernel(self.causal_lm, lambda: self._body(ids, use_cache=False))
        return sentences

    @cached_property
    def routers(self) -> Routers | None:
        """The routers of this model; None of a dense model, and where their experts cannot be recorded."""
        return find_routers(self.causal_lm)

    def compares_routing(self, rollouts: Rollouts) -> bool:
        """Return whether a forward of these rollouts has `routing_mismatch`."""
        return rollouts.routed_experts is not None and self.routers is not None

    def plan(
        self,
        rollouts: Rollouts,
        budget: Budget | None = None,
        rows: Sequence[int] | None = None,
        *,
        predict_given: bool = False,
    ) -> Plan:
        """Divide `rows` (default: all) into as few forwards as `budget` allows. Reads the device once.

        With `predict_given`, forwards also compute the log-probs of tokens that an environment gave.
        """
        budget = budget or Budget(math.inf)
        return plan(rollouts, budget, rows, self.layout, self._rotations, predict_given=predict_given)

    def logprobs(self, rollouts: Rollouts) -> Tensor:
        """Return the log-prob of every drawn token at the policy's temperature, [B, C] float32; 0 elsewhere."""
        return self.forward(rollouts).logprobs

    def forward(
        self,
        rollouts: Rollouts,
        packing: Packing | None = None,
        *,
        entropy_gradient: bool = False,
        divergence: Callable | None = None,
        teacher: TeacherStates | None = None,
        router_balance: bool = False,
    ) -> TokenStats:
        """Return log-probs and entropies of the drawn tokens, and optionally divergences and a balance of experts.

        `rollouts` are the rows of `packing`; without a packing they share one forward, unless their rotations differ.
        `divergence` is a function of kl.py and costs a forward of the reference. `teacher` needs a packing.
        """
        if packing is None:
            parts = self.plan(rollouts)
            if len(parts) > 1:
                stats = [(part.rows, take(rollouts, part.rows), part) for part in parts]
                options = {"entropy_gradient": entropy_gradient, "divergence": divergence}
                options["router_balance"] = router_balance
                return _join([(rows, self.forward(part, layout, **options)) for rows, part, layout in stats])
            packing = next(iter(parts))
        routed = self._begin_routing(rollouts, packing, router_balance)
        hidden = self._hidden(rollouts, packing, routed)
        ids = rollouts.completion_ids.flatten()[packing.predicted]
        options = self._logprob_options
        logprobs, entropy, sum_p_squared = token_logprobs(
            hidden, self._head, ids, entropy_gradient=entropy_gradient, statistics=self._statistics, **options
        )
        values = {"logprobs": logprobs, "entropy": entropy, "sum_p_squared": sum_p_squared}
        if divergence is not None:
            with torch.no_grad(), self.reference(), evaluation_mode(self._modules):
                ref_hidden = self._hidden(rollouts, packing)
            values["divergence"] = token_divergence(
                hidden, ref_hidden, self._head, divergence, ref_lm_head=self._reference_head, **options
            )
        if teacher is not None:
            values["teacher_divergence"] = teacher.divergence(hidden, self._head, packing.predicted, **options)
        if routed is not None and routed.sampled is not None:
            values["routing_mismatch"] = routed.mismatch()[packing.predictors.index]
        shape = rollouts.completion_ids.shape
        spread = {
            name: x.new_zeros(shape.numel()).index_copy(0, packing.predicted, x).view(shape)
            for name, x in values.items()
        }
        if routed is not None and router_balance:
            spread["router_balance"] = routed.balance(packing.members())[:, None]
        return TokenStats(**spread)

    @torch.no_grad()
    def divergence(self, rollouts: Rollouts, packing: Packing, function: Callable, keep: Tensor) -> Tensor:
        """Return the divergence of policy and reference at the tokens that `keep` [b, C] selects, [n] float32.

        `rollouts` are the rows of `packing`, and `function` is one of kl.py.
        """
        keep = keep.flatten()[packing.predicted]
        hidden = self._hidden(rollouts, packing)[keep]
        with self.reference():
            ref_hidden = self._hidden(rollouts, packing)[keep]
        return token_divergence(
            hidden, ref_hidden, self._head, function, ref_lm_head=self._reference_head, **self._logprob_options
        )

    def hidden_states(self, rollouts: Rollouts, budget: Budget | None = None) -> Tensor:
        """Return the hidden state that predicts each drawn token, [B, C, H]; 0 elsewhere."""
        states = torch.zeros(0)
        for packing in self.plan(rollouts, budget):
            hidden, width = self._hidden(take(rollouts, packing.rows), packing), rollouts.completion_ids.shape[1]
            if not len(states):
                states = hidden.new_zeros(len(rollouts), width, hidden.shape[-1])
            states[packing.rows[packing.predicted // width], packing.predicted % width] = hidden
        return states

    def _begin_routing(self, rollouts: Rollouts, packing: Packing, balance: bool = False) -> RoutedForward | None:
        """Return how the routers of one forward are watched; None where there is nothing to watch."""
        experts = pack_routed_experts(rollouts, packing)
        if (experts is None and not balance) or self.routers is None:
            return None
        return self.routers.begin(experts, replays=self.replays_routing, keeps_choices=balance)

    def _hidden(self, rollouts: Rollouts, packing: Packing, routed: RoutedForward | None = None) -> Tensor:
        """Return the hidden states that predict the drawn tokens, [n, H] in the order of `packing.predicted`."""
        if routed is None and self.replays_routing:
            routed = self._begin_routing(rollouts, packing)
        with watching(routed):
            return self._compute_hidden(rollouts, packing)

    def _compute_hidden(self, rollouts: Rollouts, packing: Packing) -> Tensor:
        ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], dim=1).flatten()[packing.source]
        base, positions = self._body, packing.positions
        if packing.mask is not None:
            shape, mask = packing.mask.shape, packing.mask.long()
            out = base(ids.view(shape), attention_mask=mask, position_ids=positions.view(shape), use_cache=False)
            return packing.predictors(out.last_hidden_state.flatten(0, 1))
        unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)  # transformers keeps 4-D masks as they are
        out = base(
            ids[None],
            attention_mask=unused,
            position_ids=positions[None],
            use_cache=False,
            packing=packing.attention,
        )
        return packing.predictors(out.last_hidden_state[0])

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Let the policy compute as the reference: the frozen base model, or the last `move_reference`."""
        if self._reference is None:
            with self.model.disable_adapter():
                yield
            return
        parameters = self.parameters()
        own = [parameter.data for parameter in parameters]
        if self._rounded_reference is None:
            self._rounded_reference = [
                value.to(parameter.dtype) for value, parameter in zip(self._reference, parameters, strict=True)
            ]
        try:
            for parameter, value in zip(parameters, self._rounded_reference, strict=True):
                parameter.data = value
            yield
        finally:
            for parameter, value in zip(parameters, own, strict=True):
                parameter.data = value

    @torch.no_grad()
    def start_reference(self) -> None:
        """Set a reference that will move to the base model: the trained weights with which nothing is changed."""
        values = base_values(self._modules)
        self._reference = [values.get(id(p), p).detach().float().clone() for p in self.parameters()]
        self._rounded_reference = None

    @torch.no_grad()
    def move_reference(self, mixing: float = 1.0) -> None:
        """Set reference = mixing * policy + (1 - mixing) * reference, in the trained weights. arXiv:2404.09656.

        With mixing 1 the reference becomes the policy. Below 1, LoRA's two factors are mixed separately, as TRL mixes
        parameters, which differs from mixing their products. With a fresh adapter, whose product is 0, the reference
        equals the base model. The reference is kept in float32: in 16 bits a small `mixing` would be rounded away.
        """
        weights = [parameter.detach().float() for parameter in self.parameters()]
        if self._reference is None:
            self._reference = [value.clone() for value in weights]
        for old, new in zip(self._reference, weights, strict=True):
            old.lerp_(new, mixing)
        self._rounded_reference = None

    def reference_state(self) -> list[Tensor] | None:
        """Return the weights of a moved reference for a checkpoint; None for a reference that never moved."""
        return self._reference

    def load_reference(self, state: list[Tensor]) -> None:
        """Restore the weights that `reference_state` returned."""
        assert self._reference is not None
        for own, value in zip(self._reference, state, strict=True):
            own.copy_(value)
        self._rounded_reference = None

    @contextmanager
    def evaluating(self, adapter: str | None = None) -> Iterator[None]:
        """Compute without gradient and dropout, and with another loaded adapter in place of the trained one if given.

        PEFT's set_adapter would also change which adapter is trained.
        """
        with use_adapter(self._modules, adapter), torch.no_grad(), evaluation_mode(self._modules):
            yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """Switch the adapter's dropout and gradient checkpointing on. The base model's own dropout stays off."""
        with update_mode(self._modules, self._adapter_modules):
            yield

    @cached_property
    def _modules(self) -> list[nn.Module]:
        return [*self.model.modules()]

    @cached_property
    def _adapter_modules(self) -> list[nn.Module]:
        """The modules that PEFT added: wrappers of the whole model, and its layers without the base layers in them."""
        added = {*self._modules} - {*self.causal_lm.modules()}
        for layer in self._modules:
            if isinstance(layer, BaseTunerLayer):
                added |= {*layer.modules()} - {*layer.get_base_layer().modules()}
        return [module for module in self._modules if module in added]

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters, without duplicates."""
        parameters = (p for module in self._modules for p in module._parameters.values())
        return [p for p in dict.fromkeys(parameters) if p is not None and p.requires_grad]

    def flops_per_token(self) -> float:
        """Return the floating-point operations of forward and backward for one token.

        Each weight costs 2 in the forward, 2 for the gradient of its input, and 2 for its own gradient if trained.
        """
        parameters = {id(p): p for p in self.model.parameters()}
        embeddings, head = (
            {id(p) for p in module.parameters()}
            for module in (self.causal_lm.get_input_embeddings(), self.causal_lm.get_output_embeddings())
        )
        for key in embeddings - head:
            parameters.pop(key, None)  # a look-up, no product
        trained = [p for p in parameters.values() if p.requires_grad]
        frozen = [p for p in parameters.values() if not p.requires_grad]
        return 6.0 * count_weights(trained, self.model).count + 4.0 * count_weights(frozen, self.model).count

    def norm(self) -> Tensor:
        """Return the L2 norm of all trained weights, a scalar.

        LoRA's B starts at 0, so a norm that never changes shows that nothing is trained.
        """
        norms = torch._foreach_norm([p.detach() for p in self.parameters()], 2.0, torch.float32)
        return torch.stack(norms).double().square().sum().sqrt()

    def save(self, folder: Path) -> None:
        """Write the trained adapter in PEFT's format, or the whole model if there is no adapter."""
        if isinstance(self.model, PeftModel):
            save_adapter(self.model, folder)
        else:
            self.model.save_pretrained(folder)
        apply_umask(*folder.glob("*.safetensors"))

    @cached_property
    def _logit_scale(self) -> float:
        """The factor by which the model multiplies the output of its head, measured; 1 for most models.

        Granite, Cohere and Falcon-H1 have such a factor.

        Raises:
            ConfigError: the logits are not a multiple of the head's output.
        """
        logits, hidden = self._measure_logits()
        output = self._head(hidden).detach().double()
        scale = float((logits * output).sum() / output.square().sum())
        tolerance = 1e-5 if self.causal_lm.dtype == torch.float32 else 0.05
        if not (logits - scale * output).norm() <= tolerance * logits.norm():
            raise ConfigError(
                f"the {self.causal_lm.config.model_type} model at model.path is not supported: its logits are not a "
                f"multiple of the output of its head, so its log-probs would be wrong"
            )
        return 1.0 if abs(scale - 1) < (1e-5 if self.causal_lm.dtype == torch.float32 else 1e-3) else scale

    @property
    def _logprob_options(self) -> dict[str, Any]:
        return {"temperature": self.temperature / self._logit_scale, "chunk_size": self.chunk_size}

    def _measure_logits(self) -> tuple[Tensor, Tensor]:
        """Return the model's logits of a few tokens, in float64, and the final hidden states that they come from."""
        vocabulary = self.causal_lm.config.get_text_config().vocab_size
        ids = torch.arange(8, device=self.causal_lm.device)[None] % vocabulary
        with torch.no_grad(), evaluation_mode(self._modules):
            logits = self.causal_lm(ids, use_cache=False).logits.double()
            return logits, self._body(ids, use_cache=False).last_hidden_state

    @cached_property
    def _body(self) -> nn.Module:
        """The model without its head."""
        model = self.causal_lm
        candidates = [model.base_model, model.get_decoder(), getattr(model, "model", model)]
        return next((body for body in candidates if body is not model), model)

    @cached_property
    def _logit_cap(self) -> float | None:
        """The bound of the logits, tanh(x / cap) * cap; None for a model that has none, or does not apply it."""
        named = vars(self.causal_lm.config.get_text_config()).items()
        caps = [value for name, value in named if re.search("logits?_soft_?cap", name) and value]
        if not caps:
            return None
        logits, hidden = self._measure_logits()
        with torch.no_grad():
            plain = self.causal_lm.get_output_embeddings()(hidden).double()
        gaps = {None: float((logits - plain).norm())}
        gaps |= {cap: float((logits - torch.tanh(plain / cap) * cap).norm()) for cap in caps}
        return min(gaps, key=lambda cap: gaps[cap])

    @property
    def _head(self) -> Callable[[Tensor], Tensor]:
        """The function from hidden states to logits, before `_logit_scale`."""
        head, cap = self.causal_lm.get_output_embeddings(), self._logit_cap
        return head if cap is None else lambda hidden: torch.tanh(head(hidden) / cap) * cap

    @property
    def _reference_head(self) -> Callable[[Tensor], Tensor]:
        if is_frozen_linear(self.causal_lm.get_output_embeddings()):
            return self._head

        def head(hidden: Tensor) -> Tensor:  # the head has an adapter or is trained
            with self.reference():
                return self._head(hidden)

        return head

    @property
    def _statistics(self) -> Statistics:
        head = self.causal_lm.get_output_embeddings()
        if not is_frozen_linear(head):
            return softmax_statistics  # not used
        return find_statistics(head.weight.device, head.weight.dtype, head.out_features)

    @property
    def kernel_differs(self) -> bool:
        """True if the kernel for log-probs is not used on this GPU, because it computes other values than torch."""
        is_used = self.causal_lm.device.type == "cuda" and is_frozen_linear(self.causal_lm.get_output_embeddings())
        return is_used and self._statistics is softmax_statistics


def _join(parts: list[tuple[Tensor, TokenStats]]) -> TokenStats:
    """Return the statistics of all rows from those of parts of their rows, which are given as indices [b]."""
    order, values = torch.cat([rows for rows, _ in parts]).argsort(), {}
    for field in fields(TokenStats):
        columns = [getattr(stats, field.name) for _, stats in parts]
        values[field.name] = None if columns[0] is None else torch.cat(columns)[order]
    return TokenStats(**values)


def load_policy(
    model: ModelConfig,
    lora: LoraConfig,
    *,
    dtype: torch.dtype,
    temperature: float,
    adapter: Path | None = None,
    replays_routing: bool = False,
) -> Policy:
    """Load the base model of `model.path` in `dtype`, frozen, with a fresh adapter, or with that of lora.path.

    With lora.r = 0 there is no adapter, and all weights are trained. `adapter` is a folder with an adapter in PEFT's
    format, which takes the place of the section lora.

    Raises:
        ConfigError: the model cannot be loaded, has no such attention implementation or target modules, or the adapter
            does not fit.
    """
    base: Any = load_base_model(model, dtype)
    if adapter is None and lora.path is not None:
        use_settings_of_adapter(lora)
        adapter = Path(lora.path)
    if adapter is None:
        policy = wrap(base, model, lora, temperature=temperature)
    else:
        if model.gradient_checkpointing is True:
            enable_gradient_checkpointing(base)
        base = load_adapter(base, adapter, model.path)
        fast_layers.install(base)
        policy = Policy(base, temperature=temperature)
    policy.replays_routing = replays_routing
    return policy


def wrap(base: PreTrainedModel, model: ModelConfig, lora: LoraConfig, *, temperature: float) -> Policy:
    """Return a policy of `base` with a fresh adapter, and gradient checkpointing as configured; auto leaves it off.

    With all-linear, linear layers that do not return one tensor are left out.

    Raises:
        ConfigError: the model does not have the modules that the section lora names.
    """
    if model.gradient_checkpointing is True:
        enable_gradient_checkpointing(base)
    adapted: Any = add_adapter(base, lora, model.revision) if lora.r else base
    fast_layers.install(adapted)
    return Policy(adapted, temperature=temperature)
