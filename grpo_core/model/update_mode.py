"""Switch a model to the mode of the update: that of sampling, with the adapter's dropout and checkpointing added.

The base model stays in evaluation mode, so its own randomness is off by whatever name it is configured: dropout of
attention, residuals or embeddings, skipped layers, jitter of a router.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo_core.schema import ConfigError

CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"  # through which modules of transformers checkpoint
RANDOM_WORDS = ("drop", "jitter")  # in the names of a module's probabilities
_KEPT: list[Callable[[], AbstractContextManager]] = []  # contexts of the forward that a recomputation needs too


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Store only the states between layers for the backward pass, which recomputes the rest.

    Raises:
        ConfigError: the model does not support it.
    """
    if not getattr(model, "supports_gradient_checkpointing", True):
        raise ConfigError(
            f"model.gradient_checkpointing is true, which the {model.config.model_type} model does not support; "
            f"set it to false"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextmanager
def update_mode(modules: Iterable[nn.Module], adapter: Iterable[nn.Module]) -> Iterator[None]:
    """Put the modules of `adapter` into training mode, and of `modules` those that checkpoint their computation.

    The latter compute in evaluation mode all the same.
    """
    active = dict.fromkeys(adapter)
    probabilities: list[tuple[nn.Module, str, float]] = []
    for module in modules:
        if not getattr(module, "gradient_checkpointing", False):
            continue
        is_layer = isinstance(module, GradientCheckpointingLayer)
        if is_layer or _calls_checkpointing(module):
            active[module] = None
            _evaluate_when_checkpointed(module)
        if not is_layer:  # it computes more than what it checkpoints
            names = [name for name, value in vars(module).items() if _is_probability(name, value)]
            probabilities += [(module, name, getattr(module, name)) for name in names]
    previous = [(module, module.training) for module in active]
    try:
        for module in active:
            vars(module)["training"] = True  # as train() does, without its walk through all children
        for module, name, _ in probabilities:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in probabilities:
            setattr(module, name, value)
        for module, training in previous:
            vars(module)["training"] = training


@contextmanager
def evaluation_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put all modules into evaluation mode, and back into the mode that each was in."""
    training = [module for module in modules if module.training]
    for module in training:
        vars(module)["training"] = False
    try:
        yield
    finally:
        for module in training:
            vars(module)["training"] = True


@contextmanager
def keep_when_recomputed(make: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Recompute what is checkpointed in the block within the context `make()`, in the mode of the update."""
    _KEPT.append(make)
    try:
        yield
    finally:
        _KEPT.pop()


def _evaluate_when_checkpointed(module: nn.Module) -> None:
    """Let what `module` checkpoints run with the module in evaluation mode, in the backward's recomputation too."""
    checkpoint = getattr(module, CHECKPOINT_FUNCTION, None)
    if checkpoint is None or getattr(checkpoint, "evaluates", False):
        return

    def checkpoint_in_evaluation(function: Callable, *args: Any, **kwargs: Any) -> Any:
        recomputed_in, is_first = [*_KEPT], True

        def compute(*inputs: Any, **options: Any) -> Any:
            nonlocal is_first
            contexts, is_first = [] if is_first else recomputed_in, False
            with evaluation_mode([module]), ExitStack() as stack:
                for make in contexts:
                    stack.enter_context(make())
                return function(*inputs, **options)

        return checkpoint(compute, *args, **kwargs)

    checkpoint_in_evaluation.evaluates = True
    setattr(module, CHECKPOINT_FUNCTION, checkpoint_in_evaluation)


def _calls_checkpointing(module: nn.Module) -> bool:
    """Return whether the forward of `module` checkpoints by itself, as older code of models does."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and CHECKPOINT_FUNCTION in code.co_names


def _is_probability(name: str, value: Any) -> bool:
    return isinstance(value, float) and any(word in name.lower() for word in RANDOM_WORDS)
