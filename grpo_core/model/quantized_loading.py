"""Load a model in 4 bits: quantise the weights of a folder while they are read, or take those of bitsandbytes.

`Nf4Loader` is a quantizer of transformers, whose from_pretrained reads one weight at a time from the files, so beside
what stays there is never more than one whole weight, and the quantised weights depend on the files alone. A folder that
bitsandbytes has quantised is loaded by transformers' own quantizer; `adopt` makes its layers those of quantized.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from grpo_core.config.lora_checks import check_lora_of_quantized
from grpo_core.config.sections import LoraConfig, ModelConfig
from grpo_core.distributed import ranks
from grpo_core.model.families import UNADAPTABLE
from grpo_core.model.loading import load_whole_config, resolve_model_path
from grpo_core.model.model_files import list_weight_names
from grpo_core.model.quantized import (
    BlockScales,
    NestedScales,
    QuantizedLinear,
    QuantizedWeight,
    check_installed,
    find_quantized,
    quantize,
)
from grpo_core.schema import ConfigError, summarize_error

BITSANDBYTES = "bitsandbytes"  # the name of its format in a folder's configuration
METHOD = "grpo_core_nf4"  # the name by which transformers finds the loader
STATE = ".quant_state."  # in the names of what bitsandbytes writes beside a weight in 4 bits
NOT_QUANTIZED = (
    "whose config.json has a quantization_config of bitsandbytes, but whose weights are not in 4 bits; take it out of "
    "config.json, or use the weights that belong to it"
)
IN_LAYER = re.compile(r"\.\d+\.")  # in the name of a module of a decoder layer
ROUTERS = ("gate", "router")  # last parts of the names of linear layers that choose experts


@register_quantization_config(METHOD)
class Nf4Config(QuantizationConfigMixin):
    """The settings of the loader, and the weights of another size than the model's that it has met."""

    def __init__(self, double: bool = True, dtype: torch.dtype = torch.float32) -> None:
        self.quant_method: Any = METHOD
        self.double, self.dtype = double, dtype
        self.mismatched: list[tuple[str, Any, Any]] = []


@register_quantizer(METHOD)
class Nf4Loader(HfQuantizer):
    """Quantises the weight of every linear layer in a decoder layer when transformers has read it."""

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(path), QuantizedLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self.quantization_config)

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        names = find_quantizable(model)
        for name in names:
            module = model.get_submodule(name)
            has_bias, dtype = module.bias is not None, self.quantization_config.dtype
            layer = QuantizedLinear(module.in_features, module.out_features, has_bias, dtype, "meta")
            layer._is_hf_initialized = True  # a weight that the files lack is refused, not made up
            model.set_submodule(name, layer)
        # read in float32, which holds the values of every dtype: rounding them first would quantise other numbers
        weights = [f"{name}.weight" for name in names]
        model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), *weights}
        return model


class _Quantize(ConversionOps):
    def __init__(self, config: Nf4Config) -> None:
        self.config = config

    def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for name, values in input_dict.items():
            value = values[0] if isinstance(values, list) else values
            layer = model.get_submodule(name.rpartition(".")[0])
            shape = (layer.out_features, layer.in_features)
            if tuple(value.shape) != shape:
                self.config.mismatched.append((name, tuple(value.shape), shape))
                value = torch.zeros(shape, device=value.device)
            weight = quantize(value, self.config.double)
            layer.scales = weight.scales
            result[name] = nn.Parameter(weight.packed, requires_grad=False)
        return result


def find_quantizable(model: nn.Module) -> list[str]:
    """Return the names of the plain linear layers in the decoder layers, without routers."""
    known = UNADAPTABLE.get(getattr(getattr(model, "config", None), "model_type", ""), ())
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and IN_LAYER.search(name)]
    return [name for name in names if name.rpartition(".")[2] not in (*ROUTERS, *known)]


def check_quantization(model: ModelConfig, whole: PretrainedConfig) -> None:
    """Check the keys of the quantisation against the configuration of the model's folder.

    Raises:
        ConfigError: bitsandbytes is missing, or the folder's weights are quantised in another way.
    """
    stored = read_stored(whole)
    if model.quantize is None and stored.get("quant_method") != BITSANDBYTES:
        return
    key, value = ("model.path", repr(model.path)) if model.quantize is None else ("model.quantize", model.quantize)
    if not stored:
        check_installed(key, value)
        return
    kind = _describe_stored(stored)
    problem = f"model.path is {model.path!r}, whose weights are already quantised ({kind})"
    if stored.get("quant_method") != BITSANDBYTES or not stored.get("load_in_4bit"):
        raise ConfigError(f"{problem}; only those of bitsandbytes in 4 bits can be used")
    _check_are_quantized(model)
    if model.quantize is not None and kind != _name_kind(model.quantize, model.double_quant):
        raise ConfigError(
            f"{problem}, but model.quantize is {model.quantize} and model.double_quant is "
            f"{str(model.double_quant).lower()}; leave both out, and they are used as they are"
        )
    check_installed(key, value)


def _check_are_quantized(model: ModelConfig) -> None:
    """Check that a folder's weights are in 4 bits, as its config.json says; a model of the hub is checked when loaded.

    Raises:
        ConfigError: no weight in its safetensors files is.
    """
    names = list_weight_names(Path(resolve_model_path(model.path)))
    if names and not any(STATE in name for name in names):
        raise ConfigError(f"model.path is {model.path!r}, {NOT_QUANTIZED}")


