"""Prompts and targets as token ids: one begin token, no end, a boundary as sampling meets it (FAULTS 7, 8, 24, 29)."""

import json
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grpo_core.batch import Task
from grpo_core.config.sections import DataConfig, SftConfig, TargetConfig
from grpo_core.data.encoding import describe_prompt_changes, encode_prompts, encode_targets, find_turn_end
from grpo_core.data.prompts import make_tasks
from grpo_core.data.rows import load_rows
from grpo_core.model.loading import load_tokenizer
from grpo_core.schema import ConfigError
from grpo_core.training.sft_targets import build_target_rollouts

LETTERS = "abcdefghijklmnopqrstuvwxyz?:\n▁0123456789"


def make_tokenizer(before=(), after=(), scheme=None):
    """A tokenizer of single letters, which adds tokens to every text; `scheme`: as SentencePiece, with ▁ in front."""
    names = ["<pad>", "<s>", "</s>", *LETTERS, " "]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<pad>"))
    if scheme:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    else:
        tokenizer.decoder = decoders.Fuse()
    ids = [(name, names.index(name)) for name in ("<s>", "</s>")]
    if before or after:
        single = " ".join([*before, "$A", *after])
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


BOS, EOS = 1, 2
OPENS_TURN = "{% if add_generation_prompt %}:{% endif %}"
ROWS = [{"question": "ab"}, {"question": "abcdef"}]


@pytest.mark.parametrize("template", ["{question}", "<s>{question}", "<s><s>{question}"])
def test_fault_7_a_prompt_has_one_begin_token(template):
    tokenizer = make_tokenizer(before=["<s>"])
    tasks, _ = make_tasks(ROWS, DataConfig(template=template), tokenizer)
    assert [task.prompt_ids.count(BOS) for task in tasks] == [1, 1] and all(task.prompt_ids[0] == BOS for task in tasks)
    changes = describe_prompt_changes(tokenizer, DataConfig(template=template), tasks)
    assert len(changes) == (template != "{question}") and all("<s>" in change for change in changes)


def test_fault_7_a_prompt_does_not_end_with_the_end_of_sequence():
    tokenizer = make_tokenizer(before=["<s>"], after=["</s>"])
    assert tokenizer("ab")["input_ids"][-1] == EOS
    tasks, _ = make_tasks(ROWS, DataConfig(template="{question}"), tokenizer)
    assert all(EOS not in task.prompt_ids for task in tasks) and tokenizer.decode(tasks[0].prompt_ids[1:]) == "ab"
    (sentence,) = describe_prompt_changes(tokenizer, DataConfig(), tasks)
    assert "ends every text with </s>, which is left out" in sentence
    assert encode_prompts(tokenizer, ["ab</s>"], add_special_tokens=True)[0][-1] == EOS  # written by the user


def test_fault_7_a_chat_template_that_begins_twice_has_one_begin_token():
    tokenizer = make_tokenizer(before=["<s>"])
    tokenizer.chat_template = "<s>{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}" + OPENS_TURN
    config = DataConfig(prompt="chat", template="{question}")
    tasks, _ = make_tasks(ROWS, config, tokenizer)
    assert [task.prompt_ids.count(BOS) for task in tasks] == [1, 1]
    assert len(describe_prompt_changes(tokenizer, config, tasks)) == 1


@pytest.mark.parametrize("template, part", [
    ("{% for m in messages %}{{ m.content }}{% endfor %}" + OPENS_TURN, None),
    ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}" + OPENS_TURN, "leaves data.system out"),
    ("{% for m in messages %}{{ m.content }}{% endfor %}", "opens no turn of the assistant"),
    ("{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}" + OPENS_TURN, "writes the time into"),
])  # fmt: skip
def test_attack_a_chat_template_that_does_something_else_is_named(template, part):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    config = DataConfig(prompt="chat", template="{question}", system="be brief")
    tasks, _ = make_tasks(ROWS, config, tokenizer)
    sentences = describe_prompt_changes(tokenizer, config, tasks)
    assert [part in sentence for sentence in sentences] == ([] if part is None else [True])


def test_fault_7_an_ordinary_tokenizer_is_left_alone():
    tokenizer = load_tokenizer("builtin:tiny")
    texts = ["Question: a\n", "b"]
    assert encode_prompts(tokenizer, texts, add_special_tokens=True) == tokenizer(texts)["input_ids"]
    assert describe_prompt_changes(tokenizer, DataConfig(), [Task(0, texts[0], [1], {})]) == []


