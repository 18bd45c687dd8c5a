"""Check the section `lora` against a model, of which the configuration suffices: shapes without weights."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grpo_core.config.lora_checks import PLAIN_KEYS, as_list
from grpo_core.config.sections import LoraConfig
from grpo_core.counts import quantify
from grpo_core.model.adapter import add_adapter, list_adapted
from grpo_core.model.lora_patterns import PATTERNS, find_pattern
from grpo_core.model.lora_targets import (
    describe_whole_model,
    ends_in,
    find_unadaptable,
    is_named,
    list_outside_experts,
    make_without_weights,
)
from grpo_core.model.peft_names import BaseTunerLayer, ModulesToSaveWrapper, PeftModel, TrainableTokensLayer
from grpo_core.schema import ConfigError, list_known

ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, Conv1D)
LAYER_NUMBER = re.compile(r".*?\.[^.]*\.(\d+)\.")  # in a module's name, as PEFT finds it


def check_targets(config: PretrainedConfig, lora: LoraConfig, trust_remote_code: bool = False) -> None:
    """Check that the model has everything that the section lora names, and that it can be adapted.

    Raises:
        ConfigError: names the key and the module.
    """
    defaults = LoraConfig()
    is_plain = all(getattr(lora, f.name) == getattr(defaults, f.name) for f in fields(lora) if f.name not in PLAIN_KEYS)
    is_plain = is_plain and not lora.dropout  # which PEFT refuses for weights of experts
    if not lora.r or (lora.target_modules == "all-linear" and is_plain):
        return
    try:
        model = make_without_weights(config, trust_remote_code)
    except Exception:  # loading the weights will raise the same error
        return
    if lora.target_modules != "all-linear":
        _check_target_modules(model, config, lora, trust_remote_code)
    if is_plain:
        return
    _check_names(model, lora)
    _check_tokens(model, lora)
    if lora.exclude_modules is not None:
        _check_exclusion(make_without_weights(config, trust_remote_code), lora)
    adapted = _adapt(model, lora)
    if adapted is None:
        return
    embeddings = [name for name, module in adapted.named_modules() if getattr(module, "lora_embedding_A", None)]
    if embeddings and isinstance(lora.init_lora_weights, str):
        raise ConfigError(
            f"lora.init_lora_weights is {lora.init_lora_weights!r}, which PEFT does not apply to embeddings "
            f"({embeddings[0].removeprefix('base_model.model.')}); set it to true"
        )
    _check_token_layers(adapted)
    _check_weights(adapted, lora)
    _check_effects(list_adapted(adapted), lora)


def _adapt(model: PreTrainedModel, lora: LoraConfig) -> PeftModel | None:
    """Return the model without weights with an adapter; None if that cannot be done without weights.

    Raises:
        ConfigError: PEFT refuses the adapter.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of is refused here
            return add_adapter(model, lora)
    except ConfigError:
        raise
    except Exception:  # of many types
        return None


