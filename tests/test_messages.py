"""Prompts that are lists of messages, columns by paths, and rows that cannot be tasks."""

import json
from dataclasses import replace

import pytest
from fakes import Alphabet

from grpo_core.config.sections import DataConfig
from grpo_core.data.columns import MISSING, read_path, rename
from grpo_core.data.messages import read_conversation, split_last_turn
from grpo_core.data.prompts import encode_teacher_prompts, make_tasks
from grpo_core.data.rows import Rows
from grpo_core.data.turns import add_completion, describe_dropped_turns, list_turns, show_prompt
from grpo_core.model.loading import load_tokenizer
from grpo_core.model.new_model import CHAT_TEMPLATE, new_tokenizer
from grpo_core.schema import ConfigError

TINY = load_tokenizer("builtin:tiny")
MARKED = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
CHAT = DataConfig(prompt="chat", template="{messages}")


def turn(role, content):
    return {"role": role, "content": content}


USER, SYSTEM, ANSWER = turn("user", "2 + 3?"), turn("system", "Be brief."), turn("assistant", "#### 5")


def marked():
    tokenizer = load_tokenizer("builtin:tiny")
    tokenizer.chat_template = MARKED
    return tokenizer


def prompts(conversations, tokenizer=None, notes=None, **settings):
    """The tasks of rows with these conversations."""
    config = DataConfig(**{"prompt": "chat", "template": "{messages}", **settings})
    return make_tasks([{"messages": value} for value in conversations], config, tokenizer or marked(), notes)[0]


# --- conversations -------------------------------------------------------------------------------------------------


def test_a_conversation_is_a_prompt_with_its_system_and_few_shot_turns():
    few_shot = [SYSTEM, turn("user", "1 + 1?"), turn("assistant", "#### 2"), USER]
    first, second = prompts([few_shot, [USER]])
    assert first.prompt == "<system>Be brief.<user>1 + 1?<assistant>#### 2<user>2 + 3?<assistant>"
    assert second.prompt == "<user>2 + 3?<assistant>"
    assert first.prompt_ids == TINY(first.prompt, add_special_tokens=False)["input_ids"]
    assert first.columns == {"messages": few_shot}


