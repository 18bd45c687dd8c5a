"""The decoder that runs the model's own modules over static memory, against the plain decoder; on a GPU where there is one."""

import json
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from conftest import ROOT
from fakes import Alphabet
from torch import nn

from grpo_core.batch import SamplingParams, Task
from grpo_core.config.sections import LoraConfig, ModelConfig
from grpo_core.model.policy import wrap
from grpo_core.model.routing import find_routers
from grpo_core.sampling import graph_decoder
from grpo_core.sampling.computation import Unsupported
from grpo_core.sampling.decode_ops import TorchOps
from grpo_core.sampling.modules import module_model
from grpo_core.sampling.modules.module_model import ModuleModel
from grpo_core.sampling.modules.step_functions import JoinedCalls, Substitute, installed
from grpo_core.sampling.sampler import Sampler

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ELSEWHERE = [pytest.mark.soak] if DEVICE.type == "cpu" else []
PROMPTS = (5, 11, 2, 8)
# sinks and windows with experts; a gated delta rule; own attention with a mask; chunks
REPRESENTATIVES = ["gpt_oss", "qwen3_5_text", "codegen", "llama4_text"]
OTHERS = [  # in the soak suite, and on a GPU
    "gemma3_text", "phi3", "smollm3", "olmo3", "lfm2", "granitemoehybrid", "falcon_h1", "nemotron_h", "jamba", "zamba2",
    "mamba", "mamba2", "qwen3_next", "olmo_hybrid", "qwen3_moe", "mixtral",
]  # fmt: skip

ROWS = json.loads((ROOT / "benchmarks" / "results" / "models.json").read_text())["rows"]
RIGHT = [row["type"] for row in ROWS if row["verdict"] == "right" and row["type"] not in tiny_models.COMPOSITES]
UNSUPPORTED = {  # types that are right, and cannot be computed with a cache of static shape
    "axk2", "bloom", "deepseek_v32", "deepseek_v4", "dots3_note_text", "glm_moe_dsa", "gpt_neo", "hy_v4", "inkling2_text",
    "inkling_text", "minimax", "openai-gpt", "qwen4_exp", "qwen4_exp_text", "recurrent_gemma", "rwkv", "xlstm",
}  # fmt: skip


def tasks(vocabulary):
    return [Task(i, "", [2 + (7 * i + j) % (vocabulary - 2) for j in range(n)], {}, (0, 0, i)) for i, n in enumerate(PROMPTS)]


def make_sampler(model, decoder, notes=None, **options):
    return Sampler(model, Alphabet(), max_new_tokens=14, decoder=decoder, notify=(notes or []).append, **options)


def make_model(name, vocabulary=61):
    model = tiny_models.make_model(tiny_models.make_config(name, vocabulary)).to(DEVICE)
    model.generation_config.eos_token_id = 1
    return model


def adapted(name):
    """A policy with a LoRA, whose B is not zero, on every linear layer that PEFT can adapt."""
    policy = wrap(make_model(name), ModelConfig(), LoraConfig(r=3, target_modules="all-linear"), temperature=1.0)
    move(policy, 0)
    return policy


