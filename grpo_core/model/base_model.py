"""Load the base model of a run, and refuse one whose files do not hold all of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from grpo_core.config.sections import ModelConfig
from grpo_core.counts import quantify
from grpo_core.model.composite import ATTRIBUTE, find_names
from grpo_core.model.finite_weights import check_finite
from grpo_core.model.loading import (
    at_revision,
    find_text_config,
    is_composite,
    load_whole_config,
    resolve_model_path,
)
from grpo_core.model.lora_targets import make_without_weights
from grpo_core.model.model_files import describe_bad_config, describe_pickle
from grpo_core.model.quantized_loading import (
    adopt,
    check_quantization,
    check_quantized,
    find_stored_bits,
    loading_options,
)
from grpo_core.model.rope import describe_factors, override_rope
from grpo_core.monitor.progress import print_note
from grpo_core.schema import ConfigError, first_line, summarize_error


def load_base_model(model: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Load the causal language model of `model.path` in `dtype`, or with the weights of its layers in 4 bits.

    Weights of the files that the model does not use are named in a note, and so is a head that the model's
    configuration ties to the embeddings, but whose own weight is in the files and is used. With 4 bits the model is
    loaded onto this rank's GPU, where there is one; otherwise onto the CPU.

    Raises:
        ConfigError: the model cannot be loaded or has no such attention implementation; its files lack a weight, which
            transformers would fill with random numbers, or hold one of another size; a weight is not finite; or the
            model cannot be quantised as configured.
    """
    whole = load_whole_config(model)
    check_quantization(model, whole)
    config = find_text_config(whole)
    if (stored := find_stored_bits(whole)) and config is not whole:
        config.quantization_config = stored
    override_rope(config, model.rope)
    names = _name_text_weights(config) if is_composite(whole) else {}
    options = loading_options(model, whole, dtype)
    options |= {"config": config} if config is not whole or model.rope else {}
    options |= {"key_mapping": names} if names else {}
    base, report = _read(model, config, dtype, options)
    adopt(base, model.path)
    _forget_names(base, names)
    if names:
        setattr(base, ATTRIBUTE, find_names(whole, base))
    if quantization := options.get("quantization_config"):
        report["mismatched_keys"] = {*report.get("mismatched_keys", ()), *quantization.mismatched}
    if problem := describe_wrong_weights(report):
        raise ConfigError(f"model.path is {model.path!r}, and it cannot be loaded: {problem}")
    if model.quantize is not None or stored:
        check_quantized(base, model)
    check_finite(base, f"the model {model.path}")
    for note in _list_notes(base, {} if names else report):  # the towers of a composite model are not used
        print_note(f"{note} (model.path {model.path})")
    return base


def _read(
    model: ModelConfig, config: PretrainedConfig, dtype: torch.dtype, options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the model of transformers, and its report of weights that are missing or of another size.

    `config` explains an error.

    Raises:
        ConfigError: the model cannot be loaded or has no such attention implementation.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            resolve_model_path(model.path),
            dtype=dtype,
            attn_implementation=model.attention,
            trust_remote_code=model.trust_remote_code,
            **at_revision(model.revision),
            ignore_mismatched_sizes=True,  # they are refused by the caller
            output_loading_info=True,
            **options,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models raise errors of many types
        if "attention implementation" in str(error):
            raise ConfigError(
                f"model.attention is {model.attention}, which the model at model.path does not support; use eager"
            ) from error
        check_can_be_made(config, model)
        has_sentence = isinstance(error, (OSError, ValueError, ImportError))
        reason = first_line(error) if has_sentence else summarize_error(error)
        reason = describe_pickle(Path(resolve_model_path(model.path))) or reason
        raise ConfigError(f"model.path is {model.path!r}, and it cannot be loaded: {reason}") from error


def check_can_be_made(config: PretrainedConfig, model: ModelConfig) -> None:
    """Check that transformers can make a model of `config`, that of model.path with model.rope, without its weights.

    Raises:
        ConfigError: names the value in config.json where that is known.
    """
    problem = None
    try:
        make_without_weights(config, model.trust_remote_code)
        factors = describe_factors(config, is_sure=False)
    except Exception as error:  # models raise errors of many types
        factors, problem = describe_factors(config), describe_bad_config(error, config.to_dict())
        if "Unrecognized configuration class" in str(error):
            problem = f"transformers has no causal language model of the type {config.model_type}"
    if factors and model.rope:
        raise ConfigError(f"model.rope is {model.rope}, with which {factors}")
    if problem := factors or problem:
        raise ConfigError(f"model.path is {model.path!r}, and it cannot be loaded: {problem}")


def _name_text_weights(config: PretrainedConfig) -> dict[str, str]:
    """Return patterns of the names that a text model's weights have in a composite model, with their names in it.

    The weights of towers keep their names, which the text model does not have, so they are not loaded.
    """
    model = make_without_weights(config, trust_remote_code=False)
    embeddings = model.get_input_embeddings()
    prefix = next(name for name, module in model.named_modules() if module is embeddings).rpartition(".")[0]
    return {
        r"^language_model\.lm_head\.": "lm_head.",
        r"^language_model\.model\.": f"{prefix}.",
        r"^model\.language_model\.": f"{prefix}.",
        r"^model\.text_model\.": f"{prefix}.",
    }


def _forget_names(model: PreTrainedModel, names: Mapping[str, str]) -> None:
    """Let `model` be saved under its own names: transformers saves it under those that it was loaded from."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [
            conversion for conversion in conversions if not names.keys() & {*conversion.source_patterns}
        ]


def describe_wrong_weights(report: Mapping[str, Any]) -> str | None:
    """Return a clause about weights that the files lack or hold in another size; None if there are none."""
    if mismatched := sorted(report.get("mismatched_keys", ())):
        name, in_files, in_model = mismatched[0]
        more = _count_others(mismatched)
        return (
            f"the weight {name} has the size {[*in_files]} in the model's files, but {[*in_model]} by its "
            f"config.json{more}; use the config.json that belongs to the weights"
        )
    if missing := sorted(report.get("missing_keys", ())):
        return (
            f"its files lack the weight {missing[0]}{_count_others(missing)}, which would be random numbers; use "
            "complete files, and the config.json that belongs to them"
        )
    return None


def _list_notes(model: PreTrainedModel, report: Mapping[str, Any]) -> list[str]:
    notes = []
    if unused := sorted(report.get("unexpected_keys", ())):
        notes.append(
            f"the model does not use {quantify(len(unused), 'weight')} of its files, such as {unused[0]}: compare "
            "its config.json"
        )
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if is_tied and None not in (embeddings, head) and getattr(head, "weight", None) is not embeddings.weight:
        notes.append(
            "the model's config.json ties the head to the embeddings (tie_word_embeddings), but its files hold a head "
            "of its own, which is used; other programs may tie them"
        )
    return notes


def _count_others(names: list[Any]) -> str:
    return f" and {quantify(len(names) - 1, 'other')}" if len(names) > 1 else ""
