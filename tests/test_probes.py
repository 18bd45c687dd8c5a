"""Probes of memory budgets and of the log-prob kernel leave the model as it was loaded (DESIGN.md, law 13)."""

import copy
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import tiny_policy
from test_config import TINY

from grpo_core.config.files import load
from grpo_core.model import logprobs, memory, policy
from grpo_core.model.teacher import Teacher
from grpo_core.schema import ConfigError

WORDS = ["sampling.group_size=2", "lora.dropout=0.5"]


@pytest.fixture
def gpu(monkeypatch):
    """The functions of a GPU's memory, on a machine without one: every trial adds nothing, and 1 GB is free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("grpo_core.distributed.ranks.device", lambda: torch.device("cpu"))
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(memory, "_free_bytes", lambda trained: 1e9)


class Careless(torch.nn.Module):
    """A layer that leaves traces of every forward, which ends with the exception `fails` if there is one."""

    def __init__(self, layer, model):
        super().__init__()
        self.layer, self.fails, self.count, self.cache, self.lengths = layer, None, 0, {}, [1]
        self.names, self.last = {"a"}, torch.zeros(2)
        self.register_buffer("total", torch.zeros(3))
        self.config = copy.deepcopy(model.config)

    def forward(self, x):
        self.count += 1
        self.cache[self.count], self.new = x.detach(), x.detach()
        self.lengths.append(x.shape[0])
        self.names.add(str(self.count))
        self.last += 1
        self.total += 1
        self.config.use_cache = False
        self.register_forward_hook(lambda *args: None)
        self.layer.train()
        self.layer.weight.grad = torch.ones_like(self.layer.weight)
        self.layer.weight.requires_grad_(True)
        random.random(), np.random.rand(), torch.rand(1)
        if self.fails:
            raise self.fails
        return self.layer(x)


def describe(model):
    """Everything of a model that a trial may change: values, and which objects hold them."""
    state = {name: (p.detach().clone(), p.requires_grad, p.grad, p.data_ptr()) for name, p in model.named_parameters()}
    state |= {f"buffer {name}": (id(b), b.clone()) for name, b in model.named_buffers()}
    for name, module in model.named_modules():
        values = {key: value.copy() if isinstance(value, (dict, list, set)) else value for key, value in vars(module).items()}
        state[f"module {name}"] = values
        if "config" in values:
            state[f"config {name}"] = module.config.to_dict()
    return state | {"generators": (random.getstate(), np.random.get_state(), torch.get_rng_state())}


def is_equal(one, other):
    if isinstance(one, (torch.Tensor, np.ndarray)):
        return one is other or bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return one == other


def careless_policy(fails=None):
    own = tiny_policy(dropout=0.5)
    mlp = own.causal_lm.model.layers[0].mlp
    mlp.gate_proj = Careless(mlp.gate_proj, own.causal_lm)
    own.__dict__.pop("_modules", None)
    assert own.layout and own._logit_scale == 1.0  # probes with tests of their own
    mlp.gate_proj.fails = fails
    return own


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("fails", [None, torch.OutOfMemoryError("out of memory"), KeyError("a fault of the model")])
def test_law_13_a_trial_of_memory_leaves_no_trace(gpu, fails, backward):
    """A layer that keeps what it sees, changes its mode, its hooks and its config, also if memory runs out in it."""
    own = careless_policy(fails)
    trial = memory._Trial(load(TINY, WORDS), own, (5, 6), rows=4)
    before = describe(own.model)
    if isinstance(fails, KeyError):
        with pytest.raises(KeyError):
            trial._measure_peak(2, backward)
    else:
        assert trial._measure_peak(2, backward) == (None if fails else 0)
    after = describe(own.model)
    assert [name for name in before if not is_equal(before[name], after.get(name))] == []
    assert before.keys() == after.keys()


def test_law_13_budgets_leave_no_trace(gpu):
    own = careless_policy()
    before = describe(own.model)
    budgets = memory.find_budgets(load(TINY, WORDS), own, (5, 6), 4, lambda sentence: None)
    assert budgets.update.tokens == budgets.forward.tokens > 5
    assert [name for name, value in describe(own.model).items() if not is_equal(before[name], value)] == []


@pytest.mark.parametrize("own_model", [False, True])
def test_law_13_budgets_with_a_teacher_leave_no_trace_and_hold_its_longer_prompts(gpu, own_model, monkeypatch):
    own, seen = careless_policy(), []
    teacher = Teacher(tiny_policy(seed=1), shares_policy=False) if own_model else Teacher(own)
    config = load(TINY, [*WORDS, "teacher.prompt={prompt}", "teacher.kl=forward"])
    states = Teacher.states
    monkeypatch.setattr(Teacher, "states", lambda self, rollouts, *rest: seen.append(rollouts) or states(self, rollouts, *rest))
    before = describe(own.model)
    budgets = memory.find_budgets(config, own, (5, 6), 4, lambda sentence: None, memory.Taught(teacher, 9))
    assert budgets.teacher.tokens == budgets.forward.tokens + 2 * 4  # of two groups
    assert {rollouts.prompt_ids.shape[1] for rollouts in seen} == {9} and seen
    assert [name for name, value in describe(own.model).items() if not is_equal(before[name], value)] == []


def test_law_13_a_teacher_that_does_not_fit_is_said(gpu):
    teacher = Teacher(careless_policy(torch.OutOfMemoryError("out of memory")), shares_policy=False)
    with pytest.raises(ConfigError, match="^the teacher's forward of one completion of 6 tokens after a prompt of 9 tokens does not fit"):
        memory.find_budgets(load(TINY, WORDS), tiny_policy(), (5, 6), 4, lambda sentence: None, memory.Taught(teacher, 9))


def test_law_13_gradient_checkpointing_that_does_not_help_is_switched_off_again(gpu):
    """model.gradient_checkpointing is auto, and one completion does not fit with it either."""
    own = careless_policy(torch.OutOfMemoryError("out of memory"))
    before = describe(own.model)
    with pytest.raises(ConfigError, match="not even one completion of 6 tokens"):
        memory.find_budgets(load(TINY, WORDS), own, (5, 6), 4, lambda sentence: None)
    assert not own.causal_lm.is_gradient_checkpointing
    assert [name for name, value in describe(own.model).items() if not is_equal(before[name], value)] == []


WRONG = {
    "log-probs": lambda values: (values[0] + 0.1, *values[1:]),
    "entropies": lambda values: (values[0], 1.1 * values[1], values[2]),
    "gradient": lambda values: (*values[:2], None if values[2] is None else -values[2]),
    "no gradient": lambda values: (*values[:2], None),
    "not finite": lambda values: (values[0] * float("nan"), *values[1:]),
    "fails": lambda values: 1 / 0,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WRONG)
def test_law_13_a_log_prob_kernel_that_computes_other_values_is_not_used(monkeypatch, name, dtype):
    own, cuda = logprobs.softmax_statistics, torch.device("cuda")

    def wrong(*arguments):
        return WRONG[name](own(*arguments))

    state = torch.get_rng_state()
    cpu = torch.device("cpu")
    assert logprobs.computes_the_same(own, cpu, dtype, 40) and not logprobs.computes_the_same(wrong, cpu, dtype, 40)
    assert torch.equal(torch.get_rng_state(), state)
    kernel, answers = object(), iter([True, False])
    monkeypatch.setitem(sys.modules, "grpo_core.model.kernels", SimpleNamespace(softmax_statistics=kernel))
    monkeypatch.setattr(logprobs, "computes_the_same", lambda statistics, *a: statistics is kernel and next(answers))
    assert logprobs.find_statistics(cuda, dtype, 41) is kernel and logprobs.find_statistics(cuda, dtype, 42) is own
    logprobs.find_statistics.cache_clear()


def test_law_13_a_kernel_that_is_not_used_is_said(gpu, monkeypatch):
    own, sentences = careless_policy(), []
    monkeypatch.setattr(policy.Policy, "kernel_differs", True)
    memory.find_budgets(load(TINY, WORDS), own, (5, 6), 4, sentences.append)
    assert any(sentence.startswith("the log-prob kernel of this GPU computes other values") for sentence in sentences)
