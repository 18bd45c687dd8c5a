"""The modules that LoRA can adapt, and those that it leaves frozen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from grpo_core.model.families import UNADAPTABLE
from grpo_core.model.peft_names import ModulesToSaveWrapper, PeftModel
from grpo_core.model.quantized import is_quantized
from grpo_core.model.trial import without_trace

# a part of a composite model in the name of a module
COMPOSITE_PART = re.compile(r"language_model|text_model|(vision|visual|image|audio|speech|multi_modal)\w*|\w*projector")


@torch.no_grad()
def find_unadaptable(model: nn.Module) -> list[str]:
    """Return the names of linear layers that LoRA cannot adapt.

    LoRA adds its product to the output, so a layer that does not return one tensor, such as a router that returns a
    tuple, is one. Others are known by name (families.py).
    """
    known = UNADAPTABLE.get(getattr(getattr(model, "config", None), "model_type", ""), ())
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in known]
    with without_trace(model):
        model.eval()
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
                continue
            weight = module.weight
            try:
                out = module(torch.zeros(1, module.in_features, dtype=weight.dtype, device=weight.device))
            except Exception:  # a layer that takes other inputs, or a quantised one
                continue
            if not isinstance(out, Tensor):
                names.append(name)
    return names


def describe_frozen_experts(model: nn.Module) -> str | None:
    """Return a sentence if the model has an adapter that does not reach its experts; otherwise None.

    Experts are modules that own a packed weight [experts, ..., ...], and modules whose name ends in "experts".
    """
    frozen = []
    for name, module in model.named_modules():
        if "original_module" in name.split("."):  # of which lora.modules_to_save trains a copy
            continue
        if not (_is_packed(module) or name.endswith("experts")) or any(
            name.startswith(f"{other}.") for other in frozen
        ):
            continue
        weights = [*module.parameters()]
        is_frozen = bool(weights) and not any(p.requires_grad for p in weights)
        if is_frozen and not _has_trained_wrapper(model, name):
            frozen.append(name)
    if not frozen or not any("lora_" in name for name, p in model.named_parameters() if p.requires_grad):
        return None
    first = frozen[0].removeprefix("base_model.model.")
    return (
        f"lora.target_modules does not reach the experts of this model, so they stay frozen: {first}"
        f"{f' and {len(frozen) - 1} more' if len(frozen) > 1 else ''}{_advise_on_experts(model, frozen[0])}"
    )


def _advise_on_experts(model: nn.Module, name: str) -> str:
    """Return the end of a sentence, with the key that adapts the experts in the module `name`."""
    experts = model.get_submodule(name)
    if is_quantized(model):
        return ""
    if names := list_weights(name, experts, (3,)):
        return f"; lora.target_parameters='[{', '.join(names)}]' adapts them"
    linear = dict.fromkeys(x.rpartition(".")[2] for x, m in experts.named_modules() if isinstance(m, nn.Linear))
    return f"; lora.target_modules adapts them if it also names {', '.join(linear)}" if linear else ""


def list_weights(name: str, module: nn.Module, dims: Sequence[int]) -> list[str]:
    """Return the last two names of the weights in the module `name` that have one of these numbers of dimensions."""
    weights = [f"{name}.{weight}" for weight, p in module.named_parameters() if p.dim() in dims]
    return [*dict.fromkeys(".".join(weight.split(".")[-2:]) for weight in weights if "bias" not in weight)]


def describe_untied(model: nn.Module) -> str | None:
    """Return a sentence if the adapter trains a copy of the head or of the embeddings it is tied to; otherwise None."""
    if not isinstance(model, PeftModel):
        return None
    base: Any = model.get_base_model()
    parts = [base.get_input_embeddings(), base.get_output_embeddings()]
    copied = [isinstance(part, ModulesToSaveWrapper) for part in parts]
    weights = [getattr(find_original(part), "weight", None) for part in parts]
    if not any(copied) or weights[0] is None or weights[0] is not weights[1]:
        return None
    names = [next(name for name, module in base.named_modules() if module is part) for part in parts]
    copy, other = (names[i] for i in ((0, 1) if copied[0] else (1, 0)))
    if all(copied):
        return f"lora.modules_to_save trains a copy of {copy} and one of {other}, which are no longer tied"
    return f"lora.modules_to_save trains a copy of {copy}, which is then no longer tied to {other}; that stays frozen"


def find_original(module: Any) -> Any:
    """Return the module of the base model of which an adapter trains a copy; `module` itself if it has none."""
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def _is_packed(module: nn.Module) -> bool:
    """Return whether a module owns a packed weight [experts, ..., ...]."""
    return any(p.dim() == 3 for p in module.parameters(recurse=False)) and not isinstance(module, nn.Conv1d)


def list_outside_experts(model: nn.Module) -> list[str]:
    """Return the last names of linear layers, without the head and the names that blocks of experts have.

    `model` may have an adapter, or a part of one that PEFT has refused meanwhile.
    """
    modules = [
        (name.removeprefix("base_model.model.").replace(".base_layer", ""), module)
        for name, module in model.named_modules()
        if ".lora_" not in name
    ]
    blocks = [name.rpartition(".")[0] for name, module in modules if _is_packed(module) or name.endswith("experts")]
    layers = [name for name, module in modules if isinstance(module, nn.Linear) and "." in name]
    inside = {name.rpartition(".")[2] for name in layers if any(name.startswith(f"{block}.") for block in blocks)}
    return [name for name in dict.fromkeys(x.rpartition(".")[2] for x in layers) if name not in inside]


def _has_trained_wrapper(model: nn.Module, name: str) -> bool:
    """Return whether a layer around the module `name`, of which it is the base layer, is trained."""
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
        if any(p.requires_grad for p in model.get_submodule(name).parameters()):
            return True
    return False


def make_without_weights(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """Return a model of the configuration on the device meta: shapes without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def describe_whole_model(name: str) -> str:
    """Return a clause if a name that the model lacks has a part as in a composite model, of which it is the text model.

    >>> describe_whole_model("vision_tower")
    ', since of a model with several parts only the text model is loaded, whose names have no vision_tower'
    """
    part = COMPOSITE_PART.search(name)
    return (
        f", since of a model with several parts only the text model is loaded, whose names have no {part[0]}"
        if part
        else ""
    )


def ends_in(name: str, target: str) -> bool:
    """Return whether PEFT's target `target` means the module `name`."""
    return name == target or name.endswith(f".{target}")


def is_named(name: str, targets: str | Sequence[str] | None) -> bool:
    """Return whether PEFT finds the module `name` among `targets`, which are a regular expression or names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(ends_in(name, target) for target in targets or ())
