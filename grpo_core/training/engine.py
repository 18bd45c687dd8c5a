"""The DeepSpeed ZeRO engine around the policy's model: backward, step, state. Its arithmetic stays in this file.

Every micro-batch's loss is already its part of the whole step's loss (token_weights), so gradients must be *summed*
over micro-batches and ranks. Micro-batches are summed here, in float32 and without DeepSpeed, so ranks may have
different numbers of them; `step` passes the sum to DeepSpeed in one backward, whose collectives are the only ones of
the step. DeepSpeed averages over ranks: the sum is multiplied by the world size.

DeepSpeed's step runs a few dozen small operations for every parameter, and LoRA has hundreds: 170 to 200 ms for 420
matrices, 5 to 10 ms for one vector. So the model's trained parameters are views of a few flat parameters, as in
PyTorch's FSDP, and those are what DeepSpeed steps.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it logs on import
import deepspeed
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

from grpo_core.config.sections import RunConfig
from grpo_core.distributed import watchdog
from grpo_core.schema import ConfigError, first_line, list_known
from grpo_core.training.deepspeed_config import deepspeed_config
from grpo_core.training.lr_schedule import learning_rate_schedule

MOMENTS = ("exp_avg", "exp_avg_sq")
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
MAX_FLAT_ELEMENTS = 2**26  # of one flat parameter: LoRA fits into one; a whole model is gathered in parts
ALIGNMENT = 64  # elements: every view begins where wide loads may
READ_BY_KEY = ("activation_checkpointing", "data_types", "checkpoint")  # blocks whose unknown keys DeepSpeed ignores
READ_LATER = ("flops_profiler",)  # keys that deepspeed.initialize reads, not DeepSpeed's configuration
MAX_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default, for which it would allocate 1 GB


@dataclass(frozen=True)
class StepResult:
    """The outcome of one optimizer step."""

    grad_norm: float  # before clipping
    learning_rate: float  # of this step
    applied: bool  # False where fp16 overflowed, or a gradient was not finite, on any rank


class Engine:
    """A DeepSpeed engine whose module is `model`, with AdamW over the parameters that require a gradient."""

    def __init__(
        self, model: nn.Module, config: RunConfig, *, dtype: torch.dtype, total_steps: int, world_size: int
    ) -> None:
        self.world_size = world_size
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ConfigError("the model has no parameter that is trained: nothing in it requires a gradient")
        self.trained = [name for name, p in model.named_parameters() if p.requires_grad]
        self._flat = _FlatParameters(self.parameters, dtype)
        settings = config.engine
        optimizer = (
            torch.optim.AdamW(  # torch's own, offloaded or not: it compiles nothing, and LoRA's states are small
                self._flat.parameters,
                lr=settings.learning_rate,
                betas=(settings.beta1, settings.beta2),
                eps=settings.adam_eps,
                weight_decay=settings.weight_decay,
            )
        )
        schedule = learning_rate_schedule(settings.schedule, settings.warmup_steps, total_steps)
        _skip_unused_parts()
        with self._flat.registered(model), _quiet(not config.log.verbose):
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
                config=self._filled_config(config, dtype),
            )
        self._flat.attach(self.parameters)
        _stay_at_minimum(self.optimizer.loss_scaler)
        self.scales_loss = dtype is torch.float16
        self._sums = [torch.zeros_like(flat, dtype=torch.float32) for flat in self._flat.parameters]
        self._sum_views = self._flat.views(self._sums)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's loss; the sum over all micro-batches and ranks is the step's gradient.

        No collective: a rank may call it as often as it has micro-batches, or never.
        """
        scale = float(getattr(self.optimizer, "loss_scale", 1.0))  # above 1 for fp16
        grads = torch.autograd.grad(loss * scale, self.parameters, allow_unused=True)
        for total, grad in zip(self._sum_views, grads, strict=True):
            if grad is not None:
                total.add_(grad, alpha=1.0 / scale)

    def step(self) -> StepResult:
        """Sum the gradient over ranks, clip it, update the weights, advance the learning rate. A collective.

        A gradient that is not finite on any rank changes nothing: no weight, no moment, not the learning rate
        (DeepSpeed checks in every precision).
        """
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        with watchdog.waiting():
            loss = _InjectedGradients.apply(self._sums, *self._flat.parameters)
            self.engine.backward(loss * self.world_size)
            torch._foreach_zero_(self._sums)
            self.engine.step()
        grad_norm = self.engine.get_global_grad_norm()
        return StepResult(float(grad_norm), learning_rate, bool(self.engine.was_step_applied()))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the trained weights and Adam's two moments, whole and in float32, as (<kind>/<weight>, tensor).

        They do not depend on the number of ranks. A collective.
        """
        names = iter(self.trained)
        for flat, places in zip(self._flat.parameters, self._flat.places, strict=True):
            values = {"weight": safe_get_full_fp32_param(flat)}
            for moment in MOMENTS if self._adam_steps() else ():
                values[moment] = safe_get_full_optimizer_state(flat, moment)
            for (start, shape), name in zip(places, names, strict=False):  # the next flat parameter goes on with names
                for kind, vector in values.items():
                    yield f"{kind}/{name}", vector[start : start + shape.numel()].view(shape)

    def numbers(self) -> dict[str, Any]:
        """Return the rest of the state: Adam's count of steps, the schedule of the learning rate, fp16's loss scale."""
        schedule = {key: value for key, value in self.engine.lr_scheduler.state_dict().items() if key != "lr_lambdas"}
        scaler = {key: vars(self.optimizer.loss_scaler).get(key) for key in LOSS_SCALE}
        return {"adam_steps": self._adam_steps(), "schedule": schedule, "loss_scale": scaler}

    def load(self, tensors: Mapping[str, Tensor], numbers: dict[str, Any]) -> None:
        """Restore the state that `tensors` and `numbers` returned, bitwise.

        Raises:
            ConfigError: the weights have other names or shapes than those that are trained now.
        """
        self._check_shapes(tensors)
        adam = self.optimizer.optimizer
        if numbers["adam_steps"]:
            for flat in (flat for group in adam.param_groups for flat in group["params"]):
                moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
                adam.state[flat] = {"step": torch.tensor(float(numbers["adam_steps"]), device="cpu"), **moments}
            self.optimizer._lazy_init_hp_params_optimizer_state()  # DeepSpeed does it after a first step
        for kind in ("weight", *(MOMENTS if numbers["adam_steps"] else ())):
            for view, name in zip(self._sum_views, self.trained, strict=True):
                view.copy_(tensors[f"{kind}/{name}"])
            for flat, values in zip(self._flat.parameters, self._sums, strict=True):
                if kind == "weight":
                    safe_set_full_fp32_param(flat, values)
                    flat.data.copy_(values)
                else:
                    safe_set_full_optimizer_state(flat, values, kind)
        torch._foreach_zero_(self._sums)
        self._restore_schedule(numbers["schedule"])
        for key, value in numbers["loss_scale"].items():
            if value is not None:
                setattr(self.optimizer.loss_scaler, key, value)

    def _restore_schedule(self, saved: dict[str, Any]) -> None:
        """Go on at the saved step of the schedule, with the learning rate that this run's schedule has there.

        The saved rate is that of a run that may have had another number of steps, or another engine.learning_rate.
        """
        schedule = self.engine.lr_scheduler
        schedule.load_state_dict({**saved, "base_lrs": schedule.base_lrs, "lr_lambdas": [None]})
        rates = [
            base * factor(schedule.last_epoch)
            for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        schedule._last_lr = rates
        for group, rate in zip(self.optimizer.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _check_shapes(self, tensors: Mapping[str, Tensor]) -> None:
        shapes = {f"weight/{name}": p.shape for name, p in zip(self.trained, self.parameters, strict=True)}
        saved = {name: value.shape for name, value in tensors.items() if name.startswith("weight/")}
        differing = sorted(name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name))
        if differing:
            name = differing[0]
            then, now = (str(tuple(known[name])) if name in known else "none" for known in (saved, shapes))
            raise ConfigError(
                f"the checkpoint's trained weights are not those of this run: {len(differing)} differ, the first is "
                f"{name} ({then} in the checkpoint, {now} in this run)"
            )

    def _filled_config(self, config: RunConfig, dtype: torch.dtype) -> dict[str, Any]:
        """DeepSpeed's configuration, with buckets that are no larger than the trained weights."""
        filled = deepspeed_config(config, dtype, self.world_size)
        elements = sum(len(flat) for flat in self._flat.parameters)
        for bucket in ("reduce_bucket_size", "allgather_bucket_size"):
            if filled["zero_optimization"].get(bucket, "auto") == "auto":
                filled["zero_optimization"][bucket] = min(elements, MAX_BUCKET_ELEMENTS)
        return filled

    def _adam_steps(self) -> int:
        return max((int(state["step"]) for state in self.optimizer.optimizer.state.values()), default=0)