def test_parts_of_type_text_are_joined_and_keys_without_a_value_do_not_reach_the_template():
    """A Parquet file has every key in every message, and None where a row has none."""
    parts = [{"type": "text", "text": "2 +", "image": None}, {"type": "text", "text": " 3?", "image": None}]
    tokenizer = load_tokenizer("builtin:tiny")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% if 'name' in m %}named{% endif %}{% endfor %}"
    message = {"role": "user", "content": parts, "name": None}
    (task,) = prompts([[message]], tokenizer)
    assert task.prompt == "2 + 3?" and read_conversation([message]) == [USER]
    assert read_conversation([{**USER, "name": "Ada"}]) == [{**USER, "name": "Ada"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    assert read_conversation([call]) == [{**call, "content": ""}]


@pytest.mark.parametrize("last_turn, prompt, columns", [
    ("gold", "<user>2 + 3?<assistant>", {"answer": "#### 5"}),
    ("drop", "<user>2 + 3?<assistant>", {}),
    ("continue", "<user>2 + 3?<assistant>#### 5", {}),
])  # fmt: skip
def test_the_last_turn_of_the_assistant(last_turn, prompt, columns):
    (task,) = prompts([[USER, ANSWER]], last_turn=last_turn)
    assert task.prompt == prompt and task.columns == {"messages": [USER, ANSWER], **columns}


def test_only_a_gold_turn_is_returned():
    for last_turn, gold, count in (("gold", "#### 5", 1), ("drop", None, 1), ("continue", None, 2)):
        messages, text = split_last_turn([USER, ANSWER], last_turn)
        assert (len(messages), text) == (count, gold) and split_last_turn([USER], last_turn) == ([USER], None)


def test_continue_opens_a_turn_where_the_last_is_the_users():
    tasks = prompts([[USER], [USER, turn("assistant", "The sum is ")]], TINY, last_turn="continue")
    assert [task.prompt for task in tasks] == ["Question: 2 + 3?\n", "Question: 2 + 3?\nThe sum is "]


def test_a_gold_answer_is_null_in_rows_without_one_and_an_own_column_comes_first():
    with_gold, without = prompts([[USER, ANSWER], [USER]])
    assert with_gold.columns["answer"] == "#### 5" and without.columns["answer"] is None
    rows = [{"messages": [USER, ANSWER], "answer": "7"}]
    (task,) = make_tasks(rows, CHAT, marked())[0]
    assert task.columns["answer"] == "7" and "5" not in task.prompt


def test_data_system_is_the_system_turn_of_conversations_without_one():
    own, given = prompts([[SYSTEM, USER], [USER]], system="Think.")
    assert own.prompt == "<system>Be brief.<user>2 + 3?<assistant>"
    assert given.prompt == "<system>Think.<user>2 + 3?<assistant>"


def test_the_prompt_of_a_conversation_is_that_of_the_same_text():
    (chat,) = prompts([[USER]], TINY)
    (text,), _ = make_tasks([{"question": "2 + 3?"}], DataConfig(), TINY)
    assert (chat.prompt, chat.prompt_ids) == (text.prompt, text.prompt_ids)


def test_a_teacher_sees_the_last_turn_of_the_user_in_its_own_template():
    (task,) = encode_teacher_prompts(prompts([[SYSTEM, USER, ANSWER]]), "{prompt} It is {answer}.", CHAT, marked())
    assert TINY.decode(task.teacher_prompt_ids) == "<system>Be brief.<user>2 + 3? It is #### 5.<assistant>"


@pytest.mark.parametrize("row, settings, message", [
    ({"messages": [USER]}, {"prompt": "template"}, "data.prompt is template, but the column 'messages' holds messages.*set data.prompt to chat"),
    ({"messages": [USER]}, {"template": "{question}"}, r"has the columns messages; set data.template='\{messages\}' and data.prompt=chat"),
    ({"messages": [{"from": "human", "value": "2 + 3?"}]}, {}, "column 'messages', which data.template uses, is a list with the keys from, value; messages have role and content"),
    ({"conversations": [{"from": "human", "value": "2 + 3?"}]}, {"template": "{question}"}, "has the columns conversations; for conversations, 'conversations' is a list with the keys from, value; .*write from as role .human is user.*set data.template='{conversations}'"),
    ({"messages": [USER]}, {"template": "Q: {messages}"}, r"column 'messages' holds messages, which data.template may only use alone, as \{messages\}"),
])  # fmt: skip
def test_the_key_that_is_missing_for_messages_is_named(row, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_tasks([row], DataConfig(**{"prompt": "chat", "template": "{messages}", **settings}), marked())


def test_a_null_message_in_the_first_row_is_one_bad_row():
    rows = [[USER, None], [USER], [USER, ANSWER]]
    with pytest.raises(ConfigError, match="row 1 of the data: column 'messages' has null as message 2"):
        prompts(rows)
    notes = []
    assert [task.index for task in prompts(rows, notes=notes, bad_rows="drop")] == [1, 2]
    assert "1 row is left out of 3 rows" in notes[0]


def test_messages_need_a_chat_template():
    with pytest.raises(ConfigError, match="has no chat template; set data.chat_template to a Jinja file$"):
        make_tasks([{"messages": [USER]}], CHAT, Alphabet())


def test_the_built_in_policy_and_a_new_one_have_the_same_chat_template():
    assert TINY.chat_template == CHAT_TEMPLATE == new_tokenizer(["a b"], 300).chat_template
    text = TINY.apply_chat_template([SYSTEM, USER, ANSWER, USER], tokenize=False, add_generation_prompt=True)
    assert text == "Be brief.\nQuestion: 2 + 3?\n#### 5<|end|>\nQuestion: 2 + 3?\n"


# --- rows that cannot be tasks -------------------------------------------------------------------------------------

BAD = {
    "no user": ([SYSTEM], "column 'messages' has no turn of the user"),
    "no user but an answer": ([ANSWER], "column 'messages' has no turn of the user"),
    "empty": ([], "column 'messages' is an empty list; it must be a list of messages"),
    "null": (None, "column 'messages' is null; it must be a list of messages"),
    "text": ("2 + 3.", "column 'messages' is '2 . 3.'; it must be a list of messages"),
    "image": ([turn("user", [{"type": "image", "image": "a.png"}])], "has a part of type 'image' in message 1; only parts of type text"),
    "no content": ([USER, turn("user", None)], "has no content in message 2"),
    "number": ([turn("user", 5)], "has the content 5 in message 1"),
    "two answers": ([USER, ANSWER, ANSWER], "ends with two turns of the assistant"),
    "role": ([USER, turn("tool", "5")], "is refused by the model's chat template: TemplateError: the roles are system, user and assistant, not tool"),
    "null message": ([USER, None, USER], "column 'messages' has null as message 2; a message has role and content"),
    "message without role": ([{"content": "a"}, USER], "column 'messages' has {'content': 'a'} as message 1; a message has"),
    "other keys": ([{"from": "human", "value": "a"}], "column 'messages' is a list with the keys from, value; .*write from as role"),
    "surrogate": ([turn("user", "\ud83d")], "column 'messages' has the lone surrogate"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_or_left_out_and_counted(name):
    value, message = BAD[name]
    rows = Rows([{"messages": [USER]}, {"messages": value}, {"messages": [USER]}], [3, 6, 9], "rows.jsonl")
    with pytest.raises(ConfigError, match=f"rows.jsonl, row 7 of the data: .*{message}.*data.bad_rows: drop"):
        make_tasks(rows, CHAT, TINY)
    notes = []
    tasks, _ = make_tasks(rows, DataConfig(prompt="chat", template="{messages}", bad_rows="drop"), TINY, notes)
    assert [task.index for task in tasks] == [3, 9]
    (note,) = notes
    assert note.startswith("1 row is left out of 3 rows, because data.bad_rows is drop: rows.jsonl, row 7 of the data: ")


def test_rows_of_text_are_left_out_alike():
    rows = [{"question": "a"}, {"question": None}, {"question": ""}, {"question": "b\ud83d"}, {"question": "zzz"}]
    notes = []
    tasks, _ = make_tasks(rows, DataConfig(template="{question}", bad_rows="drop"), Alphabet(), notes)
    assert [task.index for task in tasks] == [0]
    assert "4 rows are left out of 5 rows" in notes[0] and "row 2 of the data: column 'question'" in notes[0]
    assert "row 3 of the data: the prompt is empty" in notes[0]


def test_data_of_bad_rows_alone_is_refused():
    with pytest.raises(ConfigError, match="data.bad_rows is drop, and no row is left; row 1 of the data: column 'messages'"):
        prompts([[SYSTEM], [SYSTEM]], bad_rows="drop")


# --- columns by paths ----------------------------------------------------------------------------------------------

NESTED = {
    "prompt": [turn("user", "2 + 3?"), turn("assistant", "5")],
    "reward_model": {"ground_truth": "5", "style": "rule"},
    "extra_info": {"split": "train", "golds": [["5", "five"]]},
    "a.b": "own",
    "a": {"b": "inner"},
}


@pytest.mark.parametrize("path, value", {
    "reward_model.ground_truth": "5", "extra_info.split": "train", "prompt.0.content": "2 + 3?", "prompt.-1.content": "5",
    "extra_info.golds.0.1": "five", "a.b": "own", "a": {"b": "inner"}, "prompt.2.content": MISSING, "prompt.-3.content": MISSING,
    "prompt.content": MISSING, "reward_model.truth": MISSING, "reward_model.ground_truth.0": MISSING, "none": MISSING,
}.items())  # fmt: skip
def test_a_path_leads_through_keys_and_indices(path, value):
    assert read_path(NESTED, path) == value


def test_a_path_is_one_column_more_and_a_name_is_a_new_name():
    config = DataConfig(template="{question}{set}", columns={"question": "prompt.0.content", "set": "extra_info.split", "gold": "a.b"})
    rows = [NESTED, {**NESTED, "extra_info": None, "prompt": [turn("user", "x")]}]
    rows[1]["extra_info"] = {"split": "b"}
    first, second = make_tasks(rows, config, TINY)[0]
    assert first.prompt == "2 + 3?train" and second.prompt == "xb"
    assert first.columns.keys() == {"prompt", "reward_model", "extra_info", "a", "gold", "question", "set"}
    assert first.columns["gold"] == "own" and first.columns["prompt"] == NESTED["prompt"]


def test_a_column_may_get_several_names():
    row = {"s": "5", "q": "2 + 3?", "extra": {"x": 1}}
    assert rename(row, {"answer": "s", "gold": "s"}) == {"answer": "5", "gold": "5", "q": "2 + 3?", "extra": {"x": 1}}
    assert rename(row, {"s": "s", "gold": "s", "y": "extra.x", "z": "extra.x"}) == {**row, "gold": "5", "y": 1, "z": 1}
    assert rename(row, {"q": "s", "s": "q"}) == {"q": "5", "s": "2 + 3?", "extra": {"x": 1}}


def test_a_place_that_some_rows_lack_is_null_there():
    config = DataConfig(template="q", columns={"gold": "reward_model.ground_truth"})
    tasks, _ = make_tasks([{"reward_model": None}, {"reward_model": {}}, NESTED], config, TINY)
    assert [task.columns["gold"] for task in tasks] == [None, None, "5"]


@pytest.mark.parametrize("path, message", {
    "reward_model.truth": r"'reward_model.truth'; in row 1, reward_model has the keys ground_truth, style",
    "reward.truth": "'reward.truth'; known: a, a.b, extra_info, prompt, reward_model",
    "prompt.7.content": "'prompt.7.content'; in row 1, prompt is a list of 2, whose indices begin with 0",
    "reward_model.style.x": "'reward_model.style.x'; in row 1, reward_model.style is 'rule', which has nothing inside",
}.items())  # fmt: skip
def test_a_place_that_no_row_has_is_named(path, message):
    with pytest.raises(ConfigError, match=f"data.columns.gold is {message}"):
        make_tasks([NESTED], DataConfig(template="q", columns={"gold": path}), TINY)


def test_a_list_of_numbers_may_stand_in_a_template():
    (task,), _ = make_tasks([{"nums": [4, 7]}], DataConfig(template="Use {nums}."), TINY)
    assert task.prompt == "Use [4, 7]."
    with pytest.raises(ConfigError, match="must be text or a number"):
        make_tasks([{"nums": [4, None]}], DataConfig(template="Use {nums}."), TINY)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_turns_that_a_judge_and_a_reward_model_see():
    row = {"messages": [USER, ANSWER, USER, ANSWER]}
    assert list_turns(row, replace(CHAT, system="Be brief.")) == [SYSTEM, USER, ANSWER, USER]
    assert list_turns({"messages": [SYSTEM, USER]}, replace(CHAT, system="Be long.")) == [SYSTEM, USER]
    goes_on = list_turns({"messages": [USER, ANSWER]}, replace(CHAT, last_turn="continue"))
    assert add_completion(goes_on, "0") == [USER, turn("assistant", "#### 50")]
    assert add_completion(list_turns(row, CHAT), "6")[-1] == turn("assistant", "6")
    parts = {"messages": [turn("user", [{"type": "text", "text": "2 + "}, {"type": "text", "text": "3?"}])]}
    assert show_prompt("<user>2 + 3?<assistant>", parts, CHAT) == "2 + 3?"
    assert show_prompt("", row, CHAT) == "user: 2 + 3?\n\nassistant: #### 5\n\nuser: 2 + 3?"


def test_a_judge_sees_every_value_that_a_prompt_may_hold():
    """Lists of numbers are allowed in data.template, so the judge of Countdown reads them; null and bool are in no prompt."""
    chat = DataConfig(prompt="chat", template="Make {target} from {nums}.")
    row = {"nums": [4, 7], "target": 11}
    (task,), _ = make_tasks([row], chat, TINY)
    assert show_prompt(task.prompt, task.columns, chat) == "Make 11 from [4, 7]." and "Make 11 from [4, 7]." in task.prompt
    assert list_turns(row, chat) == [turn("user", "Make 11 from [4, 7].")]
    for value in (None, True, [], [4, True], {"a": 1}):
        for read in (lambda row: make_tasks([row], chat, TINY), lambda row: list_turns(row, chat)):
            with pytest.raises(ConfigError, match="column 'nums', which data.template uses, is .*; it must be text"):
                read({"nums": value, "target": 1})
    with pytest.raises(ConfigError, match="data.template uses {target}, but the data has the columns nums"):
        list_turns({"nums": [4]}, chat)


@pytest.mark.parametrize("template, count, example", [
    (MARKED, 0, ""),
    (MARKED.replace("in messages", "in messages[-1:]"), 2, "turn 1 (system) of row 1"),
    (MARKED.replace("in messages", "in messages if m.role != 'assistant'"), 2, "turn 3 (assistant) of row 1"),
    (MARKED.replace("m.content", "m.content.split('</think>')[-1] | trim"), 0, ""),
])  # fmt: skip
def test_turns_that_a_chat_template_leaves_out_are_named(template, count, example):
    tokenizer = load_tokenizer("builtin:tiny")
    tokenizer.chat_template = template
    first = [SYSTEM, turn("user", " 1 + 1? "), turn("assistant", "<think>so</think>\n#### 2"), USER, ANSWER]
    second = [turn("user", "7?"), turn("assistant", "#### 7"), USER]
    tasks = prompts([first, second, [USER]], tokenizer)
    sentences = describe_dropped_turns(CHAT, tasks)
    expected = [f"the model's chat template leaves turns out of {count} prompts, such as {example} of the data"] if count else []
    assert sentences == expected
    assert describe_dropped_turns(replace(CHAT, prompt="template", template="{q}"), tasks) == []
    cut = replace(CHAT, long_prompts="truncate_left", max_prompt_tokens=1)
    assert describe_dropped_turns(cut, tasks) == []
