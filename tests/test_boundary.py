"""The ids that follow a turn: for five chat templates they are those of the whole conversation rendered at once."""

import copy
import functools
from dataclasses import replace
from pathlib import Path

import pytest

from grpo_core.config.sections import DataConfig
from grpo_core.data.encoding import apply_chat_template, encode_prompts, offer_tools
from grpo_core.environments.boundary import Boundary
from grpo_core.model.new_model import new_tokenizer
from grpo_core.schema import ConfigError

FOLDER = Path(__file__).parent / "fixtures" / "chat_templates"
IM = ["<|im_start|>", "<|im_end|>"]
MARKERS = {  # the special tokens of a family, its first token of a text, and those that end a turn
    "qwen": (IM, None, ["<|im_end|>", "<|endoftext|>"]),
    "hermes": (["<|begin|>", *IM], "<|begin|>", ["<|im_end|>"]),
    "llama_3": (["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"], "<|begin_of_text|>", ["<|eot_id|>", "<|eom_id|>"]),
    "mistral": (["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"], "<s>", ["</s>"]),
    "gpt_oss": (["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"], None, ["<|return|>", "<|call|>"]),
}  # fmt: skip
FAMILIES = [*MARKERS]
DRAWN = {"mistral": " {}", "gpt_oss": "<|channel|>final<|message|>{}"}  # what the policy draws before its words
CONFIG = DataConfig(prompt="chat")
SCHEMA = {"type": "function", "function": {"name": "search", "description": "Search.", "parameters": {"type": "object", "properties": {}}}}


def tokenizer_of(family):
    """A tokenizer of its own for each test."""
    return copy.deepcopy(_tokenizer_of(family))


@functools.cache
def _tokenizer_of(family):
    special, bos, ends = MARKERS[family]
    tokenizer = new_tokenizer(["the words of a user, an assistant and a tool: 1 + 2 = 3\n"] * 5, 400)
    tokenizer.add_special_tokens({"additional_special_tokens": [*special, *ends]})
    tokenizer.chat_template = (FOLDER / f"{family}.jinja").read_text().rstrip("\n")
    tokenizer.bos_token, tokenizer.eos_token = bos, ends[0]
    return tokenizer, [tokenizer.convert_tokens_to_ids(token) for token in ends]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def ids_of(tokenizer, text):
    return tokenizer([text], add_special_tokens=False)["input_ids"][0]


def play(tokenizer, eos_ids, boundary, family, texts, answers, ended_by="eos", end=None):
    """The ids that a model sees whose policy draws `texts`, between which come `answers`."""
    prompt = apply_chat_template(tokenizer, [{"role": "user", "content": "1 + 2?"}], CONFIG)
    (ids,) = encode_prompts(tokenizer, [prompt], add_special_tokens=False)
    end = eos_ids[0] if end is None else end
    for i, text in enumerate(texts):
        words = DRAWN.get(family, "{}").format(text)
        drawn = ids_of(tokenizer, words) + ([end] if ended_by == "eos" else [])
        ids = ids + drawn
        if i < len(answers):
            ids = ids + boundary.encode(answers[i], words, ended_by, drawn[-1])
    return ids


def conversation(texts, answers, role):
    turns = [{"role": "user", "content": "1 + 2?"}]
    for i, text in enumerate(texts):
        turns.append({"role": "assistant", "content": text})
        extra = {"tool_call_id": "call00000"} if role == "tool" else {}
        turns += [{"role": role, "content": part, **extra} for part in (answers[i] if i < len(answers) else ())]
    return turns


@pytest.mark.parametrize("role", ["user", "tool"])
def test_prompt_and_stretches_are_the_ids_of_the_conversation(family, role):
    tokenizer, eos_ids = tokenizer_of(family)
    if role == "tool":
        offer_tools(tokenizer, [SCHEMA])
    boundary = Boundary(tokenizer, CONFIG, eos_ids, role)
    texts = ["I ask: é", "and again", "It is 3."]
    answers = [["3 of “three”"], ["one", "two"]] if role == "tool" and family != "gpt_oss" else [["3 of “three”"], ["one"]]
    used = "user" if family == "gpt_oss" else role  # its messages of a tool need a call in another form
    if family == "mistral" and role == "tool":  # it renders the tools in front of the last turn of the user
        assert boundary.make_messages.__name__ == "_make_tool_with_id"
    ids = play(tokenizer, eos_ids, boundary, family, texts, answers)
    whole = apply_chat_template(tokenizer, conversation(texts, answers, used), CONFIG, add_generation_prompt=False)
    expected = ids_of(tokenizer, whole)
    if family == "gpt_oss":  # the policy ends with <|return|>, for which the template writes <|end|>
        end = tokenizer.convert_tokens_to_ids("<|end|>")
        ids, expected = ([end if i in eos_ids else i for i in row] for row in (ids, expected))
        assert expected.count(end) == whole.count("<|end|>") + 1
    if family == "llama_3" and role == "tool":
        assert '"3 of \\u201cthree\\u201d"' in whole or '"3 of “three”"' in whole  # as its template writes what a tool says
    assert ids == expected[: len(ids)] and len(expected) - len(ids) <= 1  # behind the last end may be a line break


