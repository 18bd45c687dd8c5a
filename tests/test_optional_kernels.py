"""Functions of optional packages are used only where their outputs and gradients are right."""

import functools
import re
import sys

import pytest
import torch
from tiny_models import make_config, make_model

from grpo_core.model.optional_kernels import drop_wrong_kernels, find_optional_kernels

NAME = "torch_chunk_gated_delta_rule"
INSTALLED = ("torch",)  # a package that is there


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, grad):
        return 1.5 * grad


class NoGradient(WrongGradient):
    @staticmethod
    def backward(context, grad):
        raise RuntimeError("this version of the compiler is not supported on this GPU")


def fine(own, *args, **kwargs):
    return own(*args, **kwargs)


def other_values(own, *args, **kwargs):
    out, state = own(*args, **kwargs)
    return 1.05 * out, state


def other_gradients(own, query, *args, **kwargs):
    return own(WrongGradient.apply(query), *args, **kwargs)


def no_gradients(own, query, *args, **kwargs):
    return own(NoGradient.apply(query), *args, **kwargs)


@pytest.fixture
def model():
    return make_model(make_config("qwen3_5_text", 64))


def check(model, function, monkeypatch, packages=INSTALLED):
    """Let the modeling file use a package's function, check it, and return the sentences and whether it is in use."""
    file = sys.modules[type(model).__module__]
    own = getattr(file, NAME).__wrapped__
    installed = functools.wraps(own)(functools.partial(function, own))
    monkeypatch.setattr(file, NAME, installed)
    ids = torch.arange(70)[None] % 64
    sentences = drop_wrong_kernels(model, lambda: model(ids), packages)
    current = getattr(file, NAME)
    assert current in (installed, own)
    return sentences, current is installed


def test_a_right_function_stays_in_use(model, monkeypatch):
    assert check(model, fine, monkeypatch) == ([], True)


@pytest.mark.parametrize("function, problem", [
    (other_values, "gives other outputs or gradients"), (other_gradients, "gives other outputs or gradients"),
    (no_gradients, r"fails \(.*this version of the compiler is not supported on this GPU.*\)"),
])  # fmt: skip
def test_a_wrong_function_gives_way_to_that_of_transformers(model, monkeypatch, function, problem):
    sentences, is_used = check(model, function, monkeypatch)
    assert not is_used and len(sentences) == 1
    assert re.fullmatch(f"{NAME} is computed by transformers, which is slower, because the function of the installed package {problem}", sentences[0])


def test_nothing_is_tried_without_the_packages(model, monkeypatch):
    assert check(model, other_values, monkeypatch, packages=("no_such_package",)) == ([], True)


def test_the_weights_have_no_gradient_afterwards(model, monkeypatch):
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    check(model, other_gradients, monkeypatch)
    assert all(weight.grad is None and torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_a_dense_model_has_no_such_functions():
    assert find_optional_kernels(make_model(make_config("llama", 64))) == []


def test_the_check_comes_before_the_first_update(monkeypatch):
    """`find_budgets` calls it, whose sentences training prints."""
    from grpo_core.config.sections import RunConfig
    from grpo_core.model import memory
    from grpo_core.model.policy import Policy

    policy = Policy(make_model(make_config("qwen3_5_text", 64)))
    monkeypatch.setattr(Policy, "choose_kernels", lambda self: ["a kernel is wrong"])
    sentences = []
    memory.find_budgets(RunConfig(), policy, (8, 8), 4, sentences.append)
    assert "a kernel is wrong" in sentences
