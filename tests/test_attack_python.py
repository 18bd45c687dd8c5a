"""The names that `grpo_core` exports: arguments of the wrong type are one sentence, and none is silently used as another."""

import functools
import re

import pytest
import torch
from conftest import ROOT

import grpo_core
from grpo_core import ADVANTAGES, LOSSES, REWARDS, ConfigError, center, load_config, open_source, train
from grpo_core.batch import MIN_TEMPERATURE, SamplingParams
from grpo_core.registry import Registry

TINY = ROOT / "configs" / "tiny.yaml"
OPENED = functools.cache(lambda: open_source("builtin:tiny"))


@pytest.mark.parametrize("path", [None, 3, {"name": "a"}, b"tiny", ""])
@pytest.mark.parametrize("function, what", [(load_config, "the configuration file"), (open_source, "the run or model")])
def test_attack_7_a_path_is_text_or_a_path(function, what, path):
    with pytest.raises(ConfigError, match=re.escape(f"{what} is {path!r}; it must be a path or a name, as text")):
        function(path)


@pytest.mark.parametrize("overrides", ["trainer.num_steps=3", None, {"trainer.num_steps": 3}, 3, [3], [None]])
def test_attack_7_overrides_are_a_list_of_texts(overrides):
    for read in (lambda: load_config(TINY, overrides), lambda: open_source("builtin:tiny", overrides)):
        with pytest.raises(ConfigError, match=r"^overrides (is|has) .*; it must be a list of texts, such as \['trainer"):
            read()
    assert load_config("tiny", ("trainer.num_steps=3",)).trainer.num_steps == 3
    assert load_config(TINY, (word for word in ["trainer.num_steps=3"])).trainer.num_steps == 3


@pytest.mark.parametrize("config", [None, "configs/tiny.yaml", {}])
def test_attack_7_train_takes_a_configuration(config):
    with pytest.raises(ConfigError, match="train takes a configuration, as load_config returns it, and not "):
        train(config)


@pytest.mark.parametrize("settings, sentence", [
    ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; it must be an integer"),
    ({"max_new_tokens": "3"}, "max_new_tokens is '3'; it must be an integer"),
    ({"max_new_tokens": True}, "max_new_tokens is True; it must be an integer"),
    ({"temperature": None}, "temperature is None; it must be a number"),
    ({"temperature": True}, "temperature is True; it must be a number"),
    ({"temperature": 1e-300}, "temperature is 1e-300; it must be at least 1e-06, because logits divided by less overflow"),
    ({"seed": None}, "seed is None; it must be an integer"),
    ({"seed": 1.5}, "seed is 1.5; it must be an integer"),
    ({"seed": "a"}, "seed is 'a'; it must be an integer"),
])  # fmt: skip
def test_attack_7_the_settings_of_generate_have_their_types(settings, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        OPENED().generate(["a"], **settings)


@pytest.mark.parametrize("prompts", [None, 3, b"a", {"a": 1}, "a"])
def test_attack_7_prompts_are_a_list(prompts):
    with pytest.raises(ConfigError, match="prompts is .*; it must be a list of texts or of chats"):
        OPENED().generate(prompts)


def test_attack_7_integers_of_numpy_and_iterators_are_taken():
    import numpy as np

    one = OPENED().generate(iter(["a"]), max_new_tokens=np.int64(3), seed=np.int32(1), temperature=np.float32(1))
    assert one == OPENED().generate(["a"], max_new_tokens=3, seed=1, temperature=1)


@pytest.mark.parametrize("key", ["sampling.temperature", "evaluation.temperature"])
def test_attack_7_a_temperature_whose_logits_overflow_is_refused(key):
    with pytest.raises(ConfigError, match=f"{key} is 1e-40; it must be at least 1e-06, because logits divided by less"):
        load_config(TINY, [f"{key}=1e-40"])
    with pytest.raises(ValueError, match="it must be at least 1e-06"):
        SamplingParams(9e-7)
    assert load_config(TINY, [f"{key}=1e-6"]) and SamplingParams(MIN_TEMPERATURE)


@pytest.mark.parametrize("registry", [LOSSES, ADVANTAGES, REWARDS], ids=lambda registry: registry.kind)
def test_attack_7_a_function_is_registered_with_a_name(registry):
    before = dict(registry.functions)
    for name in (None, len, 3, "", "file.py:mine", "file.py"):  # len: the decorator without its parentheses
        with pytest.raises(ConfigError, match=f"the {registry.kind} is registered with a name, as by @register.'mine'."):
            registry.register(name)
    with pytest.raises(ConfigError, match=f"the {registry.kind} 'mine' is 3; it must be a function"):
        registry.register("mine")(3)
    with pytest.raises(ConfigError, match=f"the {registry.kind} .* is registered twice; choose another name"):
        registry.register(min(before))(len)
    with pytest.raises(ConfigError, match=f"the name of a {registry.kind} is None; it must be text"):
        registry.get(None)
    assert registry.functions == before


def test_attack_7_an_object_that_is_called_like_a_function_may_be_registered_again():
    class Mine:
        def __call__(self, completions):
            return completions

    registry = Registry("thing")
    registry.register("x")(Mine())
    again = registry.register("x")(Mine())
    assert registry.get("x") is again
    with pytest.raises(ConfigError, match="registered twice"):
        registry.register("x")(functools.partial(len))


@pytest.mark.parametrize("rewards", [None, [[1.0, 0.0]], 3])
def test_attack_7_rewards_that_are_no_tensor_are_a_sentence(rewards):
    for function in (center, ADVANTAGES.get("grpo"), ADVANTAGES.get("rloo")):
        with pytest.raises(ConfigError, match=r"rewards must be a tensor \[N, G\], got a "):
            function(rewards)
    with pytest.raises(ConfigError, match=r"rewards must be \[N, G\] with G >= 2, got \[2\]"):
        center(torch.zeros(2))


def test_attack_7_every_exported_name_is_there():
    assert all(getattr(grpo_core, name) is not None and name in dir(grpo_core) for name in grpo_core.__all__)
