"""A reward model gives every completion what plain transformers gives its conversation alone, and is refused where it is none."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, start_two_ranks, wait_for
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
)

from grpo_core.batch import Task
from grpo_core.commands.dry_run import describe_memory
from grpo_core.config.files import load
from grpo_core.config.sections import DataConfig, RewardConfig, RunConfig
from grpo_core.data.turns import add_completion
from grpo_core.model import reward_model
from grpo_core.model.policy import load_policy
from grpo_core.model.reward_model import check_reward_model, load_reward_model
from grpo_core.objective.rewards import REWARDS
from grpo_core.schema import ConfigError
from grpo_core.scoring.reward_call import attempt
from grpo_core.scoring.scoring import Reward, score

TINY = ROOT / "configs" / "tiny.yaml"
CHAT = "{% for message in messages %}<{{ message.role }}>{{ message.content }}|{% endfor %}"
SMALL = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
KINDS = {
    "qwen2": lambda **own: Qwen2Config(**{**SMALL, "num_key_value_heads": 2, "pad_token_id": 0, **own}),
    "llama": lambda **own: LlamaConfig(**{**SMALL, "num_key_value_heads": 2, "pad_token_id": None, **own}),
    "gpt2": lambda **own: GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, bos_token_id=0, eos_token_id=0, n_positions=256, **own),
    "bert": lambda **own: BertConfig(**{**SMALL, **own}),
}  # fmt: skip
TEXTS = ["The answer is 4.", "4", "so #### 3 and then some more words to make it long", "", "no", "x" * 40]


def save_model(folder, kind="qwen2", chat=CHAT, labels=1, **own):
    """A reward model with random weights in a folder."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "grpo_core" / "builtin" / "tiny")
    torch.manual_seed(5)
    config = KINDS[kind](num_labels=labels, **{"vocab_size": len(tokenizer), **own} if kind != "gpt2" else own)
    config.vocab_size = len(tokenizer)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    return folder


def configure(folder, **data):
    data = DataConfig(**{"template": "{question}\n", **data})
    return RunConfig(rewards=[RewardConfig("reward_model", args={"path": str(folder)})], data=data)


def load_here(folder, **data):
    return load_reward_model(configure(folder, **data), torch.float32, torch.device("cpu"))


