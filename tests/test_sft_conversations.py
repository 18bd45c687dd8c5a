"""Whole conversations as targets of sft: the loss is on the tokens of the assistant's turns and on nothing else."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_encoding import EOS, make_tokenizer
from test_run import read
from test_sft import configured

from grpo_core.batch import Task
from grpo_core.config.sections import DataConfig, LoraConfig, ModelConfig
from grpo_core.data.assistant_tokens import encode_conversation
from grpo_core.data.messages import BadRow
from grpo_core.model.loading import load_tokenizer
from grpo_core.model.memory import Budgets
from grpo_core.model.packing import Budget
from grpo_core.model.policy import load_policy
from grpo_core.schema import ConfigError
from grpo_core.training import sft
from grpo_core.training.sft_conversations import build_conversation_rollouts

CONFIG = DataConfig(prompt="chat", template="{messages}")
TINY = load_tokenizer("builtin:tiny")
END = TINY.eos_token_id


def turns(*contents):
    """A conversation of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def marked_texts(tokenizer, ids, marks):
    """The texts of the runs of trained tokens, and that of all tokens."""
    runs = []
    for i, mark in enumerate(marks):
        if mark:
            runs = [*runs, []] if not i or not marks[i - 1] else runs
            runs[-1].append(ids[i])
    return [tokenizer.decode(run) for run in runs], tokenizer.decode(ids)


def test_the_assistants_turns_are_trained_with_their_ends():
    conversation = [{"role": "system", "content": "Be brief."}, *turns("1 + 1?", "#### 2", "2 + 3?", "#### 5", "and?")]
    ids, marks = encode_conversation(TINY, conversation, CONFIG, {END}, END)
    trained, text = marked_texts(TINY, ids, marks)
    assert trained == ["#### 2<|end|>", "#### 5<|end|>"]
    assert text == "Be brief.\nQuestion: 1 + 1?\n#### 2<|end|>\nQuestion: 2 + 3?\n#### 5<|end|>"
    assert ids == TINY(text, add_special_tokens=False)["input_ids"]


GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}ENDS{% endgeneration %}ENDED{{ '\n' }}"
    "{% else %}U:{{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


@pytest.mark.parametrize("inside, outside", [("<|end|>", ""), ("", "<|end|>"), ("", "<|endoftext|>"), ("", "")])
def test_a_template_marks_the_tokens_itself(inside, outside):
    """Its mark may leave out the end of a turn, which is trained all the same."""
    tokenizer = load_tokenizer("builtin:tiny")
    tokenizer.chat_template = GENERATION.replace("ENDS", inside).replace("ENDED", outside)
    ids, marks = encode_conversation(tokenizer, turns("a", "b", "c", "d"), CONFIG, {END, TINY.pad_token_id}, END)
    trained, text = marked_texts(tokenizer, ids, marks)
    end = inside or outside
    assert trained == [f"b{end}", f"d{end or '<|end|>'}"] and text == f"U:a\nA:b{end}\nU:c\nA:d{end or '<|end|>'}"


def test_where_a_template_ends_no_turn_the_last_turn_gets_an_end():
    tokenizer = load_tokenizer("builtin:tiny")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}.\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    ids, marks = encode_conversation(tokenizer, turns("x", "y", "z", "w"), CONFIG, {END}, END)
    trained, text = marked_texts(tokenizer, ids, marks)
    assert trained == ["y", "w<|end|>"] and text == "u:x.\na:y.\nu:z.\na:w<|end|>"


def test_a_turn_is_encoded_as_it_follows_its_prompt():
    """SentencePiece puts ▁ in front of a text; inside a conversation there is none."""
    tokenizer = make_tokenizer(before=["<s>"], scheme="first")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% else %}:{% endif %}{% endfor %}"
    ids, marks = encode_conversation(tokenizer, turns("ab", "c 4", "d", "e"), CONFIG, {EOS}, EOS)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *"ab:c▁4", "</s>", *"d:e", "</s>"]
    assert [token for token, mark in zip(tokenizer.convert_ids_to_tokens(ids), marks, strict=True) if mark] == [*"c▁4", "</s>", "e", "</s>"]