def check_deepspeed(filled: dict[str, Any]) -> None:
    """Raise ConfigError if DeepSpeed refuses a filled-in configuration, or has a key that it never reads."""
    for key in READ_BY_KEY:
        if not isinstance(filled.get(key, {}), dict):
            raise ConfigError(f"the DeepSpeed JSON's {key} is {filled[key]!r}; it must be a mapping, or be left out")
    recorder = _Recorder({key: _Recorder(value) if key in READ_BY_KEY else value for key, value in filled.items()})
    try:
        with _quiet():
            deepspeed.DeepSpeedConfig(recorder)
    except Exception as error:  # of many types: pydantic's, DeepSpeed's own, and those of values of a wrong type
        raise ConfigError(f"the DeepSpeed JSON's {_describe_refusal(recorder.last, error)}") from error
    for prefix, block in (("", recorder), *((f"{key}.", recorder.get(key)) for key in READ_BY_KEY)):
        for key in block if isinstance(block, _Recorder) else ():
            if key not in block.read and (prefix or key in filled) and key not in READ_LATER:
                known = list_known(key, block.read).rpartition(" (")[2].rstrip(")")
                hint = f" ({known})" if known.startswith("did you") else ""
                raise ConfigError(
                    f"the DeepSpeed JSON has {prefix}{key}, which DeepSpeed does not read{hint}; remove it"
                )


