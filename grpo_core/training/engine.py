"""DeepSpeed ZeRO around the policy: backward, step, and its own state. All of its arithmetic stays in this file.

Every micro-batch's loss is already a part of the whole step's loss (token_weights), so gradients must be *summed* over
micro-batches and ranks. Micro-batches are summed here, in float32 and without DeepSpeed, so ranks may have different
numbers of them; `step` hands the sum over in one backward, whose collectives are the only ones of the step. DeepSpeed
averages over ranks: the sum is multiplied by the world size.

DeepSpeed's step costs a few dozen small operations for every parameter, and LoRA has hundreds. So what it is given is a
few long vectors, of which the model's weights are views.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it greets on import
import deepspeed
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

from grpo_core.config.sections import RunConfig
from grpo_core.distributed import watchdog
from grpo_core.schema import ConfigError
from grpo_core.training.deepspeed_config import deepspeed_config

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a C++ build of half a minute, for nothing that is used
with (
    contextlib.suppress(ImportError),
    mock.patch("deepspeed.runtime.compiler.compile", lambda *given, **named: lambda function: function),
):  # ZeRO imports an optimizer that nobody asked for, which would load torch's compiler: 1.3 s of every start
    import deepspeed.runtime.zero.muon.original_muon

MOMENTS = ("exp_avg", "exp_avg_sq")
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
LONGEST = 2**26  # elements of a vector: LoRA is one; a whole model's are not all gathered at once for a checkpoint
ALIGN = 64  # elements: every weight begins where wide loads may


@dataclass(frozen=True)
class StepResult:
    grad_norm: float  # before clipping
    learning_rate: float  # of this step
    applied: bool  # False where fp16 overflowed, or a gradient was not finite, on any rank


class Engine:
    """A DeepSpeed engine around `model` with AdamW over what requires a gradient."""

    def __init__(
        self, model: nn.Module, config: RunConfig, *, dtype: torch.dtype, total_steps: int, world_size: int
    ) -> None:
        self.world_size = world_size
        settings = config.engine
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ConfigError("the model has no parameter that is trained: nothing in it requires a gradient")
        self.trained = [name for name, p in model.named_parameters() if p.requires_grad]
        self._vectors = _Vectors(model, self.parameters, dtype)
        optimizer = (
            torch.optim.AdamW(  # torch's own, offloaded or not: it compiles nothing, and LoRA's states are small
                self._vectors.whole,
                lr=settings.learning_rate,
                betas=(settings.beta1, settings.beta2),
                eps=settings.adam_eps,
                weight_decay=settings.weight_decay,
            )
        )
        schedule = learning_rate_schedule(settings.schedule, settings.warmup_steps, total_steps)
        filled = deepspeed_config(config, dtype, world_size)
        trained = sum(len(vector) for vector in self._vectors.whole)
        for bucket in ("reduce_bucket_size", "allgather_bucket_size"):  # 5e8 by default, and 1 GB held for it
            if filled["zero_optimization"].get(bucket, "auto") == "auto":
                filled["zero_optimization"][bucket] = min(trained, 500_000_000)
        with _quiet(not config.log.verbose):
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=self._vectors,
                optimizer=optimizer,
                lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
                config=filled,
            )
        self._vectors.attach(self.parameters)  # DeepSpeed has put them in its own buffer
        self.scales_loss = dtype is torch.float16
        self._sums = [torch.zeros_like(vector, dtype=torch.float32) for vector in self._vectors.whole]
        self._parts = self._vectors.cut(self._sums)

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's part: the sum over all micro-batches and ranks is the step's gradient.

        No collective: a rank may call it as often as it has micro-batches, or never.
        """
        scale = float(getattr(self.optimizer, "loss_scale", 1.0))  # above 1 for fp16
        grads = torch.autograd.grad(loss * scale, self.parameters, allow_unused=True)
        for total, grad in zip(self._parts, grads, strict=True):
            if grad is not None:
                total.add_(grad, alpha=1.0 / scale)

    def step(self) -> StepResult:
        """Sum over ranks, clip, update the weights, advance the learning rate. A collective.

        A sum that is not finite on any rank changes nothing: no weight, no moment, not the learning rate (DeepSpeed
        looks in every precision).
        """
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        with watchdog.waiting():
            self.engine.backward(_Handed.apply(self._sums, *self._vectors.whole) * self.world_size)
            torch._foreach_zero_(self._sums)
            self.engine.step()
        grad_norm = self.engine.get_global_grad_norm()
        return StepResult(float(grad_norm), learning_rate, bool(self.engine.was_step_applied()))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What training goes on from, whole and in float32: the trained weights and Adam's two moments. A collective.

        Names are <kind>/<weight>. Nothing in it depends on the number of ranks.
        """
        names = iter(self.trained)
        for vector, places in zip(self._vectors.whole, self._vectors.places, strict=True):
            whole = {"weight": safe_get_full_fp32_param(vector)}
            for moment in MOMENTS if self._adam_steps() else ():
                whole[moment] = safe_get_full_optimizer_state(vector, moment)
            for (start, shape), name in zip(places, names, strict=False):  # names go on with the next vector
                for kind, values in whole.items():
                    yield f"{kind}/{name}", values[start : start + shape.numel()].view(shape)

    def numbers(self) -> dict[str, Any]:
        """What else it goes on from: Adam's count of steps, the learning rate's schedule, fp16's loss scale."""
        schedule = {key: value for key, value in self.engine.lr_scheduler.state_dict().items() if key != "lr_lambdas"}
        scaler = {key: vars(self.optimizer.loss_scaler).get(key) for key in LOSS_SCALE}
        return {"adam_steps": self._adam_steps(), "schedule": schedule, "loss_scale": scaler}

    def load(self, tensors: Mapping[str, Tensor], numbers: dict[str, Any]) -> None:
        """Continue from `tensors` and `numbers`, bitwise.

        Raises:
            ConfigError: they are of other weights than the ones that are trained now.
        """
        shapes = {f"weight/{name}": p.shape for name, p in zip(self.trained, self.parameters, strict=True)}
        kept = {name: value.shape for name, value in tensors.items() if name.startswith("weight/")}
        if differing := sorted(name for name in shapes.keys() | kept.keys() if shapes.get(name) != kept.get(name)):
            name = differing[0]
            then, now = (tuple(where[name]) if name in where else "none" for where in (kept, shapes))
            raise ConfigError(
                f"the checkpoint is of other weights: {len(differing)} differ, "
                f"{name} among them ({then} then, {now} now)"
            )
        adam = self.optimizer.optimizer
        for flat in (flat for group in adam.param_groups for flat in group["params"] if numbers["adam_steps"]):
            moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            adam.state[flat] = {"step": torch.tensor(float(numbers["adam_steps"])), **moments}
        if numbers["adam_steps"]:
            self.optimizer._lazy_init_hp_params_optimizer_state()  # DeepSpeed does it after a first step
        for kind in ("weight", *(MOMENTS if numbers["adam_steps"] else ())):
            for total, name in zip(self._parts, self.trained, strict=True):
                total.copy_(tensors[f"{kind}/{name}"])
            for vector, values in zip(self._vectors.whole, self._sums, strict=True):
                if kind == "weight":
                    safe_set_full_fp32_param(vector, values)
                    vector.data.copy_(values)
                else:
                    safe_set_full_optimizer_state(vector, values, kind)
        torch._foreach_zero_(self._sums)
        self.engine.lr_scheduler.load_state_dict({**numbers["schedule"], "lr_lambdas": [None]})
        for group, rate in zip(adam.param_groups, numbers["schedule"]["_last_lr"], strict=True):
            group["lr"] = rate
        for key, value in numbers["loss_scale"].items():
            if value is not None:
                setattr(self.optimizer.loss_scaler, key, value)

    def _adam_steps(self) -> int:
        return max((int(state["step"]) for state in self.optimizer.optimizer.state.values()), default=0)


