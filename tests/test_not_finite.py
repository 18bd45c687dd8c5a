"""Numbers that are NaN, infinite or out of range: refused as settings, and as weights they end a run."""

import dataclasses
import json
import math
import re
import shutil
from dataclasses import replace
from typing import get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loop import make_run

from grpo_core import load_config, open_source
from grpo_core.cli import main
from grpo_core.config.checks import check
from grpo_core.config.sections import LoraConfig, ModelConfig, RewardConfig, RunConfig
from grpo_core.distributed import signals
from grpo_core.model.finite_weights import check_finite
from grpo_core.model.policy import load_policy
from grpo_core.objective.advantages import ADVANTAGES, compute_advantages
from grpo_core.schema import ConfigError, list_options
from grpo_core.training import checkpoint, trainer


def float_keys(kind=RunConfig, prefix=""):
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from float_keys(hint, f"{prefix}{name}.")
        elif float in list_options(hint):
            yield prefix + name


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400"])
@pytest.mark.parametrize("key", [*float_keys(), "rewards[0].weight"])
def test_attack_no_number_of_the_configuration_is_nan_or_infinite(key, value):
    with pytest.raises(ConfigError, match=f"^{re.escape(key)} is "):
        load_config("configs/tiny.yaml", [f"{key}={value}"])


def test_attack_an_argument_may_be_infinite_but_not_nan():
    assert load_config("configs/tiny.yaml", ["loss.args={clip_high: .inf}"]).loss.args == {"clip_high": math.inf}
    with pytest.raises(ConfigError, match=r"^loss\.args\.clip_high is nan; it must be a number$"):
        load_config("configs/tiny.yaml", ["loss.args={clip_high: .nan}"])
    with pytest.raises(ConfigError, match=r"^rewards\[0\]\.weight is nan; it must be a finite number$"):
        check(RunConfig(rewards=[RewardConfig("correct_answer", math.nan)]))


@pytest.mark.parametrize("word, sentence", [
    ("engine.learning_rate=1e300", "engine.learning_rate is 1e+300; it must be above 0 and at most 1"),
    ("engine.learning_rate=0", "engine.learning_rate is 0.0; it must be above 0 and at most 1"),
    ("engine.beta1=1", "engine.beta1 is 1.0; it must be at least 0 and below 1"),
    ("engine.beta1=-0.5", "engine.beta1 is -0.5; it must be at least 0 and below 1"),
    ("engine.beta2=1.0", "engine.beta2 is 1.0; it must be at least 0 and below 1"),
    ("engine.weight_decay=-1", "engine.weight_decay is -1.0; it must be at least 0"),
    ("engine.adam_eps=0", "engine.adam_eps is 0.0; it must be at least 1e-30, because a weight whose gradient is 0 would become NaN"),
    ("engine.adam_eps=-1e-8", "engine.adam_eps is -1e-08; it must be at least 1e-30, because a weight whose gradient is 0 would become NaN"),
    ("lora.alpha=0", "lora.alpha is 0.0; it must be above 0"),
    ("advantage.args={eps: -1}", "advantage grpo: eps is -1.0; it must be at least 0"),
    ("advantage.args={std_ddof: 2}", "advantage grpo: std_ddof is 2; it must be 0 or 1"),
])  # fmt: skip
def test_attack_a_number_out_of_range_is_refused_before_the_model_loads(word, sentence):
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        load_config("configs/tiny.yaml", [word])


@pytest.mark.parametrize("name", ["grpo", "batch_std", "reinforce_pp_baseline"])
def test_attack_without_eps_a_tied_group_still_has_advantage_0(name):
    """Law 3, also where every group is tied and the divisor is 0."""
    for rewards in (torch.tensor([[0.1, 0.1, 0.1], [0.0, 1.0, 0.0]]), torch.full((2, 3), 0.1)):
        values = compute_advantages(ADVANTAGES.build(name, {"eps": 0.0}), rewards)
        assert values[0].tolist() == [0.0, 0.0, 0.0]
        assert values[1].abs().sum() > 0 or rewards[1].unique().numel() == 1
    exact = compute_advantages(ADVANTAGES.build("grpo", {"eps": 0.0}), torch.tensor([[0.0, 1.0], [0.2, 0.1]]).double())
    torch.testing.assert_close(exact, torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).double() / 2**0.5)


