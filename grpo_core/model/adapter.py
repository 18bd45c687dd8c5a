"""The adapter: what PEFT adds to a base model, from the section `lora` or from a folder.

Beside LoRA's factors an adapter may train copies of whole modules and the embeddings of single tokens. Each kind has a
value with which the model computes as its base (`base_values`), and a switch to another adapter (`use_adapter`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_core.config.sections import LoraConfig
from grpo_core.counts import quantify
from grpo_core.model.composite import map_keys, names_of, rename_files
from grpo_core.model.finite_weights import check_finite
from grpo_core.model.loading import describe_misfit
from grpo_core.model.lora_patterns import PATTERNS, settle_order
from grpo_core.model.lora_targets import find_unadaptable, list_outside_experts
from grpo_core.model.model_files import describe_pickle
from grpo_core.model.peft_names import (
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    LoraLayer,
    ModulesToSaveWrapper,
    PeftLoraConfig,
    PeftModel,
    TrainableTokensLayer,
    TrainableTokensWrapper,
    get_peft_model,
    get_peft_model_state_dict,
)
from grpo_core.model.quantized import QuantizedLinear, is_quantized
from grpo_core.schema import ConfigError, first_line

ADAPTER = "default"  # PEFT's name of the adapter that is trained


def add_adapter(base: PreTrainedModel, lora: LoraConfig, revision: str | None = None) -> PeftModel:
    """Return `base` with a fresh adapter. With all-linear, linear layers that do not return one tensor are left out.

    `revision` is that of the base, which PEFT notes beside the adapter.

    Raises:
        ConfigError: PEFT refuses the adapter.
    """
    unadaptable = find_unadaptable(base) if lora.target_modules == "all-linear" else []
    try:
        model: Any = get_peft_model(base, _make_peft_config(lora, unadaptable), autocast_adapter_dtype=False)
    except (ValueError, TypeError) as error:
        raise ConfigError(_explain_refusal(error, base, lora)) from error
    fit_quantized(model, "the section lora")
    model.peft_config[ADAPTER].revision = revision
    _settle_patterns(model)
    return model


def list_adapted(model: PeftModel) -> list[str]:
    """Return the names of the modules and of the weights that LoRA adapts."""
    tuner: Any = model.base_model
    return [*tuner.targeted_module_names, *tuner.targeted_parameter_names]


def _settle_patterns(model: PeftModel) -> None:
    """Let the adapter's file mean the ranks and scales that the model has, though PEFT sorts the patterns in it."""
    config, names = model.peft_config[ADAPTER], list_adapted(model)
    for key in PATTERNS:
        setattr(config, key, settle_order(getattr(config, key), names))


def _make_peft_config(lora: LoraConfig, unadaptable: Sequence[str] = ()) -> PeftLoraConfig:
    """Return PEFT's configuration of an adapter; `unadaptable` modules are left out beside lora.exclude_modules."""
    excluded: Any = lora.exclude_modules
    if unadaptable:
        names = "|".join(re.escape(name) for name in unadaptable)
        excluded = f"(?:{excluded})|{names}" if isinstance(excluded, str) else [*(excluded or ()), *unadaptable]
    return PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=lora.init_lora_weights,
        exclude_modules=excluded,
        layers_to_transform=lora.layers_to_transform,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        modules_to_save=lora.modules_to_save,
        target_parameters=lora.target_parameters,
        trainable_token_indices=lora.trainable_token_indices,
        task_type="CAUSAL_LM",
    )