def check_training(model: ModelConfig, lora: LoraConfig) -> None:
    """Check what can be known before the weights load of training an adapter on weights in 4 bits.

    Raises:
        ConfigError: the model cannot be quantised so, or the adapter cannot be trained on weights of its folder.
    """
    whole = load_whole_config(model)
    check_quantization(model, whole)
    if stored := find_stored_bits(whole):
        check_lora_of_quantized(lora, f"model.path is {model.path!r}, whose weights are {_describe_stored(stored)}")


def read_stored(whole: PretrainedConfig) -> dict[str, Any]:
    """Return the settings with which the weights of a folder were quantised; empty if they are not."""
    for config in (whole, whole.get_text_config(decoder=True)):
        stored = getattr(config, "quantization_config", None)
        if stored is not None:
            return dict(stored) if isinstance(stored, dict) else stored.to_dict()
    return {}


def find_stored_bits(whole: PretrainedConfig) -> dict[str, Any]:
    """Return the settings with which bitsandbytes has quantised the weights of a folder; empty if it has not."""
    stored = read_stored(whole)
    return stored if stored.get("quant_method") == BITSANDBYTES else {}


def _describe_stored(stored: dict[str, Any]) -> str:
    if stored.get("quant_method") != BITSANDBYTES:
        return str(stored.get("quant_method"))
    if not stored.get("load_in_4bit"):
        return "bitsandbytes, 8 bits"
    return _name_kind(stored.get("bnb_4bit_quant_type", "fp4"), bool(stored.get("bnb_4bit_use_double_quant")))


def _name_kind(kind: str, double: bool) -> str:
    return f"{kind} with double quantisation" if double else kind


def describe_quantization(model: nn.Module) -> str | None:
    """Return how the weights of a model are quantised, such as "nf4 with double quantisation"; None if they are not."""
    layer = next(iter(find_quantized(model).values()), None)
    return None if layer is None else _name_kind(layer.quantized.scales.kind, layer.quantized.scales.nested is not None)


def describe_configured(model: ModelConfig) -> str | None:
    """Return how the weights of the base model of `model` are quantised; None if they are not."""
    if stored := find_stored_bits(load_whole_config(model)):
        return _describe_stored(stored)
    return None if model.quantize is None else _name_kind(model.quantize, model.double_quant)


def loading_options(model: ModelConfig, whole: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of from_pretrained for a model in 4 bits; none for another."""
    stored = find_stored_bits(whole)
    if model.quantize is None and not stored:
        return {}
    device = ranks.device()  # where the weights are quantised, and where they stay
    options: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    if not stored:
        options["quantization_config"] = Nf4Config(model.double_quant, dtype)
    return options


def adopt(model: PreTrainedModel, path: str) -> None:
    """Let the model at `path`, loaded in 4 bits, be an ordinary model of transformers with layers of quantized.py.

    Raises:
        ConfigError: a layer that should be in 4 bits is not.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    if not isinstance(quantizer, Nf4Loader):
        for name, module in [*model.named_modules()]:
            if type(module).__name__ == "Linear4bit":
                if getattr(module.weight, "quant_state", None) is None:
                    raise ConfigError(f"model.path is {path!r}, {NOT_QUANTIZED} ({name})")
                model.set_submodule(name, _take_over(module))
        model.is_loaded_in_4bit = False
    quantizer.remove_quantization_config(model)
    vars(model).pop("hf_device_map", None)


def _take_over(module: Any) -> QuantizedLinear:
    """Return a layer of bitsandbytes as a `QuantizedLinear` with the same memory."""
    state, bias = module.weight.quant_state, module.bias
    nested, dtype = None, torch.float32 if bias is None else bias.dtype
    device = module.weight.device
    if state.nested:
        outer = state.state2
        offset = state.offset.to(device).expand(len(outer.absmax)).clone()
        nested = NestedScales(outer.absmax, offset, outer.code.to(device))
    absmax = state.absmax if nested else state.absmax.float()
    scales = BlockScales(state.quant_type, state.blocksize, state.code.to(device), absmax, nested)
    layer = QuantizedLinear(module.in_features, module.out_features, bias is not None, dtype, "meta")
    packed = module.weight.data.view(torch.uint8).view(-1)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    layer.quantized = QuantizedWeight(packed, scales, (module.out_features, module.in_features))
    layer.bias = None if bias is None else nn.Parameter(bias.data, requires_grad=False)
    return layer.train(module.training)


@torch.no_grad()
def check_quantized(model: PreTrainedModel, settings: ModelConfig) -> None:
    """Refuse a model in 4 bits that cannot compute.

    Raises:
        ConfigError: experts are packed weights of three dimensions, there is no linear layer, or the model's own code
            reads a weight instead of calling the layer.
    """
    key = f"model.path is {settings.path!r}, whose weights are in 4 bits"
    if settings.quantize is not None:
        key = f"model.quantize is {settings.quantize}"
    problem = f"{key}, which is not supported for the model type {model.config.model_type}"
    for name, module in model.named_modules():
        is_packed = any(p.dim() == 3 for p in module.parameters(recurse=False)) and not isinstance(module, nn.Conv1d)
        if is_packed and IN_LAYER.search(f"{name}."):
            raise ConfigError(f"{problem}: {name} has weights of experts, which are no linear layers")
    if not find_quantized(model):
        raise ConfigError(f"{problem}: its layers have no plain linear layer")
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    try:
        model.eval()(input_ids=ids, use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of many types: a weight of another dtype or shape than the code expects
        raise ConfigError(f"{problem}: its code does not call the layers ({summarize_error(error)})") from error
