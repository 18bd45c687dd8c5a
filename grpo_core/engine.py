"""DeepSpeed ZeRO around the policy: backward, step, and its own state. All of its arithmetic stays in this file.

Every micro-batch's loss is already a part of the whole step's loss (token_weights), so gradients must be *summed* over
micro-batches and ranks. Micro-batches are summed here, in float32 and without DeepSpeed, so ranks may have different
numbers of them; `step` hands the sum over in one backward, whose collectives are the only ones of the step. DeepSpeed
averages over ranks: the sum is multiplied by the world size.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # a checkpoint is data: DeepSpeed would unpickle anything

import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it greets on import
import deepspeed
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from grpo_core.config import RunConfig
from grpo_core.schema import ConfigError

# Python 3.11.0 to 3.11.3 (Debian 12's among them) would write an enum by getattr, which such a load refuses.
ZeroStageEnum.__reduce_ex__ = lambda self, protocol: (ZeroStageEnum, (self.value,))
torch.serialization.add_safe_globals([fragment_address, ZeroStageEnum, LossScaler, DynamicLossScaler])
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a C++ build of half a minute, for nothing that is used

TAG = "engine"


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
        self.trained = [name for name, p in model.named_parameters() if p.requires_grad]
        optimizer = (
            torch.optim.AdamW(  # torch's own, offloaded or not: it compiles nothing, and LoRA's states are small
                self.parameters,
                lr=settings.learning_rate,
                betas=(settings.beta1, settings.beta2),
                eps=settings.adam_eps,
                weight_decay=settings.weight_decay,
            )
        )
        schedule = learning_rate_schedule(settings.schedule, settings.warmup_steps, total_steps)
        filled = deepspeed_config(config, dtype, world_size)
        trained = sum(p.numel() for p in self.parameters)
        for bucket in ("reduce_bucket_size", "allgather_bucket_size"):  # 5e8 by default, and 1 GB held for it
            if filled["zero_optimization"].get(bucket, "auto") == "auto":
                filled["zero_optimization"][bucket] = min(trained, 500_000_000)
        with _quiet(not config.log.verbose):
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
                config=filled,
            )
        self._sums = [torch.zeros_like(p, dtype=torch.float32) for p in self.parameters]  # where DeepSpeed put them

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's part: the sum over all micro-batches and ranks is the step's gradient.

        No collective: a rank may call it as often as it has micro-batches, or never.
        """
        scale = float(getattr(self.optimizer, "loss_scale", 1.0))  # above 1 for fp16
        grads = torch.autograd.grad(loss * scale, self.parameters, allow_unused=True)
        for total, grad in zip(self._sums, grads, strict=True):
            if grad is not None:
                total.add_(grad, alpha=1.0 / scale)

    def step(self) -> StepResult:
        """Sum over ranks, clip, update the weights, advance the learning rate. A collective."""
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        self.engine.backward(_Handed.apply(self._sums, *self.parameters) * self.world_size)
        torch._foreach_zero_(self._sums)
        self.engine.step()
        grad_norm = self.engine.get_global_grad_norm()
        return StepResult(float(grad_norm), learning_rate, bool(self.engine.was_step_applied()))

    def save(self, folder: Path) -> None:
        """Every rank writes its shard of weights, optimizer, schedule and loss scale under `folder`."""

        def keep_trained(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict) -> None:
            for name in [name for name in state if name not in kept]:  # DeepSpeed would keep a tied, frozen lm_head
                del state[name]

        kept = set(self.trained)
        hook = self.engine.module.register_state_dict_post_hook(keep_trained)
        try:
            with _quiet():
                self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
        finally:
            hook.remove()

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote, bitwise.

        Raises:
            ConfigError: no state there, or the weights in it are not the ones that are trained now.
        """
        if not (folder / TAG).is_dir():
            raise ConfigError(f"there is no engine state in {folder}")
        missing: list[str] = []

        def note(module: nn.Module, keys: Any) -> None:
            missing.extend(name for name in self.trained if name in keys.missing_keys)

        hook = self.engine.module.register_load_state_dict_post_hook(note)
        try:
            with _quiet():
                path, _ = self.engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        finally:
            hook.remove()
        assert path is not None
        if missing:
            raise ConfigError(f"{folder} lacks {len(missing)} of the trained weights, {missing[0]} among them")


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


def deepspeed_config(config: RunConfig, dtype: torch.dtype, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's JSON with every "auto" filled in from the run config.

    Raises:
        ConfigError: a value in the JSON contradicts the run config, or belongs there; the message names both.
    """
    given = copy.deepcopy(config.engine.deepspeed)
    trainer = config.trainer
    for block, instead in (("optimizer", "engine.learning_rate and its neighbours"), ("scheduler", "engine.schedule")):
        if block in given:
            raise ConfigError(f"the DeepSpeed JSON has a block {block!r}; remove it, the run config's {instead} say it")
    stage = given.setdefault("zero_optimization", {}).setdefault("stage", 2)
    if stage not in (1, 2):
        raise ConfigError(
            f"the DeepSpeed JSON's zero_optimization.stage is {stage}; it must be 1 or 2: "
            f"the sampler needs whole weights, and stage 0 is other code for every precision"
        )
    per_optimizer_step = trainer.completions_per_step // trainer.num_minibatches
    _agree(given, "train_batch_size", per_optimizer_step, "trainer.completions_per_step / trainer.num_minibatches")
    _agree(given, "gradient_clipping", config.engine.max_grad_norm, "engine.max_grad_norm")
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if given.get(key, "auto") != "auto":
            raise ConfigError(
                f'the DeepSpeed JSON\'s {key} is {given[key]!r}; write "auto": micro-batches are cut by their tokens '
                f"(trainer.tokens_per_micro_batch), and a step has as many as it needs"
            )
    for block, wanted in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        given[block] = {"enabled": "auto", **given.get(block, {})}
        _agree(
            given[block], "enabled", dtype is wanted, f"model.precision ({config.model.precision})", f"{block}.enabled"
        )
    given.pop("train_batch_size")  # ours counts completions of an optimizer step; DeepSpeed's would be of a micro-batch
    if given["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none":
        given.setdefault("zero_force_ds_cpu_optimizer", False)
    return given | {
        "train_micro_batch_size_per_gpu": 1,  # read by nothing
        "gradient_accumulation_steps": 1,  # the trainer accumulates; see this file's first lines
        "managed_gradient_accumulation": False,
        "steps_per_print": 10**9,
    }


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


def _agree(given: dict[str, Any], key: str, value: Any, run_key: str, shown: str | None = None) -> None:
    if given.get(key, "auto") not in ("auto", value):
        raise ConfigError(
            f"the DeepSpeed JSON's {shown or key} is {given[key]!r}, but the run config's {run_key} makes it "
            f'{value!r}; write "auto" in the JSON, or make them agree'
        )
    given[key] = value


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