def _check_exclusion(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Check that each part of lora.exclude_modules leaves out a module that would get an adapter; changes `model`."""
    excluded, whole = lora.exclude_modules, None
    with contextlib.suppress(ConfigError):  # without the exclusion PEFT may refuse the adapter
        whole = _adapt(model, replace(lora, exclude_modules=None))
    if whole is None:
        return
    names: list[str] = [*whole.base_model.targeted_module_names]  # type: ignore[arg-type]
    names += [name for weight in _list_converted(whole, lora) for name in (weight, weight.rpartition(".")[0])]
    for part in [excluded] if isinstance(excluded, str) else [[name] for name in excluded or ()]:
        if not any(is_named(name, part) for name in names):
            given = repr(part) if isinstance(part, str) else repr(part[0])
            raise ConfigError(
                f"lora.exclude_modules names {given}, which leaves out no module that would get an adapter; "
                f"{list_known('', {name.rpartition('.')[2] for name in names})}"
            )


def _list_converted(adapted: PeftModel, lora: LoraConfig) -> list[str]:
    """Return the weights that PEFT adapts in place of modules of lora.target_modules, as the experts of Qwen3-MoE."""
    weights: list[str] = adapted.base_model.targeted_parameter_names  # type: ignore[assignment]
    return [weight for weight in weights if not is_named(weight, lora.target_parameters)]


def _check_weights(adapted: PeftModel, lora: LoraConfig) -> None:
    """Check that no weight is adapted that two keys leave out, which PEFT applies to modules alone.

    With lora.path PEFT has ignored the keys before, and the adapter has these weights.
    """
    if lora.path is not None:
        return
    excluded = lora.exclude_modules
    for weight in _list_converted(adapted, lora):
        if any(is_named(name, excluded) for name in (weight, weight.rpartition(".")[0])):
            targets = ", ".join(list_outside_experts(adapted))
            raise ConfigError(
                f"lora.exclude_modules is {excluded!r}, which PEFT does not apply to {weight}, one of the weights of "
                f"experts and routers; leave it out of lora.exclude_modules, and set lora.target_modules to a list "
                f"without experts and routers, such as [{targets}]"
            )
    if lora.layers_to_transform is None:
        return
    layers = as_list(lora.layers_to_transform)
    for weight in adapted.base_model.targeted_parameter_names:  # type: ignore[union-attr]
        if (match := LAYER_NUMBER.match(weight)) and int(match[1]) not in layers:
            stack, end = weight[: match.start(1) - 1].rpartition(".")[2], weight[match.end() :]
            named = ", ".join(f"{stack}.{layer}.{end}" for layer in layers)
            raise ConfigError(
                f"lora.layers_to_transform is {lora.layers_to_transform}, which PEFT does not apply to weights such as "
                f"{weight}; name the layers in lora.target_parameters, such as [{named}]"
            )


def _check_names(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Check that the model has what lora.modules_to_save, exclude_modules and target_parameters name."""
    names = [name for name, _ in model.named_modules() if name]
    known = {name.rpartition(".")[2] for name in names} - {str(i) for i in range(len(names))}
    excluded = lora.exclude_modules
    if isinstance(excluded, str) and not any(re.fullmatch(excluded, name) for name in names):
        raise ConfigError(
            f"lora.exclude_modules is {excluded!r}, which matches no module of the model"
            f"{_suggest_list(excluded, names) or describe_whole_model(excluded)}"
        )
    listed = [("exclude_modules", name) for name in excluded or ()] if isinstance(excluded, list) else []
    for key, name in (*listed, *(("modules_to_save", name) for name in lora.modules_to_save or ())):
        if not any(ends_in(module, name) for module in names):
            raise ConfigError(
                f"lora.{key} names {name!r}, which the model does not have{describe_whole_model(name)}; "
                f"{list_known(name, known)}"
            )
    for name in lora.modules_to_save or ():
        copied = [module for module in names if ends_in(module, name)]
        if not any(True for module in copied for _ in model.get_submodule(module).parameters()):
            raise ConfigError(
                f"lora.modules_to_save names {name!r}, but {copied[0]} has no weights to train; leave it out"
            )
    _check_parameters(model, lora)


def _check_parameters(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Check that LoRA can adapt the weights that lora.target_parameters names."""
    weights = dict(model.named_parameters())
    short = {".".join(name.split(".")[-2:]) for name in weights}
    for name in lora.target_parameters or ():
        targeted = [weight for weight in weights if ends_in(weight, name)]
        if not targeted:
            raise ConfigError(
                f"lora.target_parameters names {name!r}, which the model does not have{describe_whole_model(name)}; "
                f"{list_known(name, short)}"
            )
        for weight in targeted:
            if weights[weight].dim() not in (2, 3):
                raise ConfigError(
                    f"lora.target_parameters names {name!r}, but {weight} has "
                    f"{quantify(weights[weight].dim(), 'dimension')}, and LoRA adapts weights of 2 or 3; leave it out, "
                    f"or train its module whole with lora.modules_to_save"
                )


def _check_tokens(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Check that the model has the modules and the tokens of lora.trainable_token_indices."""
    tokens, key = lora.trainable_token_indices, "lora.trainable_token_indices"
    if tokens is None:
        return
    modules = dict(model.named_modules())
    for name, ids in tokens.items() if isinstance(tokens, dict) else [("", tokens)]:
        named = [m for n, m in modules.items() if ends_in(n, name)] if name else [model.get_input_embeddings()]
        sizes = [len(module.weight) for module in named if isinstance(getattr(module, "weight", None), nn.Parameter)]
        if not sizes:
            embeddings = {n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, nn.Embedding)}
            raise ConfigError(f"{key} names {name!r}, which is no embedding; {list_known(name, embeddings)}")
        if max(ids) >= min(sizes):
            raise ConfigError(
                f"{key}{f'.{name}' if name else ''} names the token {max(ids)}, but the model has only "
                f"{quantify(min(sizes), 'embedding')}"
            )


def _check_token_layers(adapted: PeftModel) -> None:
    """Check the modules of which tokens are trained: the head that is tied to the embeddings is one of them.

    PEFT trains tokens of a module beside its copy or its LoRA, and leaves out the bias of a head.
    """
    for name, layer in adapted.named_modules():
        if not isinstance(layer, TrainableTokensLayer):
            continue
        name, base = name.removeprefix("base_model.model.").removesuffix(".token_adapter"), layer.base_layer
        if isinstance(base, ModulesToSaveWrapper):
            problem = "which lora.modules_to_save trains whole; take it out of one of the two"
        elif isinstance(base, BaseTunerLayer) or name.endswith(".base_layer"):
            name = name.removesuffix(".base_layer")
            problem = "to which lora.target_modules gives an adapter; take it out of one of the two"
        elif getattr(base, "bias", None) is not None:
            problem = "whose bias PEFT then leaves out; train it whole with lora.modules_to_save"
        else:
            continue
        raise ConfigError(f"lora.trainable_token_indices trains tokens of {name}, {problem}")


def _check_effects(adapted: Iterable[str], lora: LoraConfig) -> None:
    """Check that no layer and no pattern is without effect; `adapted` are the names of modules with an adapter."""
    adapted = [*adapted]
    numbers = {int(match[1]) for name in adapted if (match := LAYER_NUMBER.match(name))}
    if lora.layers_to_transform is not None:
        for layer in as_list(lora.layers_to_transform):
            if layer not in numbers:
                raise ConfigError(
                    f"lora.layers_to_transform names {layer}, but the model has no module to adapt in a layer of that "
                    f"number"
                )
    for key in PATTERNS:
        patterns = getattr(lora, key)
        used = {find_pattern(patterns, name) for name in adapted}
        for pattern in patterns:
            if pattern not in used:
                last = {name.rpartition(".")[2] for name in adapted}
                raise ConfigError(
                    f"lora.{key} names {pattern!r}, which is the first match of no module with an adapter; "
                    f"{list_known(pattern, last)}"
                )


def _check_target_modules(
    model: PreTrainedModel, config: PretrainedConfig, lora: LoraConfig, trust_remote_code: bool
) -> None:
    names = [name for name, _ in model.named_modules()]
    unadaptable = find_unadaptable(model)
    if isinstance(lora.target_modules, str):
        targeted = [name for name in names if re.fullmatch(lora.target_modules, name)]
        if not targeted:
            raise ConfigError(
                f"lora.target_modules is {lora.target_modules!r}, which matches no module of the model"
                f"{_suggest_list(lora.target_modules, names) or describe_whole_model(lora.target_modules)}"
            )
        _check_adaptable(lora.target_modules, targeted, unadaptable)
        _check_types(model, targeted, config, lora, trust_remote_code)
        return
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    doubtful = [target for target in lora.target_modules if not any(ends_in(name, target) for name in names)]
    known = bool(doubtful) and _peft_has_targets(config, doubtful, trust_remote_code)
    for target in lora.target_modules:
        targeted = [name for name in names if ends_in(name, target)]
        if target in doubtful and not known:
            raise ConfigError(
                f"lora.target_modules names {target!r}, which the model does not have"
                f"{describe_whole_model(target)}; {list_known(target, linear)}"
            )
        _check_adaptable(target, targeted, unadaptable)
        _check_types(model, targeted, config, lora, trust_remote_code)


def _suggest_list(text: str, names: Iterable[str]) -> str:
    """Return the end of a sentence if `text` holds last names of modules where a regular expression must be."""
    words, last = [word for word in re.split(r"[,|\s]+", text) if word], {name.rpartition(".")[2] for name in names}
    is_list = bool(words) and last.issuperset(words)
    return (
        f", since a text is a regular expression of whole names; did you mean [{', '.join(words)}]?" if is_list else ""
    )


def _check_types(
    model: PreTrainedModel, targeted: Sequence[str], config: PretrainedConfig, lora: LoraConfig, trust_remote_code: bool
) -> None:
    """Check that the targeted modules are of types that LoRA adapts, without those that PEFT leaves out."""
    saved = [rf"(^|.*\.){name}($|\..*)" for name in lora.modules_to_save or ()]
    for name in targeted:
        if is_named(name, lora.exclude_modules) or any(re.match(pattern, name) for pattern in saved):
            continue
        module = model.get_submodule(name)
        if not isinstance(module, ADAPTABLE) and not _peft_adapts(config, lora, trust_remote_code):
            own = [
                f"{name.rpartition('.')[2]}.{key}" for key, p in module.named_parameters(recurse=False) if p.dim() > 1
            ]
            own = [weight for weight in own if "bias" not in weight]
            hint = f", and weights that lora.target_parameters names, here [{', '.join(own)}]" if own else ""
            raise ConfigError(
                f"lora.target_modules is {lora.target_modules!r}, which names {name or 'the whole model'}, a "
                f"{type(module).__name__}; LoRA adapts linear layers, embeddings and convolutions alone"
                f"{hint}"
            )


def _peft_adapts(config: PretrainedConfig, lora: LoraConfig, trust_remote_code: bool) -> bool:
    """Return whether PEFT takes lora.target_modules, since it adapts weights in place of modules that LoRA cannot."""
    own = {key: getattr(lora, key) for key in ("target_modules", "exclude_modules", "modules_to_save")}
    with contextlib.suppress(ConfigError):
        return _adapt(make_without_weights(config, trust_remote_code), LoraConfig(**own)) is not None
    return False


def _check_adaptable(target: str, targeted: Sequence[str], unadaptable: Sequence[str]) -> None:
    if wrong := [name for name in targeted if name in unadaptable]:
        raise ConfigError(
            f"lora.target_modules names {target!r}, but {wrong[0]} does not return one tensor, so LoRA cannot adapt "
            f"it; leave it out"
        )


def _peft_has_targets(config: PretrainedConfig, targets: Sequence[str], trust_remote_code: bool) -> bool:
    """Return whether PEFT finds all `targets` where the model has no such modules, as in packed weights of experts.

    Taking one away must change what is adapted, or make PEFT fail, as it does for one half of a joined weight.
    """

    def adapt(names: Sequence[str]) -> list[str] | None:
        model = make_without_weights(config, trust_remote_code)
        try:
            with torch.device("meta"):
                adapted = add_adapter(model, LoraConfig(target_modules=[*names]))
        except Exception:  # PEFT raises errors of many types
            return None
        return sorted(f"{name} {[*p.shape]}" for name, p in adapted.named_parameters() if "lora_" in name) or None

    whole = adapt(targets)
    return whole is not None and all(adapt([x for x in targets if x != target]) != whole for target in targets)