def _describe_refusal(block: str, error: Exception) -> str:
    """Return the key of a DeepSpeed configuration that `error` is about, its value, and what is wrong with it."""
    details = getattr(error, "errors", None)  # of pydantic
    if not callable(details):
        return f"{block} is refused by DeepSpeed: {first_line(error)}"
    first = details()[0]
    key = ".".join(map(str, (block, *first["loc"])))
    if first["type"] == "extra_forbidden":
        return f"{key} is no key of DeepSpeed's {block}; correct its spelling or remove it"
    return f"{key} is {first['input']!r}; {first['msg'][:1].lower()}{first['msg'][1:]}"


class _Recorder(dict):
    """A mapping that records which keys are read."""

    def __init__(self, values: Any) -> None:
        super().__init__(values)
        self.read: set[str] = set()
        self.last = ""  # the key that was read last

    def _record(self, key: Any) -> None:
        self.read.add(key)
        self.last = key

    def __getitem__(self, key: Any) -> Any:
        self._record(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self._record(key)
        return super().get(key, default)

    def __contains__(self, key: Any) -> bool:
        self._record(key)
        return super().__contains__(key)

    def keys(self) -> Any:
        return self  # DeepSpeed asks `key in config.keys()`

    def __copy__(self) -> _Recorder:
        return self


class _FlatParameters:
    """A few long parameters that hold the values of a model's trained parameters, one after another.

    The model's own parameters keep their names and become views of them (`attach`), so LoRA's modules, PEFT and the
    sampler see what they always saw. The flat parameters are registered on the model only while DeepSpeed takes it
    over, as FSDP keeps its own out of `named_parameters`.
    """

    def __init__(self, parameters: list[nn.Parameter], dtype: torch.dtype) -> None:
        self.places: list[list[tuple[int, torch.Size]]] = []  # for each flat parameter: starts and shapes of its views
        lengths: list[int] = []
        for p in parameters:
            if not lengths or lengths[-1] + p.numel() > MAX_FLAT_ELEMENTS:
                lengths.append(0)
                self.places.append([])
            self.places[-1].append((lengths[-1], p.shape))
            lengths[-1] += -(-p.numel() // ALIGNMENT) * ALIGNMENT
        device = parameters[0].device
        self.parameters = [nn.Parameter(torch.zeros(length, dtype=dtype, device=device)) for length in lengths]
        with torch.no_grad():
            torch._foreach_copy_(self.views(self.parameters), parameters)
        for p in parameters:  # DeepSpeed shall step the flat parameters alone
            p.requires_grad_(False)
            p.data = p.new_empty(0)

    def views(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the places of the trained parameters in `vectors`, in their shapes, as views."""
        return [
            vector.detach()[start : start + shape.numel()].view(shape)
            for vector, places in zip(vectors, self.places, strict=True)
            for start, shape in places
        ]

    @contextlib.contextmanager
    def registered(self, model: nn.Module) -> Iterator[None]:
        """Register the flat parameters as parameters of `model` inside the block."""
        names = [f"flat_parameter_{i}" for i in range(len(self.parameters))]
        for name, flat in zip(names, self.parameters, strict=True):
            model.register_parameter(name, flat)
        try:
            yield
        finally:
            for name in names:
                delattr(model, name)

    def attach(self, parameters: list[nn.Parameter]) -> None:
        """Make the trained parameters views of the flat ones, which DeepSpeed has moved into its own buffer."""
        for p, view in zip(parameters, self.views(self.parameters), strict=True):
            p.data = view
            p.requires_grad_(True)


class _InjectedGradients(torch.autograd.Function):
    """Inject precomputed gradients: a zero loss whose backward returns them."""

    @staticmethod
    def forward(context: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        context.gradients, context.dtypes = gradients, [p.dtype for p in parameters]
        return gradients[0].new_zeros(())

    @staticmethod
    def backward(context: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        scaled = torch._foreach_mul(context.gradients, scale)
        return None, *(gradient.to(dtype) for gradient, dtype in zip(scaled, context.dtypes, strict=True))


def _stay_at_minimum(scaler: Any) -> None:
    """Let a loss scale at its minimum stay there, where DeepSpeed would raise an error in the midst of a step.

    The step is skipped and counted like any other; `trainer.max_skipped_steps` in a row end the run with a checkpoint.
    """
    if getattr(scaler, "raise_error_at_min_scale", False):
        scaler.raise_error_at_min_scale = False


def _skip_unused_parts() -> None:
    """Patch two parts of DeepSpeed that are not used here and cost seconds of every start.

    ZeRO imports the optimizer Muon, whose decorator would load torch's compiler: 1.3 s. On a CPU, `initialize` would
    build the C++ extension deepspeed_shm_comm: 15 to 30 s on a cold cache.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    def not_compiled(*args: Any, **kwargs: Any) -> Any:
        return lambda function: function

    with contextlib.suppress(ImportError), mock.patch("deepspeed.runtime.compiler.compile", not_compiled):
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")


@contextlib.contextmanager
def _quiet(quiet: bool = True) -> Iterator[None]:
    """Inside, DeepSpeed prints nothing to stdout; errors are raised as ever."""
    if not quiet:
        deepspeed.utils.logger.setLevel(logging.INFO)
        yield
        return
    deepspeed.utils.logger.setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