def _explain_refusal(error: Exception, base: nn.Module, lora: LoraConfig) -> str:
    """Return a sentence about an adapter that PEFT refuses to give to `base`."""
    if layer := re.search(r"wrap an `nn.Parameter` of layer '(\S+)'", str(error)):
        return (
            f"lora.target_parameters is {lora.target_parameters}, which names a weight of {layer[1]}, to which "
            f"lora.target_modules gives an adapter; take it out of one of the two"
        )
    if "ParamWrapper" in str(error):  # PEFT's adapter of the weights of experts and routers
        targets = f"lora.target_modules (here {lora.target_modules!r})"
        names = ", ".join(list_outside_experts(base))
        without = f"lora.target_modules to a list without experts and routers, such as [{names}]"
        if "modules_to_save" in str(error):
            return (
                f"lora.modules_to_save is {lora.modules_to_save}, but {targets} already adapts weights of these "
                f"modules; leave it out, or set {without}"
            )
        for key, value, default in (("use_dora", lora.use_dora, False), ("dropout", lora.dropout, 0.0)):
            if key in str(error) and value != default:
                return (
                    f"lora.{key} is {value}, which PEFT does not support for weights of experts and routers, and "
                    f"{targets} adapts these; set lora.{key} to {str(default).lower()}, or {without}"
                )
    return f"lora.{_find_key(error, lora)}: {first_line(error)}"


def _find_key(error: Exception, lora: LoraConfig) -> str:
    """Return the key of the section lora, with its value, that an error of PEFT is about."""
    names = ("trainable_token_indices", "modules_to_save", "target_parameters", "exclude_modules", "use_dora")
    name = next((name for name in names if name in str(error) and getattr(lora, name)), "target_modules")
    if name == "target_modules" and lora.trainable_token_indices and "TrainableTokens" in str(error):
        name = "trainable_token_indices"
    return f"{name} is {getattr(lora, name)!r}"


def load_adapter(base: PreTrainedModel, folder: Path, model_path: str) -> PeftModel:
    """Return `base` with the adapter in `folder`, which is trained.

    Raises:
        ConfigError: the adapter does not fit the model, or holds a value that is not finite.
    """
    options: Any = {"is_trainable": True, "autocast_adapter_dtype": False, "key_mapping": map_keys(base)}
    with explaining_misfit(f"the adapter in {folder}", folder, model_path):
        model: Any = PeftModel.from_pretrained(base, folder, **options)
        report = model.load_adapter(str(folder), ADAPTER, **options)
    check_complete(report, ADAPTER, f"the adapter in {folder}", model_path)
    fit_quantized(model, f"the adapter in {folder}")
    check_finite(model, f"the adapter in {folder}")
    _settle_patterns(model)
    return model


@contextmanager
def explaining_misfit(description: str, folder: Path, model_path: str) -> Iterator[None]:
    """Let what PEFT raises while it loads the adapter in `folder` be one sentence; `description` begins it.

    Raises:
        ConfigError: the block has raised an error.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of many types: the settings in its file may have any
        problem = describe_pickle(folder) or describe_misfit(error)
        raise ConfigError(f"{description} does not fit the model {model_path}: {problem}") from error


def fit_quantized(model: nn.Module, description: str) -> None:
    """Let adapters of layers in 4 bits have the dtype of the model, which PEFT takes from a weight's dtype.

    Raises:
        ConfigError: an adapter is a variant of LoRA that needs whole weights, or trains a layer in 4 bits whole.
    """
    if not is_quantized(model):
        return
    dtype = next(p.dtype for name, p in model.named_parameters() if p.is_floating_point() and "lora_" not in name)
    for name, module in model.named_modules():
        problem = None
        if isinstance(module, ModulesToSaveWrapper) and is_quantized(module):
            problem = "would be trained whole"
        elif isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), QuantizedLinear):
            problem = "has a variant of LoRA that needs its whole weight" if module.lora_variant else None
            for group in (module.lora_A, module.lora_B):
                group.to(dtype)
        if problem:
            name = name.removeprefix("base_model.model.")
            raise ConfigError(f"{description} does not fit a model in 4 bits: {name} {problem}")


def check_complete(report: Any, name: str, description: str, model_path: str) -> None:
    """Refuse an adapter that PEFT loaded as `name` without some of its weights.

    Raises:
        ConfigError: its files lack a weight, or hold one for which the model has no place.
    """
    if names := report.missing_keys or report.unexpected_keys:
        problem = "its files lack" if report.missing_keys else "the model has no place for"
        others = f" and {quantify(len(names) - 1, 'other')}" if len(names) > 1 else ""
        raise ConfigError(
            f"{description} does not fit the model {model_path}: {problem} the weight "
            f"{names[0].removeprefix('base_model.model.').replace(f'.{name}.', '.')}{others}"
        )


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the trained adapter in PEFT's format, with the names of the model that plain transformers opens."""
    model.save_pretrained(str(folder), selected_adapters=[model.active_adapter])
    if names := names_of(base := model.get_base_model()):
        tuner: Any = model.base_model
        copied = [name for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)]
        rename_files(folder, names, tuner.targeted_module_names, copied, list_adapted(model))