@pytest.mark.parametrize("template, end", {
    "{% for m in messages %}{{ m.content }}:{% endfor %}": LETTERS.index(":") + 3,  # as Gemma's <end_of_turn>
    "{% for m in messages %}{{ m.content }}</s>\n{% endfor %}": EOS, "{% for m in messages %}{{ m.content }}\n:{% endfor %}": None,
    "{{ messages[0].content }}:": None, "{{ raise_exception('no assistant') }}": None,
}.items())  # fmt: skip
def test_a_turn_of_the_assistant_ends_with_the_templates_own_token(template, end):
    tokenizer = make_tokenizer(before=["<s>"])
    tokenizer.chat_template = template
    ends = {EOS, LETTERS.index(":") + 3}
    assert find_turn_end(tokenizer, DataConfig(prompt="chat"), ends) == end
    assert find_turn_end(tokenizer, DataConfig(), ends) is None


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_fault_8_a_target_has_no_space_that_sampling_does_not_meet(scheme):
    """SentencePiece puts ▁ in front of a text; behind a prompt there is none."""
    tokenizer = make_tokenizer(before=["<s>"], scheme=scheme)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab", add_special_tokens=False)["input_ids"]) == ["▁", "a", "b"]
    tasks, _ = make_tasks([{"question": "ab", "answer": "c 4"}], DataConfig(template="{question}\n"), tokenizer)
    (target,) = encode_targets(tokenizer, tasks, ["c 4"])
    assert tokenizer.convert_ids_to_tokens(target) == ["c", "▁", "4"]
    assert tokenizer.decode(tasks[0].prompt_ids[1:] + target) == "ab\nc 4"
    config = SftConfig(targets=[TargetConfig("{answer}")])
    rollouts = build_target_rollouts(tasks, config, tokenizer, EOS, torch.device("cpu"))
    assert rollouts.completion_ids[0].tolist() == [*target, EOS]
    cut = replace(tasks[0], prompt="")  # a prompt whose text is not at hand, as after truncate_left
    assert encode_targets(tokenizer, [cut], ["c 4"]) in ([target], [tokenizer("c 4", add_special_tokens=False)["input_ids"]])


def test_fault_8_the_targets_of_an_ordinary_tokenizer_stay_as_they_were():
    tokenizer = load_tokenizer("builtin:tiny")
    texts = ["<think>1 + 2 = 3.</think>\n#### 3", "#### 4"]
    tasks = [Task(i, "Question: a?\n", [1], {}) for i in range(2)]
    assert encode_targets(tokenizer, tasks, texts) == tokenizer(texts, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("prompt", ["template", "chat"])
def test_fault_29_the_begin_token_stays_when_a_prompt_is_cut_on_the_left(prompt):
    tokenizer = make_tokenizer(before=["<s>"])
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    config = DataConfig(template="{question}", prompt=prompt, max_prompt_tokens=4, long_prompts="truncate_left")
    tasks, cut = make_tasks(ROWS, config, tokenizer)
    assert cut == 1 and tasks[1].prompt_ids == [BOS, *tokenizer("def", add_special_tokens=False)["input_ids"]]
    assert tasks[1].prompt == "<s>def" and len(tasks[0].prompt_ids) == 3
    without = make_tokenizer()
    tasks, _ = make_tasks(ROWS, replace(config, prompt="template"), without)
    assert without.decode(tasks[1].prompt_ids) == "cdef"
    tasks, _ = make_tasks(ROWS[1:], replace(config, prompt="template", max_prompt_tokens=1), tokenizer)
    assert tokenizer.decode(tasks[0].prompt_ids) == "f"


@pytest.mark.parametrize("value", ["\ud83d", "a\udc00b", ["a", "\ud83d"], {"a": {"b": "\ud83d"}}, {"\ud83d": 1}])
def test_fault_24_a_lone_surrogate_is_named_with_its_row_and_column(value, tmp_path):
    rows = [{"question": "a", "extra": "b"}, {"question": "a", "extra": value}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = load_rows(str(tmp_path / "rows.jsonl"), None, "train", None)
    with pytest.raises(ConfigError, match=r"row 2 of the data: column 'extra' has the lone surrogate '\\ud"):
        make_tasks(rows, DataConfig(template="{question}"), make_tokenizer())


def test_fault_24_a_lone_surrogate_in_the_template_is_named():
    with pytest.raises(ConfigError, match="data.template and data.system has the lone surrogate"):
        make_tasks(ROWS, DataConfig(template="{question}\udcff"), make_tokenizer())


@pytest.mark.parametrize("name", ["completions", "prompts"])
def test_fault_24_a_column_with_the_name_of_an_argument_is_refused_or_renamed(name):
    rows = [{"question": "a", name: "b"}]
    with pytest.raises(ConfigError, match=f"the data has a column '{name}', .* rename it"):
        make_tasks(rows, DataConfig(template="{question}"), make_tokenizer())
    tasks, _ = make_tasks(rows, DataConfig(template="{question}", columns={"other": name}), make_tokenizer())
    assert tasks[0].columns == {"question": "a", "other": "b"}
