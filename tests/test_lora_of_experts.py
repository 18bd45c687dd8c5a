"""The section lora on mixtures of experts, of which PEFT adapts weights in place of modules."""

import re

import pytest
from test_faults_of_models import EXPERTS

from grpo_core.config.sections import LoraConfig
from grpo_core.model.adapter import add_adapter
from grpo_core.model.adapter_check import check_targets
from grpo_core.model.lora_targets import describe_frozen_experts
from grpo_core.schema import ConfigError

ALL = {"target_modules": "all-linear"}
LISTED = "[q_proj, k_proj, v_proj, o_proj]"
REFUSED = [
    ({"exclude_modules": ["gate", "experts"], **ALL}, rf"lora.exclude_modules is \['gate', 'experts'\], which PEFT does not apply to model.layers.0.mlp.*set lora.target_modules to a list without experts and routers, such as {re.escape(LISTED)}"),
    ({"exclude_modules": ["gate"], **ALL}, r"lora.exclude_modules is \['gate'\], which PEFT does not apply to model.layers.0.mlp.gate.weight"),
    ({"exclude_modules": ".*mlp.*", **ALL}, r"lora.exclude_modules is '.*mlp..', which PEFT does not apply to model.layers.0.mlp"),
    ({"exclude_modules": ".*(mlp|q_proj).*", **ALL}, "lora.exclude_modules is .*, which PEFT does not apply to model.layers.0.mlp"),
    ({"layers_to_transform": [1], "target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
     r"lora.layers_to_transform is \[1\], which PEFT does not apply to weights such as model.layers.0.mlp.experts.down_proj; "
     r"name the layers in lora.target_parameters, such as \[layers.1.mlp.experts.down_proj\]"),
    ({"target_modules": ["experts"]}, r"a Qwen3MoeExperts; LoRA adapts .* alone, and weights that lora.target_parameters names, here \[experts.gate_up_proj, experts.down_proj\]"),
    ({"modules_to_save": ["gate"], **ALL}, rf"lora.modules_to_save is \['gate'\], but lora.target_modules \(here 'all-linear'\) already adapts weights of these modules; leave it out, or set lora.target_modules to a list without experts and routers, such as {re.escape(LISTED)}"),
    ({"use_dora": True, **ALL}, rf"lora.use_dora is True, which PEFT does not support for weights of experts and routers, and lora.target_modules \(here 'all-linear'\) adapts these; set lora.use_dora to false, or .* such as {re.escape(LISTED)}"),
    ({"dropout": 0.1, **ALL}, "lora.dropout is 0.1, which PEFT does not support for weights of experts and routers.*set lora.dropout to 0.0, or"),
]  # fmt: skip

NOT_THERE = [
    ({"target_modules": "q_proj"}, r"lora.target_modules is 'q_proj', which matches no module of the model, since a text is a regular expression of whole names; did you mean \[q_proj\]\?"),
    ({"target_modules": "q_proj,v_proj"}, r"did you mean \[q_proj, v_proj\]\?"),
    ({"target_modules": "p_proj"}, "which matches no module of the model$"),
    ({"target_modules": ".*language_model.*q_proj"}, "which matches no module of the model, since of a model with several parts only the text model is loaded, whose names have no language_model$"),
    ({"target_modules": ["model.language_model.layers.0.self_attn.q_proj"]}, "the model does not have, since .* only the text model is loaded, whose names have no language_model; known: "),
    ({"exclude_modules": ["vision_tower"]}, "lora.exclude_modules names 'vision_tower', which the model does not have, since .* have no vision_tower; known: "),
    ({"exclude_modules": ".*vision_tower.*"}, "lora.exclude_modules is .*, which matches no module of the model, since .* have no vision_tower$"),
    ({"exclude_modules": "q_proj"}, r"lora.exclude_modules is .*did you mean \[q_proj\]\?"),
]  # fmt: skip


@pytest.mark.parametrize("keys, sentence", [*REFUSED, *NOT_THERE])
def test_what_peft_ignores_or_fails_with_is_refused_in_a_sentence(keys, sentence):
    """PEFT would adapt what is left out, or raise an error about its own classes."""
    with pytest.raises(ConfigError, match=sentence):
        check_targets(EXPERTS["qwen3_moe"]().config, LoraConfig(r=4, **keys))


ACCEPTED = [
    {"exclude_modules": ["q_proj"], **ALL},
    {"target_modules": ["q_proj", "gate"]},
    {"use_dora": True, "dropout": 0.1, "modules_to_save": ["gate"]},
    {"exclude_modules": ["q_proj"], "target_parameters": ["q_proj.weight"]},
    {"layers_to_transform": [1], "target_modules": ["q_proj"], "target_parameters": ["layers.1.mlp.experts.down_proj"]},
]


@pytest.mark.parametrize("keys", ACCEPTED)
def test_what_the_sentences_advise_is_accepted(keys):
    """So is what PEFT applies."""
    check_targets(EXPERTS["qwen3_moe"]().config, LoraConfig(r=4, **keys))


@pytest.mark.parametrize("module", ["experts", "mlp"])
def test_experts_that_are_trained_whole_are_not_said_to_stay_frozen(module):
    """lora.modules_to_save trains a copy; the original beside it is frozen."""
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=[module])
    assert describe_frozen_experts(add_adapter(EXPERTS["qwen3_moe"](), lora)) is None