THINKING = (  # as templates that take the reasoning out of earlier turns
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}A:{{ m.content.split('</think>')[-1] }}<|end|>\n"
    "{% else %}{{ m.role[0] | upper }}:{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


def test_a_template_whose_prefixes_do_not_agree_is_refused():
    tokenizer = load_tokenizer("builtin:tiny")
    tokenizer.chat_template = THINKING
    thought = "<think>so</think>b"
    ids, marks = encode_conversation(tokenizer, turns("a", thought), CONFIG, {END}, END)
    assert marked_texts(tokenizer, ids, marks)[0] == [f"{thought}<|end|>"]
    with pytest.raises(BadRow, match=r"message 4\) whose tokens cannot be found, .*set data.chat_template to one with {% generation %}"):
        encode_conversation(tokenizer, turns("a", thought, "c", "d"), CONFIG, {END}, END)
    tokenizer.chat_template = THINKING.replace("A:{% endif %}", "A:<think>{% endif %}")  # opens what the turn has not
    encode_conversation(tokenizer, turns("a", thought), CONFIG, {END}, END)
    with pytest.raises(BadRow, match=r"message 2\) whose tokens cannot be found"):
        encode_conversation(tokenizer, turns("a", "b"), CONFIG, {END}, END)


def chat_template(end, opening="A:", default=""):
    """A template with `end` behind the turns."""
    turn = "{% for m in messages %}{{ m.role[0] | upper }}:{{ m.content }}" + end + "\n{% endfor %}"
    return default + turn + "{% if add_generation_prompt %}" + opening + "{% endif %}"


@pytest.mark.parametrize("end", ["<|end|>", "."])
@pytest.mark.parametrize("default", ["", "S:Help.\n"])
def test_a_greeting_is_trained_as_the_other_turns(end, default):
    """No conversation is in front of a first turn of the assistant, which `transformers` would not render."""
    tokenizer = load_tokenizer("builtin:tiny")
    tokenizer.chat_template = chat_template(end, default=default)
    greeting = [{"role": "assistant", "content": "Hi"}, *turns("1 + 1?", "2")]
    ids, marks = encode_conversation(tokenizer, greeting, CONFIG, {END}, END)
    trained, text = marked_texts(tokenizer, ids, marks)
    assert trained == [f"Hi{end if end == '<|end|>' else ''}", "2<|end|>"]
    assert text == f"{default}A:Hi{end}\nU:1 + 1?{end}\nA:2<|end|>"


def test_the_first_token_of_a_text_is_not_trained():
    """No token is in front of it that predicts it."""
    tokenizer = load_tokenizer("builtin:tiny")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    ids, marks = encode_conversation(tokenizer, [{"role": "assistant", "content": "Hi all"}, *turns("1 + 1?", "2")], CONFIG, {END}, END)
    assert marked_texts(tokenizer, ids, marks) == (["i all<|end|>", "2<|end|>"], "Hi all<|end|>1 + 1?<|end|>2<|end|>")


def test_a_greeting_that_cannot_be_found_names_the_remedy():
    tokenizer = load_tokenizer("builtin:tiny")
    greeting = [{"role": "assistant", "content": "Hi"}, *turns("1 + 1?", "2")]
    for template, reason in (
        (chat_template(".", opening="A:<think>"), "renders it in another way at the beginning of a conversation"),
        ("{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}{{ raise_exception('no user') }}{% endif %}" + chat_template("."), r"refuses the messages up to it \(TemplateError: no user.*\)"),
    ):  # fmt: skip
        tokenizer.chat_template = template
        with pytest.raises(BadRow, match=rf"message 1\) whose tokens cannot be found, because the model's chat template {reason}; set data.chat_template to one with"):
            encode_conversation(tokenizer, greeting, CONFIG, {END}, END)