def move(policy, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, parameter in policy.model.named_parameters():
            if "lora_" in key:
                parameter.normal_(0, 0.1)


def agree(got, want, tolerance=1e-4):
    assert torch.equal(got.completion_ids, want.completion_ids) and torch.equal(got.truncated, want.truncated)
    torch.testing.assert_close(got.rollout_logprobs, want.rollout_logprobs, atol=tolerance, rtol=0)


def check_type(model, vocabulary):
    """The same draws as the plain decoder's, whole and in waves, greedy too; rows differ in length."""
    want = make_sampler(model, "plain").generate(tasks(vocabulary), 3)
    for options in ({}, {"rows_at_once": 5}):
        sampler = make_sampler(model, "modules", **options)
        agree(sampler.generate(tasks(vocabulary), 3), want)
    greedy = SamplingParams(1.0, True)
    agree(sampler.generate(tasks(vocabulary), 1, settings=greedy), make_sampler(model, "plain").generate(tasks(vocabulary), 1, settings=greedy))
    return sampler


@pytest.mark.parametrize("name", REPRESENTATIVES + [pytest.param(name, marks=ELSEWHERE) for name in OTHERS])
def test_the_draws_are_the_plain_decoders(name):
    policy = adapted(name)
    sampler = check_type(policy.causal_lm, 61)
    assert sampler.decoder_name == "modules"
    move(policy, 1)  # new weights of the adapter, and none
    agree(sampler.generate(tasks(61), 3), make_sampler(policy.causal_lm, "plain").generate(tasks(61), 3))
    with policy.reference():
        agree(sampler.generate(tasks(61), 3), make_sampler(policy.causal_lm, "plain").generate(tasks(61), 3))


@pytest.mark.soak
@pytest.mark.parametrize("name", RIGHT)
def test_the_draws_of_every_type_are_the_plain_decoders(name):
    """A type that the modules decoder does not support is decoded by the plain one, and is named here."""
    sampler = check_type(make_model(name), 61)
    assert sampler.decoder_name == ("plain" if name in UNSUPPORTED else "modules")


def test_rows_of_a_group_differ_in_length_and_leave():
    """A model that ends often: slots are used again, and rows move to the first columns."""
    policy = adapted("gemma3_text")
    with torch.no_grad():
        policy.causal_lm.generation_config.eos_token_id = list(range(1, 20))
    want = make_sampler(policy.causal_lm, "plain").generate(tasks(61), 8)
    assert len(set(want.lengths().tolist())) > 4
    for rows_at_once in (None, 3, 7):
        agree(make_sampler(policy.causal_lm, "modules", rows_at_once=rows_at_once).generate(tasks(61), 8), want)


def test_layers_that_share_an_input_are_one_product_and_weights_keep_their_values():
    policy = adapted("llama")
    before = {key: value.clone() for key, value in policy.model.state_dict().items()}
    computation = ModuleModel(policy.causal_lm, "padded", 0, TorchOps())
    names = {id(module): name.rpartition(".")[2] for name, module in policy.causal_lm.named_modules()}
    groups = [tuple(names[id(linear)] for linear in group.joined.linears) for group in computation._joined]
    layers = policy.causal_lm.config.num_hidden_layers
    assert groups == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)] * layers
    assert all(torch.equal(value, before[key]) for key, value in policy.model.state_dict().items())
    assert not any("forward" in vars(module) and module is not policy for module in computation._configs)


def test_a_joined_layer_computes_the_input_that_it_is_given():
    q, k = nn.Linear(4, 3, bias=False), nn.Linear(4, 2, bias=False)
    group = JoinedCalls([q.requires_grad_(False), k.requires_grad_(False)], TorchOps(), torch.float32)
    forwards = [substitute.function for substitute in group.substitutes()]
    x, other = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    for value in (x, other, x):
        torch.testing.assert_close(forwards[0](value), nn.functional.linear(value, q.weight))
        torch.testing.assert_close(forwards[1](value), nn.functional.linear(value, k.weight))
    torch.testing.assert_close(forwards[1](other), nn.functional.linear(other, k.weight))


def test_what_stands_in_for_a_function_is_removed_again():
    layer, other = nn.Linear(2, 2), SimpleNamespace(f=1)
    mine = lambda x: x  # noqa: E731
    layer.bias.forward = None
    with pytest.raises(KeyError), installed([Substitute(layer, "forward", mine), Substitute(other, "f", 2)]):
        assert layer(3) == 3 and other.f == 2
        raise KeyError
    assert "forward" not in vars(layer) and other.f == 1


def test_a_model_that_differs_is_decoded_without_the_faster_functions(monkeypatch):
    """Law 13: a faster function that changes the logits is not used."""
    policy = adapted("llama")
    want = make_sampler(policy.causal_lm, "plain").generate(tasks(61), 2)
    forward = module_model.find_joined_calls

    def wrong(*arguments):
        groups = forward(*arguments)
        groups[0].joined.b.add_(1.0)
        groups[0].joined.refresh = lambda: None
        return groups

    monkeypatch.setattr(module_model, "find_joined_calls", wrong)
    sampler = make_sampler(policy.causal_lm, "modules")
    agree(sampler.generate(tasks(61), 2), want)
    computation = sampler._decoders["modules"].computation
    assert sampler.decoder_name == "modules" and computation._variant.substitutes == []
    with policy.reference():  # the layers read their own adapter now, so a graph holds whether it is on
        assert computation.refresh(0)


def test_a_model_whose_cache_cannot_be_used_is_decoded_by_the_plain_decoder_with_a_note():
    notes = []
    model = make_model("bloom")  # its biases for the distance come from a mask of two dimensions
    sampler = Sampler(model, Alphabet(), max_new_tokens=4, decoder="modules", notify=notes.append)
    sampler.generate(tasks(61), 1)
    assert sampler.decoder_name == "plain" and len(notes) == 1
    assert notes[0].startswith("sampling does not use the modules decoder, which is faster, because its own forward does not take")
    sampler.generate(tasks(61), 1)
    assert len(notes) == 1