def test_a_turn_that_was_cut_off_is_ended_by_the_template(family):
    tokenizer, eos_ids = tokenizer_of(family)
    boundary = Boundary(tokenizer, CONFIG, eos_ids)
    ids = play(tokenizer, eos_ids, boundary, family, ["a", "b"], [["c"]], ended_by="turn_limit")
    whole = apply_chat_template(tokenizer, conversation(["a", "b"], [["c"]], "user"), CONFIG, add_generation_prompt=False)
    assert ids == ids_of(tokenizer, whole)[: len(ids)] and ids[-1] not in eos_ids


def test_another_end_that_the_policy_drew_stands_for_the_templates(family):
    tokenizer, eos_ids = tokenizer_of(family)
    if len(eos_ids) < 2:
        return
    boundary = Boundary(tokenizer, CONFIG, eos_ids)
    usual, other = (play(tokenizer, eos_ids, boundary, family, ["a", "b"], [["c"]], end=end) for end in eos_ids[:2])
    assert [eos_ids[0] if i == eos_ids[1] else i for i in other] == usual and other != usual


def test_after_a_stop_string_the_assistant_goes_on(family):
    tokenizer, eos_ids = tokenizer_of(family)
    boundary = Boundary(tokenizer, CONFIG, eos_ids)
    assert boundary.encode([" 3\n"], "1 + 2 =", "stop", 5) == ids_of(tokenizer, " 3\n")


@pytest.mark.parametrize("ended_by", ["eos", "stop", "turn_limit"])
def test_without_a_chat_template_an_answer_is_plain_text(ended_by):
    tokenizer, eos_ids = tokenizer_of("qwen")
    boundary = Boundary(tokenizer, DataConfig(), eos_ids)
    assert boundary.encode([" 3", " 4"], "1 + 2 =", ended_by, eos_ids[0]) == ids_of(tokenizer, " 3 4")
    assert boundary.encode([""], "1 + 2 =", ended_by, eos_ids[0]) == []


def test_a_tokenizer_that_marks_the_beginning_of_a_text_does_not_mark_that_of_an_answer(monkeypatch):
    from grpo_core.environments import boundary as module

    calls = []
    monkeypatch.setattr(module, "encode_continuations", lambda *words: calls.append(words) or [[7]])
    tokenizer, eos_ids = tokenizer_of("qwen")
    assert Boundary(tokenizer, DataConfig(), eos_ids).encode(["3"], "1 + 2 =", "stop", 5) == [7]
    assert calls == [(tokenizer, ["1 + 2 ="], ["3"])]


def test_an_answer_is_cut_between_characters():
    tokenizer, eos_ids = tokenizer_of("qwen")
    boundary = Boundary(tokenizer, CONFIG, eos_ids)
    text = "123 é"
    assert [boundary.cut(text, n) for n in (0, 2, 3, 5, 20)] == ["", "12", "123", "123 ", text]
    assert boundary.count(text) == 6


def test_a_text_is_shortened_if_its_beginning_has_more_tokens_than_the_limit():
    tokenizer, eos_ids = tokenizer_of("qwen")
    boundary = Boundary(tokenizer, CONFIG, eos_ids)
    word = next(token for token in sorted(tokenizer.get_vocab(), key=len, reverse=True) if token.startswith("<|"))
    for text in ("1" * 200, "123", "", word * 100):  # a token of many characters
        assert boundary.shorten(text, 100) == text
    assert len(boundary.shorten("1" * 5000, 100)) < 1000
    assert boundary.cut(boundary.shorten("12345" * 1000, 7), 7) == "1234512"


@pytest.mark.parametrize("template, sentence", [
    ("{{ raise_exception('only one turn') }}", "refuses an answer: TemplateError: only one turn"),
    ("{{ messages[-1].content }}", "leaves out the assistant's turn"),
    ("{{ messages[0].content }}{{ messages[1].content }}", "leaves out an answer"),
    ("{{ messages[0].content }}{{ messages[1].content }}<|im_end|>", "leaves out an answer"),
])  # fmt: skip
def test_a_template_that_cannot_be_split_is_refused(template, sentence):
    tokenizer, eos_ids = tokenizer_of("qwen")
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=sentence):
        Boundary(tokenizer, CONFIG, eos_ids)
    assert Boundary(tokenizer, replace(CONFIG, prompt="template"), eos_ids).end_id is None


def test_a_template_without_an_end_of_turn_gets_all_of_its_markers():
    """The next speaker's marker is an end of sequence, and it is given unless the policy drew that one."""
    tokenizer, _ = tokenizer_of("qwen")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    user, other = tokenizer.convert_tokens_to_ids(["<|user|>", "<|endoftext|>"])
    boundary = Boundary(tokenizer, CONFIG, [user, other])
    whole = ids_of(tokenizer, "<|user|>c<|assistant|>")
    assert boundary.encode(["c"], "a", "eos", other) == whole and boundary.encode(["c"], "a", "eos", user) == whole[1:]


def test_no_begin_token_is_added():
    tokenizer, eos_ids = tokenizer_of("hermes")
    ids = Boundary(tokenizer, CONFIG, eos_ids).encode(["c"], "a", "eos", eos_ids[0])
    assert tokenizer.convert_tokens_to_ids("<|begin|>") not in ids