def test_attack_weights_that_become_nan_end_the_run_without_a_checkpoint_of_them(tmp_path):
    """The update's gradient was finite, so the step counted as applied, and the run ended well with a NaN adapter."""
    run = make_run(tmp_path, num_steps=4, change=lambda c: replace(c, checkpoint=replace(c.checkpoint, every=1)))
    step, calls = run.engine.step, []

    def spoil():
        result = step()
        calls.append(result)
        if len(calls) == 3:
            with torch.no_grad():
                next(iter(run.policy.parameters())).view(-1)[0] = math.nan
        return result

    run.engine.step = spoil
    with pytest.raises(signals.RunFailed, match="^step 3 made weights NaN or infinite .*step-000002 was written before"):
        trainer.train(run)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attack_weights_that_are_not_finite_are_found(value, dtype):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(dtype)
    check_finite(model, "the model")
    with torch.no_grad():
        model[1].weight[1, 2] = value
    with pytest.raises(ConfigError, match="^the model cannot be used: 1.weight holds 1 value of NaN or infinity"):
        check_finite(model, "the model")


def test_attack_a_base_model_with_nan_is_refused(tmp_path):
    policy = load_policy(ModelConfig(), LoraConfig(r=0), dtype=torch.float32, temperature=1.0)
    with torch.no_grad():
        next(iter(policy.model.parameters()))[0, 0] = math.inf
    policy.model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"^the model {tmp_path} cannot be used: .*embed_tokens"):
        load_policy(ModelConfig(path=str(tmp_path)), LoraConfig(), dtype=torch.float32, temperature=1.0)


def test_attack_a_checkpoint_with_nan_is_refused(tiny_run, monkeypatch):
    load = checkpoint.load_weights

    def load_spoilt(path):
        tensors = load(path)
        next(iter(tensors.values())).view(-1)[0] = math.nan
        return tensors

    folder = tiny_run / "checkpoints" / "step-000006"
    open_source(str(folder))
    monkeypatch.setattr(checkpoint, "load_weights", load_spoilt)
    with pytest.raises(ConfigError, match=f"^the checkpoint {folder} cannot be used: "):
        open_source(str(folder))


def test_attack_a_run_does_not_go_on_from_a_checkpoint_with_nan(tmp_path):
    run = make_run(tmp_path, num_steps=2)
    trainer.train(run)
    (newest,) = checkpoint.list_checkpoints(tmp_path / "checkpoints")
    meta = json.loads((newest / "meta.json").read_text())
    weights = run.policy.parameters()[0].data.view(-1)
    for value in (0.5, math.nan):
        run.engine.load = lambda tensors, numbers, value=value: weights.index_fill_(0, torch.tensor([0]), value)
        if value == 0.5:
            checkpoint.load(newest, meta, run)
    with pytest.raises(ConfigError, match=f"^the checkpoint {newest} cannot be used: "):
        checkpoint.load(newest, meta, run)


@pytest.mark.parametrize("command", [["evaluate", "--samples", "0", "--limit", "2"], ["sample", "a"], ["export", "--adapter"]])
def test_attack_no_command_takes_an_adapter_with_nan(tiny_run, tmp_path, capsys, command):
    """`evaluate` printed false figures for the base model, because the adapter that is off adds 0 * NaN."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(value for name, value in tensors.items() if "lora_B" in name).view(-1)[0] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})
    name, *options = command
    assert main([name, str(run), *options]) == 2
    assert f"the adapter in {run / 'adapter'} cannot be used: " in capsys.readouterr().err