def test_a_step_that_cannot_be_captured_is_not_tried_again(monkeypatch):
    notes, model = [], make_model("llama")
    sampler = Sampler(model, Alphabet(), max_new_tokens=4, decoder="modules", notify=notes.append)

    def fail(self, size):
        self._obstacle = "its forward cannot be captured as a graph: x"
        raise Unsupported(self._obstacle)

    monkeypatch.setattr(graph_decoder.GraphDecoder, "_step", fail)
    want = make_sampler(model, "plain").generate(tasks(61), 1)
    assert want.completion_ids.shape[1] > 4
    for _ in range(2):
        sampler.generate(tasks(61), 1)
        assert sampler.decoder_name == "plain"
    assert notes == ["sampling does not use the modules decoder, which is faster, because its forward cannot be captured as a graph: x"]


def test_rows_longer_than_a_window_that_the_model_applies_itself_are_decoded_by_the_plain_decoder():
    computation = ModuleModel(make_model("gemma3_text"), "padded", 0, TorchOps())
    computation.check(100)
    computation._variant = computation._variant._replace(passes_rows=False)
    computation.check(tiny_models.WINDOW)
    with pytest.raises(Unsupported, match="could become longer than its window of 7 tokens"):
        computation.check(tiny_models.WINDOW + 1)


def test_memory_is_given_back_after_a_call():
    sampler = make_sampler(make_model("qwen3_5_text"), "modules")
    sampler.generate(tasks(61), 2)
    layers = sampler._decoders["modules"].computation._layers
    assert all(not layer.prompts for layer in layers)
    if DEVICE.type == "cpu":
        assert all(not layer.rows for layer in layers)
    sampler.release()
    assert all(not layer.rows for layer in layers)


def test_a_decoder_is_named_in_the_configuration():
    with pytest.raises(ValueError, match="decoder is 'fast'; it must be auto, modules, plain"):
        make_sampler(make_model("llama"), "fast")


@pytest.mark.parametrize("rows_at_once, prefill_tokens", [(None, 8192), (5, 12)])
def test_the_experts_are_those_that_the_plain_decoder_records(rows_at_once, prefill_tokens, monkeypatch):
    """With 12 tokens at once the prompts are computed in parts of different widths."""
    monkeypatch.setattr(module_model, "MAX_PREFILL_TOKENS", prefill_tokens)
    model = make_model("qwen3_moe")
    routers = find_routers(model)
    want = make_sampler(model, "plain", routers=routers).generate(tasks(61), 3)
    sampler = make_sampler(model, "modules", rows_at_once=rows_at_once, routers=routers)
    for _ in range(2):
        got = sampler.generate(tasks(61), 3)
        agree(got, want)
        assert sampler.decoder_name == "modules" and want.routed_experts.unique().numel() == 4
        assert torch.equal(got.routed_experts, want.routed_experts)
        assert torch.equal(got.prompt_routed_experts[want.prompt_mask], want.prompt_routed_experts[want.prompt_mask])
    assert sampler.generate(tasks(61)[:1], 2, max_new_tokens=3).routed_experts.shape[:2] == (2, 3)


@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_moe"])
def test_with_graphs_the_draws_are_the_same(name, monkeypatch):
    """Stand-ins for graphs on a CPU: columns beyond the rows, and the run that capturing requires, change no draw."""
    policy = adapted(name)
    want = make_sampler(policy.causal_lm, "plain").generate(tasks(61), 3)
    sampler = make_sampler(policy.causal_lm, "modules", rows_at_once=5)
    sampler.generate(tasks(61)[:1], 1, max_new_tokens=1)
    decoder, captured = sampler._decoders["modules"], []

    def capture(function, pool):
        function()
        captured.append(function)
        return SimpleNamespace(replay=function)

    monkeypatch.setattr(graph_decoder, "capture_graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    decoder.on_gpu = True
    agree(sampler.generate(tasks(61), 3), want)
    assert len(captured) == 1 and decoder._state.shape[1] == 16
    assert bool(decoder._graphs) == (DEVICE.type == "cuda")  # forgotten with the memory that they read
    if name == "qwen3_moe":  # experts with an adapter of their own: switching it off needs another graph
        state = decoder.computation._switches
        with policy.reference():
            assert decoder.computation.refresh(0) and decoder.computation._switches != state
            assert not decoder.computation.refresh(0)