@pytest.mark.parametrize("end, answers, trained", [
    (".", ["", "b"], ["b<|end|>"]),
    (".", ["b", ""], ["b", "<|end|>"]),
    (".", ["2<|end|>3", "4<|end|>5"], ["2<|end|>3", "4<|end|>5<|end|>"]),
    (".A:b", ["b", "b"], ["b", "b<|end|>"]),
    ("<|end|>", ["", ""], ["<|end|>", "<|end|>"]),
    ("<|end|>", ["2<|end|>3", "b"], ["2<|end|>3<|end|>", "b<|end|>"]),
])  # fmt: skip
def test_only_what_the_assistant_writes_is_trained(end, answers, trained):
    """Not the text with which a template ends turns, and all of an answer that has an end of sequence in it."""
    tokenizer = load_tokenizer("builtin:tiny")
    tokenizer.chat_template = chat_template(end)
    first, second = answers
    ids, marks = encode_conversation(tokenizer, turns("x", first, "y", second), CONFIG, {END}, END)
    last = f"{second}<|end|>"
    assert marked_texts(tokenizer, ids, marks) == (trained, f"U:x{end}\nA:{first}{end}\nU:y{end}\nA:{last}")


def test_the_loss_is_the_cross_entropy_of_the_assistants_tokens():
    policy = load_policy(ModelConfig(), LoraConfig(r=0), dtype=torch.float32, temperature=1.0)
    conversations = [turns("1 + 1?", "#### 2", "2 + 3?", "#### 5"), turns("Ada has 2 pens?", "<think>2 = 2.</think>\n#### 2")]
    tasks = [Task(i, "p", [1], {"messages": messages}, seed=(0, 0, i)) for i, messages in enumerate(conversations)]

    def make_targets(tasks):
        return build_conversation_rollouts(tasks, "messages", CONFIG, TINY, {END}, END, torch.device("cpu"))

    run = SimpleNamespace(policy=policy, budgets=Budgets(Budget(100), Budget(150)))
    result = sft.compute_held_out_loss(run, make_targets, tasks)
    nats, count = 0.0, 0
    for messages in conversations:
        text = "".join(f"Question: {m['content']}\n" if m["role"] == "user" else f"{m['content']}<|end|>\n" for m in messages)[:-1]
        ids = TINY(text, add_special_tokens=False)["input_ids"]
        labels, position = [-100] * len(ids), 0
        for message in messages:
            piece = TINY(f"Question: {message['content']}\n" if message["role"] == "user" else f"{message['content']}<|end|>", add_special_tokens=False)["input_ids"]
            if message["role"] == "assistant":
                labels[position : position + len(piece)] = piece
                position += 1  # the line end behind it
            position += len(piece)
        assert [x for x in labels if x != -100] == [i for i, x in zip(ids, labels, strict=True) if x != -100]
        number = sum(label != -100 for label in labels)
        nats += policy.causal_lm(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item() * number
        count += number
    assert result["tokens"] == count and result["loss"] == pytest.approx(nats / count, rel=1e-5)


def write(path, conversations):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return path


def words(path):
    return [f"data.path={path}", "data.prompt=chat", "data.template={messages}", "trainer.num_steps=2", "trainer.completions_per_step=4"]


def test_a_run_on_conversations_learns_them(tmp_path, group, monkeypatch):
    batches, update = [], sft.update_policy
    monkeypatch.setattr(sft, "update_policy", lambda run, batch, *rest: batches.append(batch) or update(run, batch, *rest))
    rows = [turns(f"What is {i} + 1?", f"#### {i + 1}", "And one more?", f"#### {i + 2}") for i in range(20)]
    rows.append([*turns("What is 1 + 1?", "#### 2"), {"role": "user", "content": "Thanks."}])
    path = write(tmp_path / "chats.jsonl", rows)
    steps = ["trainer.num_steps=6", "evaluation.every=6", "engine.learning_rate=0.003", "engine.warmup_steps=0", "evaluation.num_tasks=4", "data.max_unjudged=1"]
    adapter = sft.run_sft(configured(tmp_path, *words(path), *steps))
    first, *_, last = read(adapter.parent / "evaluation.jsonl")
    assert last["loss"] < first["loss"] - 0.1
    metrics = read(adapter.parent / "metrics.jsonl")
    assert all(0 < row["tokens"] < 4 * 2 * 8 for row in metrics)  # 4 conversations, 2 turns, #### and a number or two
    for batch, row in zip(batches, metrics, strict=True):
        given = batch.rollouts.completion_mask & ~batch.loss_mask
        assert batch.loss_mask.sum() == row["tokens"] and "And one more?" in TINY.decode(batch.rollouts.completion_ids[given])


@pytest.mark.parametrize("bad, given, message", [
    (turns("Hello?"), [], "row 3 of the data: column 'messages' has no turn of the assistant to train"),
    (turns("a", "b" * 3000), [], r"row \d of the (evaluation )?data, .*: the conversation has 3,0\d\d tokens, but the model has only 1024 positions"),
    (turns("a" * 300, "b"), ["data.long_prompts=truncate_left", "data.max_prompt_tokens=64"], "data.long_prompts is truncate_left, but sft trains whole conversations"),
])  # fmt: skip
def test_a_conversation_that_cannot_be_trained_is_one_sentence(tmp_path, group, monkeypatch, bad, given, message):
    monkeypatch.setattr(sft, "load_policy", None)
    good = [turns("a", "#### 2") for _ in range(7)]
    path = write(tmp_path / "chats.jsonl", [*good[:2], bad, *good[2:]])
    held_out = write(tmp_path / "held_out.jsonl", good)
    with pytest.raises(ConfigError, match=message):
        sft.run_sft(configured(tmp_path, *words(path), f"data.eval_path={held_out}", *given))


def test_rows_whose_tokens_cannot_be_found_are_left_out_where_asked(tmp_path, group, capsys):
    (tmp_path / "thinking.jinja").write_text(THINKING)
    bad = turns("1 + 1?", "<think>so</think>#### 2", "and?", "#### 3")
    path = write(tmp_path / "chats.jsonl", [bad, *(turns("1 + 1?", "#### 2") for _ in range(9))])
    held_out = write(tmp_path / "held_out.jsonl", [turns("1 + 1?", "#### 2")] * 4)
    given = [*words(path), f"data.eval_path={held_out}", f"data.chat_template={tmp_path / 'thinking.jinja'}"]
    with pytest.raises(ConfigError, match=r"row 1 of the data: column 'messages' has a turn .* whose tokens cannot be found.*data.bad_rows: drop"):
        sft.run_sft(configured(tmp_path, *given))
    sft.run_sft(configured(tmp_path, *given, "data.bad_rows=drop", "trainer.num_steps=1"))
    assert "1 row is left out of 10 rows, because data.bad_rows is drop: row 1 of the data: column 'messages' has a turn" in capsys.readouterr().out


def test_rows_without_an_answer_are_left_out_where_asked(tmp_path, group, capsys):
    path = write(tmp_path / "chats.jsonl", [turns("Hello?"), *(turns("1 + 1?", "#### 2") for _ in range(9))])
    held_out = write(tmp_path / "held_out.jsonl", [turns("1 + 1?", "#### 2")] * 4)
    sft.run_sft(configured(tmp_path, *words(path), f"data.eval_path={held_out}", "data.bad_rows=drop"))
    assert "1 row is left out of 10 rows, because data.bad_rows is drop: row 1 of the data: column 'messages' has no turn" in capsys.readouterr().out


TOOLS = (
    "{% for m in messages %}{{ m.role[0] | upper }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


def test_the_longest_conversation_begins_with_a_first_turn_that_calls_a_tool(tmp_path, group, capsys, monkeypatch):
    """The tokens of a call are behind the content, so that only the end of the turn tells what the assistant wrote."""
    budgets, build_run = [], sft.build_run
    monkeypatch.setattr(sft, "build_run", lambda *given: budgets.append(given[-1]) or build_run(*given))
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]}
    rows = [[{"role": "user", "content": "1 + 2?"}, call, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "#### 3"}]] * 8
    (tmp_path / "tools.jinja").write_text(TOOLS)
    path = write(tmp_path / "chats.jsonl", rows)
    template = f"data.chat_template={tmp_path / 'tools.jinja'}"
    sft.run_sft(configured(tmp_path, *words(path), template, f"data.eval_path={path}", "trainer.num_steps=1"))
    tokenizer = load_tokenizer("builtin:tiny")
    tokenizer.chat_template = TOOLS
    ids, marks = encode_conversation(tokenizer, [*rows[0][:1], {**call, "content": ""}, *rows[0][2:]], CONFIG, {END}, END)
    longest = len(ids) - marks.index(True)
    assert longest > 30 and budgets == [longest]
    assert f"up to {longest} of them from the assistant's first turn on" in capsys.readouterr().out
