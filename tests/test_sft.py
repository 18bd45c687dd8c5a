import json
from types import SimpleNamespace

import pytest
import torch
from test_run import SHORT, python
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_core.averages import Totals
from grpo_core.batch import Task, TrainBatch
from grpo_core.config import LoraConfig, LossConfig, ModelConfig, RunConfig, SftConfig, TargetConfig
from grpo_core.control import Control
from grpo_core.corrections import CORRECTIONS
from grpo_core.data import load_tokenizer
from grpo_core.losses import LOSSES
from grpo_core.policy import load_policy
from grpo_core.problems import word_problems
from grpo_core.sft import supervised_rollouts
from grpo_core.stats import Stats
from grpo_core.tiny import new_tokenizer
from grpo_core.trainer import micro_loss

ROWS = word_problems("train", 40)


def make_tasks(tokenizer, count=40):
    prompts = [f"Question: {row['question']}\n" for row in ROWS[:count]]
    return [Task(i, p, tokenizer(p)["input_ids"], ROWS[i], seed=(0, 0, i)) for i, p in enumerate(prompts)]


def test_the_loss_is_the_models_own_cross_entropy():
    tokenizer = load_tokenizer("builtin:tiny")
    policy = load_policy(ModelConfig(), LoraConfig(r=0), dtype=torch.float32, temperature=1.0)
    rollouts = supervised_rollouts(
        make_tasks(tokenizer, 6), SftConfig(), tokenizer, tokenizer.eos_token_id, torch.device("cpu")
    )
    config = RunConfig(loss=LossConfig(name="reinforce", average="token", kl_coef=0.0))
    correction_fn = CORRECTIONS.get("none")
    run = SimpleNamespace(config=config, policy=policy, loss_fn=LOSSES.build("reinforce"), correction_fn=correction_fn)
    mask = rollouts.completion_mask
    totals = Totals(tokens=mask.sum(), completions=torch.tensor(6), max_new_tokens=1)
    ours = micro_loss(run, TrainBatch(rollouts, torch.ones(6, 1), mask), policy.forward(rollouts), totals, Control(0.0, 0.0), Stats())
    summed = 0.0
    for i in range(6):
        prompt, target = rollouts.prompt_ids[i][rollouts.prompt_mask[i]], rollouts.completion_ids[i][mask[i]]
        assert target[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(target[:-1]) == f"<think>{ROWS[i]['cot']}</think>\n{ROWS[i]['answer']}"
        labels = torch.cat([torch.full_like(prompt, -100), target])
        summed += policy.causal_lm(torch.cat([prompt, target])[None], labels=labels[None]).loss * len(target)
    torch.testing.assert_close(ours, summed / mask.sum())


def test_targets_are_mixed_by_their_shares():
    tokenizer = load_tokenizer("builtin:tiny")
    config = SftConfig(targets=[TargetConfig("{answer}", 0.6), TargetConfig("<think>{cot}</think>\n{answer}", 0.4)])
    tasks = make_tasks(tokenizer)
    many = [
        Task(t.index, t.prompt, t.prompt_ids, t.columns, seed=(0, step, t.index)) for step in range(25) for t in tasks
    ]
    rollouts = supervised_rollouts(many, config, tokenizer, 1, torch.device("cpu"))
    direct = sum(not text.startswith("<think>") for text in rollouts.completions) / len(many)
    assert direct == pytest.approx(0.6, abs=0.05)


def test_the_tokenizer_keeps_digits_apart_and_encodes_anything():
    tokenizer = new_tokenizer([row["question"] for row in ROWS], 400)
    for text in ("<think>12 + 3 = 15.</think>\n#### 15", "Grüße, 日本 \t\n ~"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("<think>12")[0] == "<think>" and len(tokenizer.tokenize("1234")) == 4
    assert tokenizer.decode([tokenizer.eos_token_id, *tokenizer("a")["input_ids"]], skip_special_tokens=True) == "a"


@pytest.mark.slow
def test_the_command_makes_a_model_that_loads(tmp_path, environment):
    command = [
        "-m", "grpo_core", "sft", "--config", "configs/tiny_sft.yaml", f"output_dir={tmp_path}", f"sft.output={tmp_path}/model",
        "trainer.num_steps=12", "engine.warmup_steps=2", *SHORT,
    ]  # fmt: skip
    done = python(*command, environment=environment)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"model: {tmp_path}/model", done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "tiny_sft" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16 and model.config.vocab_size == len(
        AutoTokenizer.from_pretrained(tmp_path / "model")
    )
