"""Random draws: every key begins with its purpose, and no two draws of a run share a stream."""

import ast

import numpy as np
import pytest
import torch
from conftest import ROOT

from grpo_core import random_keys
from grpo_core.batch import Task
from grpo_core.data.stream import TaskStream
from grpo_core.distributed import ranks
from grpo_core.random_keys import PURPOSES, make_generator, make_key, torch_seed

PACKAGE = ROOT / "grpo_core"
FIXED_INPUTS = {"objective/laws.py", "objective/advantage_laws.py", "model/fast_layers.py", "model/logprobs.py", "sampling/modules/step_functions.py", "sampling/modules/delta_net.py", "sampling/modules/elementwise.py", "sampling/modules/expert_substitutes.py"}  # of checks: no seed of a run


def first_draws(key, count=4):
    return tuple(make_generator(key).random(count))


def test_s3_the_order_of_the_data_is_not_the_noise_of_a_completion(monkeypatch):
    """FAULTS S3: the same numbers behind two purposes gave the same stream."""
    used = []

    def recording(key):
        used.append(key)
        return make_generator(key)

    for module in ("stream", "order"):
        monkeypatch.setattr(f"grpo_core.data.{module}.make_generator", recording)
    stream = TaskStream([Task(i, "p", [1], {}) for i in range(4)], 2, seed=0)
    tasks = [task for step in range(4) for task in stream.batch(step)]
    tasks += [task for attempt in (1, 2) for task in stream.replacements(0, attempt)]
    noise = [(*task.seed, sample) for task in tasks for sample in range(4)]
    keys = [*set(used), *noise, *(make_key(purpose, 7, 7) for purpose in PURPOSES)]
    assert len(set(keys)) == len(keys) and all(key[0] in PURPOSES for key in keys)
    assert len({first_draws(key) for key in keys}) == len(keys)
    assert len({torch_seed(key) for key in keys}) == len(keys)


def test_s3_numbers_at_the_end_and_large_ones_make_other_streams():
    """FAULTS S3: NumPy's own seeding takes (0,) for (0, 0, 0), and (2^32, 0) for (0, 1)."""
    keys = [make_key("dropout", *rest) for rest in ((), (0,), (0, 0), (0, 0, 0), (2**32, 0), (0, 1), (1, 0), (-1,), (2**64,))]
    assert len({first_draws(key) for key in keys}) == len({torch_seed(key) for key in keys}) == len(keys)
    assert first_draws(make_key("dropout", np.int64(3))) == first_draws(make_key("dropout", 3))
    assert all(0 <= torch_seed(key) < 2**63 for key in keys)


def test_s3_the_first_dropout_is_not_the_initial_adapter():
    """FAULTS S3: (seed,) and (seed, 0, 0) seeded torch alike, so step 0 dropped by the noise of the new weights."""

    def draw(key):
        ranks.seed_all(key)
        return torch.rand(4)

    state = torch.random.get_rng_state()
    weights, dropout = draw(make_key("new_weights", 0)), draw(make_key("dropout", 0, 0, 0))
    assert not torch.equal(weights, dropout) and torch.equal(weights, draw(make_key("new_weights", 0)))
    torch.random.set_rng_state(state)


def test_s3_seeds_a_million_apart_share_no_shuffle():
    """FAULTS S3: seed * 1,000,003 + step is the same number for (0, 1000003) and (1, 0)."""
    assert torch_seed(make_key("minibatches", 0, 1_000_003)) != torch_seed(make_key("minibatches", 1, 0))
    assert torch_seed(make_key("minibatches", 0, 5)) != torch_seed(make_key("exact_kl", 0, 5))


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield (node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")), node


def test_s3_every_generator_of_the_package_is_seeded_from_a_key():
    """FAULTS S3: a draw with a key of its own making is not in the list of purposes."""
    purposes, seeded = set(), 0
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name == "random_keys.py":
            continue
        for function, node in calls(ast.parse(path.read_text())):
            assert function not in {"default_rng", "SeedSequence", "RandomState"}, (name, node.lineno)
            if function == "manual_seed" and name not in FIXED_INPUTS:
                (argument,) = node.args
                assert isinstance(argument, ast.Call) and argument.func.id == "torch_seed", (name, node.lineno)
                seeded += 1
            if function == "make_key":
                purposes.add(node.args[0].value)
    assert purposes == set(PURPOSES) and seeded >= 3
    with pytest.raises(AssertionError):
        make_key("luck", 0)
    assert random_keys.Key