@contextmanager
def use_adapter(modules: Sequence[nn.Module], adapter: str | None) -> Iterator[None]:
    """Let the model compute with another loaded adapter, of LoRA alone; None: with the one that is trained.

    PEFT's set_adapter would also change which adapter is trained.
    """
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers: list[Any] = [x for x in modules if isinstance(x, kinds)] if adapter else []
    previous = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:  # a copy of a module, or tokens, of the trained adapter alone: the module itself computes
            is_lora = isinstance(layer, BaseTunerLayer) and not isinstance(layer, TrainableTokensLayer)
            layer._active_adapter = [adapter] if is_lora else []
        yield
    finally:
        for layer, name in zip(layers, previous, strict=True):
            layer._active_adapter = name


@torch.no_grad()
def base_values(modules: Sequence[nn.Module]) -> dict[int, Tensor]:
    """Return the values of trained parameters with which the model computes as its base, by the parameters' id.

    A parameter without an entry has no effect then: with B = 0, LoRA's A may be anything.
    """
    values: dict[int, Tensor] = {}
    for module in modules:
        if isinstance(module, LoraLayer):
            zero = [*module.lora_B.parameters()] + [p for name, p in module.lora_embedding_A.items()]
            values |= {id(p): torch.zeros_like(p) for p in zero}
            for name, magnitude in module.lora_magnitude_vector.items():
                values[id(magnitude.weight)] = _base_magnitude(module, name, magnitude)
        elif isinstance(module, ModulesToSaveWrapper):
            own = dict(module.original_module.named_parameters())
            for copy in module.modules_to_save.values():
                values |= {id(p): own[name] for name, p in copy.named_parameters()}
        elif isinstance(module, TrainableTokensLayer):
            originals = module.trainable_tokens_original
            values |= {id(p): originals[name] for name, p in module.trainable_tokens_delta.items()}
    return values


def _base_magnitude(layer: Any, name: str, magnitude: Any) -> Tensor:
    """Return DoRA's magnitudes of the base weight, which a fresh adapter has."""
    weight = layer.get_base_layer().weight
    if name in layer.lora_embedding_A:
        weight = weight.T
    nothing = torch.zeros((), dtype=weight.dtype, device=weight.device)
    return magnitude.get_weight_norm(weight, nothing, 0.0)


def count_adapter(model: nn.Module) -> int:
    """Return the number of weights that an adapter's files hold; 0 without an adapter."""
    return sum(p.numel() for p in get_peft_model_state_dict(model).values()) if isinstance(model, PeftModel) else 0


def find_base_layer(module: Any) -> Any:
    """Return the layer of the base model that LoRA or trained tokens wrap; `module` itself if neither does."""
    if isinstance(module, TrainableTokensWrapper):
        return module.token_adapter.get_base_layer()
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def shares_tokens(head: nn.Module) -> bool:
    """Return whether the trained tokens of a head are those of the embeddings, to which it is tied."""
    return isinstance(head, TrainableTokensWrapper) and head.token_adapter.tied_adapter is not None


def list_trained_tokens(model: nn.Module) -> list[int]:
    """Return the tokens whose embeddings or rows in the head the adapter trains, in order."""
    layers = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    return sorted({token for layer in layers for ids in layer.token_indices.values() for token in ids})
