"""What the package makes on the CPU is made there, whatever torch's default device is."""

import ast

import pytest
import torch
from conftest import ROOT
from fakes import ragged_rollouts
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from grpo_core.batch import Task, TrainBatch, split
from grpo_core.config.checks import check
from grpo_core.config.sections import LoraConfig, ModelConfig, RunConfig
from grpo_core.distributed import ranks
from grpo_core.model import fast_layers, policy
from grpo_core.objective import advantage_laws, laws
from grpo_core.objective.advantages import ADVANTAGES, compute_advantages
from grpo_core.objective.losses import LOSSES
from grpo_core.objective.objective import functions_learn_from_ties
from grpo_core.sampling.sampler import Sampler
from grpo_core.scoring.scoring import Reward, score

SHAPE = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
MODELS = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}
META = torch.device("meta")  # has no memory, so a tensor that is made there by mistake cannot be used


class Letters:
    pad_token_id, eos_token_id = 0, 1

    def batch_decode(self, rows, skip_special_tokens=True):
        return ["".join(chr(97 + i) for i in row) for row in rows]


@pytest.mark.parametrize("name", MODELS)
def test_fault_28_a_policy_is_made_sampled_and_scored(name):
    """FAULTS #28: the comparison of the fast layers drew on the CPU under `with torch.device("cuda")`."""
    model_class, config_class = MODELS[name]
    torch.manual_seed(0)
    base = model_class(config_class(**SHAPE)).eval()
    expected = policy.wrap(base, ModelConfig(), LoraConfig(r=2), temperature=1.0)
    num_fast = sum("forward" in vars(module) for module in expected.model.modules())
    tasks = [Task(0, "p", [3, 4, 5], {"answer": "x"}), Task(1, "q", [6], {"answer": "y"})]
    rollouts = Sampler(expected.model, Letters(), max_new_tokens=5).generate(tasks, 4)
    with torch.device("meta"):
        for module in expected.model.modules():
            vars(module).pop("forward", None)
        fast_layers.install(expected.model)
        assert sum("forward" in vars(module) for module in expected.model.modules()) == num_fast > 0
        for decoder in ("auto", "plain"):
            sampler = Sampler(expected.model, Letters(), max_new_tokens=5, decoder=decoder)
            again = sampler.generate(tasks, 4)
            assert torch.equal(again.completion_ids, rollouts.completion_ids)
        torch.testing.assert_close(expected.logprobs(again), rollouts.rollout_logprobs, atol=1e-4, rtol=0)
        scores = score([Reward("r", 1.0, lambda completions: [1.0] * len(completions))], tasks, again.completions, 4)
        assert scores.rewards.tolist() == [[1.0] * 4] * 2


def test_fault_28_batches_are_cut_and_shuffled():
    """FAULTS #28: the shuffle of minibatches has a generator of the CPU."""
    rollouts = ragged_rollouts(batch=8)
    batch = TrainBatch(rollouts, torch.ones(8, 1), rollouts.completion_mask)
    expected = [part.rollouts.completion_ids for part in batch.minibatches(2, 2, 4, torch.Generator().manual_seed(0))]
    with META:
        parts = [part.rollouts.completion_ids for part in batch.minibatches(2, 2, 4, torch.Generator("cpu").manual_seed(0))]
        assert [len(part) for part in split(batch, 3)] == [3, 3, 2]
        assert ranks.draw_uniforms([("train", 0)], 3).device.type == "cpu"
    assert all(torch.equal(a, b) for a, b in zip(parts, expected, strict=True)) and len(parts) == 4


def test_fault_28_functions_are_tried_and_their_laws_checked():
    """FAULTS #28: the laws draw their batch with a generator of the CPU."""
    expected = [outcome.holds for outcome in laws.check_loss(LOSSES.get("grpo"))]
    with META:
        assert [outcome.holds for outcome in laws.check_loss(LOSSES.get("grpo"))] == expected and all(expected)
        assert all(outcome.holds for outcome in advantage_laws.check_advantage(ADVANTAGES.get("grpo")))
        assert laws.clip_table(LOSSES.get("grpo"))
        assert not functions_learn_from_ties("sequence", LOSSES.get("grpo"))
        check(RunConfig())
    rewards = torch.tensor([[1.0, 0.0]])
    with META:
        assert compute_advantages(ADVANTAGES.get("gdpo"), rewards).device.type == "cpu"


def test_fault_28_every_draw_from_a_generator_names_its_device():
    """FAULTS #28: a factory that is given a generator and no device draws on torch's default device."""
    draws = 0
    for path in (ROOT / "grpo_core").rglob("*.py"):
        if path.name in ("laws.py", "advantage_laws.py"):  # run_laws sets the default device
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = {keyword.arg for keyword in node.keywords} if isinstance(node, ast.Call) else set()
            draws += "generator" in names
            assert "generator" not in names or "device" in names, (path.name, node.lineno)
    assert draws >= 2