def plain_logits(folder, texts, special):
    """What transformers computes of every text alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return [float(model(**tokenizer(text, return_tensors="pt", add_special_tokens=special)).logits) for text in texts]


def make_tasks(questions):
    return [Task(i, f"{question}\n", [5], {"question": question}) for i, question in enumerate(questions)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_is_that_of_plain_transformers_row_by_row(tmp_path, kind):
    save_model(tmp_path, kind)
    tasks, texts = make_tasks(["What is 2 + 2?", "Why?"]), [*TEXTS[:3], *TEXTS[3:]]
    scores = score([Reward("reward_model", 1.0, load_here(tmp_path))], tasks, texts, 3)
    chats = [f"<user>{task.prompt}|<assistant>{text}|" for task, text in zip([tasks[0]] * 3 + [tasks[1]] * 3, texts, strict=True)]
    expected = plain_logits(tmp_path, chats, special=False)
    assert scores.failures == () and max(expected) - min(expected) > 0.05
    assert scores.rewards.flatten().tolist() == pytest.approx(expected, abs=2e-5)


def test_padding_is_no_token_of_a_row_where_the_model_has_no_padding_token(tmp_path):
    function, rows = load_here(save_model(tmp_path, "llama")), [[5, 0, 1], [5, 6, 7, 8, 0]]
    alone = [function._compute([row])[0] for row in rows]
    assert function._compute(rows) == pytest.approx(alone, abs=2e-5) and function.model.config.pad_token_id is None
    assert alone == pytest.approx([float(function.model(torch.tensor([row])).logits) for row in rows], abs=2e-5)


def test_without_a_chat_template_it_sees_the_prompt_and_the_completion(tmp_path):
    save_model(tmp_path, "bert", chat=None)
    tasks = make_tasks(["What is 2 + 2?"])
    values = score([Reward("reward_model", 1.0, load_here(tmp_path))], tasks, TEXTS, 6).rewards.flatten().tolist()
    assert values == pytest.approx(plain_logits(tmp_path, [tasks[0].prompt + text for text in TEXTS], special=True), abs=2e-5)


def test_the_system_turn_of_the_policy_is_the_reward_models_too(tmp_path):
    save_model(tmp_path)
    task = replace(make_tasks(["Why?"])[0], prompt="<|im_start|>what the policy's template makes of it")
    data = {"prompt": "chat", "system": "Be brief.", "template": "Q: {question}"}
    values = score([Reward("reward_model", 1.0, load_here(tmp_path, **data))], [task], ["yes", "no"], 2).rewards.tolist()[0]
    chats = [f"<system>Be brief.|<user>Q: Why?|<assistant>{text}|" for text in ("yes", "no")]
    assert values == pytest.approx(plain_logits(tmp_path, chats, special=False), abs=2e-5)


def test_a_completion_is_a_turn_of_the_assistant_or_the_rest_of_one():
    turns = [{"role": "user", "content": "a"}]
    assert add_completion(turns, "b") == [*turns, {"role": "assistant", "content": "b"}]
    assert add_completion([*turns, {"role": "assistant", "content": "b"}], "c") == [*turns, {"role": "assistant", "content": "bc"}]


def test_a_value_depends_on_its_own_group_alone(tmp_path, monkeypatch):
    function = load_here(save_model(tmp_path))
    sizes, compute = [], type(function)._compute
    monkeypatch.setattr(type(function), "_compute", lambda self, rows: sizes.append(len(rows)) or compute(self, rows))

    def values(questions, texts):
        columns = {"prompts": [f"{q}\n" for q in questions], "question": questions}
        return attempt(function, texts, columns).values

    first, second = values(["a"] * 3, TEXTS[:3]), values(["b"] * 3, TEXTS[3:])
    assert values(["a"] * 3 + ["b"] * 3, TEXTS) == first + second and sizes == [3, 3, 3, 3]  # bitwise
    sizes.clear()
    monkeypatch.setattr(reward_model, "MAX_TOKENS", 60)
    assert values(["a"] * 3, TEXTS[:3]) == pytest.approx(first, abs=2e-5) and sizes == [2, 1]


def test_a_conversation_beyond_the_positions_has_no_value_and_the_others_keep_theirs(tmp_path):
    function = load_here(save_model(tmp_path, max_position_embeddings=48))
    columns = {"prompts": ["a\n"] * 3, "question": ["a"] * 3}
    outcome = attempt(function, ["one", "x y " * 120, "two"], columns)
    assert outcome.values[1] is None and not any(outcome.failed)
    assert [outcome.values[0], outcome.values[2]] == attempt(function, ["one", "two"], {k: v[:2] for k, v in columns.items()}).values


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"labels": 2}, "which has 2 labels; a reward model is a sequence classification model with one label"),
        ({"max_position_embeddings": 200}, "which takes 200 tokens, but a prompt of 27 tokens and sampling.max_new_tokens 256 are together more; lower one of them"),
        ({"chat": "{{ raise_exception('no') }}"}, "whose chat template cannot be filled in"),
    ],
)  # fmt: skip
def test_what_is_no_reward_model_for_the_run_is_refused_before_weights_load(tmp_path, change, sentence):
    config = configure(save_model(tmp_path, **change))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"^rewards\[0\]\.args\.path is ") as caught:
        check_reward_model(config, make_tasks(["What is 2 + 2?", "Why?"]))
    assert sentence in str(caught.value) and "model.path" not in str(caught.value)


def test_a_policys_model_and_one_without_a_head_are_no_reward_models(tmp_path):
    with pytest.raises(ConfigError, match=r"is 'builtin:tiny', which has 2 labels"):
        check_reward_model(configure("builtin:tiny"), [])
    save_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "score" not in k}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"^rewards\[0\].args.path is .* its files lack the weight score.weight"):
        load_here(tmp_path)
    with pytest.raises(ConfigError, match=r"^rewards\[0\].args.path is .*there is no folder"):
        check_reward_model(configure(tmp_path / "none" / "such"), [])


def test_a_chat_needs_a_chat_template(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer has no chat template, but data.prompt is chat"):
        check_reward_model(configure(save_model(tmp_path, chat=None), prompt="chat"), [])


def test_the_configuration_names_a_path_and_correctness_is_no_reward_model():
    with pytest.raises(ConfigError, match=r"^rewards\[0\].args.path is not set, and the reward reward_model needs it$"):
        load(TINY, ["rewards=reward_model"])
    with pytest.raises(ConfigError, match=r"^evaluation.reward is 'reward_model', which needs the argument path"):
        load(TINY, ["evaluation.reward=reward_model"])
    with pytest.raises(ConfigError, match=r"^unknown reward 'org/model'; the reward of a model is \{name: reward_model, args: \{path: org/model\}\}"):
        load(TINY, ["rewards=org/model"])
    assert load(TINY, ["rewards={name: reward_model, args: {path: some/model}}"]).rewards[0].args == {"path": "some/model"}
    outcome = attempt(REWARDS.build("reward_model", {"path": "some/model"}), ["a"], {"prompts": ["b"]})
    assert "computes in a run" in outcome.why


def test_the_dry_run_counts_its_memory(tmp_path):
    function = load_here(save_model(tmp_path))
    size = sum(p.numel() for p in AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tmp_path)).parameters())
    config = load(TINY)
    policy = load_policy(config.model, config.lora, dtype=torch.float32, temperature=1.0)
    memory = describe_memory(config, policy, make_tasks(["a"]), 1, rewards=[Reward("reward_model", 1.0, function)])
    assert f"{size * 4 / 1e6:.2f} MB weights of the reward model ({size:,} parameters)" in memory


SHORT = ["evaluation.num_tasks=0", "data.limit=200", "trainer.completions_per_step=16", "sampling.max_new_tokens=16", "log.every=1", "engine.schedule=constant"]


def read(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.slow
def test_a_run_learns_from_it_and_is_the_same_when_resumed_replayed_and_on_two_ranks(tmp_path, here, environment):
    path = save_model(tmp_path / "rm")
    words = ["--config", TINY, *SHORT, f"rewards={{name: reward_model, args: {{path: {path}}}}}", f"output_dir={tmp_path}"]
    done = here("train", *words, "name=whole", "trainer.num_steps=3", "debug.dump_batches=1")
    assert done.returncode == 0, done.stderr
    whole = read(tmp_path / "whole")
    assert all(row["rewards/reward_model_std"] > 0 and row["grad_norm"] > 0 for row in whole)
    texts = [row["text"] for row in read(tmp_path / "whole", "completions.jsonl")]
    assert len(texts) == 48
    for steps, more in ((2, []), (3, ["resume=auto"])):
        assert here("train", *words, "name=parts", f"trainer.num_steps={steps}", *more).returncode == 0
    assert [row["reward"] for row in read(tmp_path / "parts")] == [row["reward"] for row in whole]
    assert here("replay", tmp_path / "whole" / "batches" / "step-000001").returncode == 0
    processes = start_two_ranks("-m", "grpo_core", "train", *words, "name=two", "trainer.num_steps=1", environment=environment)
    codes, written = wait_for(processes)
    assert codes == [0, 0], written
    two = read(tmp_path / "two", "completions.jsonl")
    assert [row["text"] for row in two] == texts[:16]
    assert [row["reward"] for row in two] == [row["reward"] for row in read(tmp_path / "whole", "completions.jsonl")[:16]]
    shutil.rmtree(tmp_path / "two")