class _Vectors(nn.Module):
    """The model, and the vectors whose views its trained parameters are to be."""

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter], dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.places: list[list[tuple[int, torch.Size]]] = []  # of each vector: its parameters' first elements, shapes
        lengths: list[int] = []
        for p in parameters:
            if not lengths or lengths[-1] + p.numel() > LONGEST:
                lengths.append(0)
                self.places.append([])
            self.places[-1].append((lengths[-1], p.shape))
            lengths[-1] += -(-p.numel() // ALIGN) * ALIGN
        self.whole = nn.ParameterList(torch.zeros(n, dtype=dtype, device=parameters[0].device) for n in lengths)
        with torch.no_grad():
            torch._foreach_copy_(self.cut([*self.whole]), parameters)
        for p in parameters:  # DeepSpeed is to see the vectors alone
            p.requires_grad_(False)
            p.data = p.new_empty(0)

    def cut(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The parameters' places in `vectors`, in their shapes, as views."""
        return [
            vector.detach()[start : start + shape.numel()].view(shape)
            for vector, places in zip(vectors, self.places, strict=True)
            for start, shape in places
        ]

    def attach(self, parameters: list[nn.Parameter]) -> None:
        """Let the parameters be views of the vectors, and require gradients again."""
        for p, view in zip(parameters, self.cut([*self.whole]), strict=True):
            p.data = view
            p.requires_grad_(True)


class _Handed(torch.autograd.Function):
    """A scalar 0 whose gradient for the parameters is what is given."""

    @staticmethod
    def forward(context: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        context.gradients, context.dtypes = gradients, [p.dtype for p in parameters]
        return gradients[0].new_zeros(())

    @staticmethod
    def backward(context: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        scaled = torch._foreach_mul(context.gradients, scale)
        return None, *(gradient.to(dtype) for gradient, dtype in zip(scaled, context.dtypes, strict=True))


def learning_rate_schedule(kind: str, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at optimizer step k = 0, 1, ...: a linear rise that starts above 0, then the decay.

    The last step still learns: the factor reaches 0 at step `total_steps`, which is never taken.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[kind]

    return factor


@contextlib.contextmanager
def _quiet(quiet: bool = True):
    """Hold back what DeepSpeed prints to stdout; errors are raised as ever."""
    if not quiet:
        deepspeed.utils.logger.setLevel(logging.INFO)
        yield
        return
    deepspeed.utils.logger.setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
