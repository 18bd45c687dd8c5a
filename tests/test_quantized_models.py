"""Model types in 4 bits, each built tiny: right, by its dequantised weights and its sampler, or refused in a sentence."""

import copy
import sys

import pytest
import tiny_models
import torch
from conftest import ROOT

from grpo_core.batch import Task, take
from grpo_core.config.sections import LoraConfig, ModelConfig
from grpo_core.model.base_model import load_base_model
from grpo_core.model.policy import wrap
from grpo_core.model.quantized import find_quantized, to_plain
from grpo_core.sampling.sampler import Sampler
from grpo_core.schema import ConfigError

sys.path.insert(0, str(ROOT / "benchmarks"))
import sampling

pytest.importorskip("bitsandbytes")
REPRESENTATIVES = {  # a decoder of each kind, and what is not supported
    "qwen3_5_text": "right", "mistral3": "right", "deepseek_v3": "experts", "falcon": "no plain linear layer",
}  # fmt: skip


def check_type(name, folder):
    """Return "right", or the sentence of the refusal."""
    try:
        model = tiny_models.make_model(tiny_models.make_config(name, 61), is_composite=name in tiny_models.COMPOSITES)
    except Exception as error:  # transformers cannot build it
        if name in REPRESENTATIVES:
            raise
        pytest.skip(f"{type(error).__name__}: {error}"[:100])
    model.save_pretrained(folder)
    attention = "sdpa"
    try:
        load_base_model(ModelConfig(path=str(folder), attention=attention), torch.float32)
    except ConfigError as error:
        if "use eager" not in str(error):
            return str(error)
        attention = "eager"
    try:
        base = load_base_model(ModelConfig(path=str(folder), attention=attention, quantize="nf4"), torch.float32)
        assert find_quantized(base)
        check_logits(base)
        check_sampler(base)
    except ConfigError as error:
        return str(error)
    return "right"


def check_logits(base):
    """Compare the model with one whose weights have the same values."""
    plain, ids = copy.deepcopy(base), torch.arange(2, 14, device=base.device)[None].repeat(2, 1)
    to_plain(plain, torch.float32)
    with torch.no_grad():
        ours, theirs = (model.eval()(input_ids=ids, use_cache=False).logits for model in (base, plain))
    torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-3)


def check_sampler(base):
    """Compare the log-probs of the sampler with those of the trainer, with an adapter, and take a gradient."""
    policy = wrap(base, ModelConfig(), LoraConfig(target_modules="all-linear"), temperature=1.0)
    with torch.no_grad():
        for key, parameter in policy.model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.1)
    sampler = Sampler(policy.causal_lm, sampling.StubTokenizer(), max_new_tokens=6, notify=lambda sentence: None)
    rollouts = sampler.generate([Task(i, "", [5, 6, 7 + i], {}, (0, 0, i)) for i in range(2)], 3)
    for packing in policy.plan(rollouts):
        part = take(rollouts, packing.rows)
        with policy.training():
            logprobs = policy.forward(part, packing).logprobs
            grads = torch.autograd.grad(logprobs.sum(), policy.parameters(), allow_unused=True)
        assert all(grad is None or grad.isfinite().all() for grad in grads) and any(grad is not None for grad in grads)
        mask = part.completion_mask
        torch.testing.assert_close(part.rollout_logprobs[mask], logprobs.detach()[mask], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_a_type_of_each_kind_is_right_or_refused(name, tmp_path):
    assert REPRESENTATIVES[name] in check_type(name, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("name", tiny_models.TYPES)
def test_every_type_is_right_or_refused(name, tmp_path):
    assert check_type(name, tmp_path)
