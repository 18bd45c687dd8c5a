"""Tools: their schemas, the two forms of calls, and what a call gets as its answer."""

import asyncio
import json
import re

import pytest
from conftest import ROOT
from test_boundary import FAMILIES, tokenizer_of

from grpo_core.config.environment_functions import load_tools
from grpo_core.config.sections import DataConfig
from grpo_core.data.assistant_tokens import encode_conversation
from grpo_core.data.encoding import offer_tools
from grpo_core.data.messages import read_conversation
from grpo_core.data.tool_schemas import make_schema
from grpo_core.environments.boundary import Boundary
from grpo_core.environments.interface import Turn, read_reply
from grpo_core.environments.setup import find_parser
from grpo_core.environments.tool_calls import parse_llama_3_json, parse_tagged_json, recognise_parser
from grpo_core.environments.tools import Tools
from grpo_core.model.loading import load_tokenizer
from grpo_core.schema import ConfigError

TEMPLATE = re.search(r"```text\n(.*?)```", (ROOT / "docs" / "environments.md").read_text(), re.S)[1]
MINE = '''
import asyncio
from typing import Literal

def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b

async def search(query: str, order: Literal["new", "old"] = "new", tags: list[str] | None = None) -> dict:
    """Search.

    Args:
        query: The words.
        order: The order.
        tags: The tags.
    """
    await asyncio.sleep(0)
    return {"query": query, "tags": tags}

def fails(a: int) -> int:
    """Fail.

    Args:
        a: A number.
    """
    return 1 // 0

def plain(a):
    return a

def parse(text):
    if text == "broken":
        raise ValueError("no call")
    if text == "wrong":
        return [("add", 1)]
    name, _, a = text.partition(" ")
    return [{"name": name, "arguments": {"a": int(a)}}] if a else []
'''


ODD = """
import dataclasses, enum, functools, sys
import numpy as np
from typing import Optional

class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"

@dataclasses.dataclass
class Place:
    name: str

class NoText:
    pass

class Broken:
    def __repr__(self):
        raise ValueError("no text")

RESULTS = {
    "number": np.int64(3), "numbers": np.ones(2, dtype="float32"), "place": [Place("here")], "set": {"b", "a"},
    "object": NoText(), "objects": {"x": [NoText()]}, "broken": Broken(), "half": "\\ud800", "keys": {(1, 2): 3},
}

def paint(color: Color, other: Optional[Color] = None):
    return f"{color.name} {other and other.name}"

def make(what: str):
    return RESULTS[what]

def ends(code: int = 2):
    sys.exit(code)

def says(what: str):
    raise ValueError(what)

def says_nothing():
    raise ValueError

def yields(a: int):
    yield a

def many(*a: int):
    return a

def named(**a: int):
    return a

def placed(a: int, /):
    return a

def decorate(function):
    return lambda *args: function(*args)

decorated = decorate(make)
partial = functools.partial(make, what="set")
"""


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    file = tmp_path_factory.mktemp("odd") / "odd.py"
    file.write_text(ODD)
    return str(file)


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    file = tmp_path_factory.mktemp("mine") / "mine.py"
    file.write_text(MINE)
    return str(file)


def tools_of(mine, names=("add", "search", "fails"), parser="tagged_json"):
    return Tools({}, 0, tools=[f"{mine}:{name}" for name in names], parser=parser)


def turn(text):
    return Turn(text, text, 0, "eos")


def tag(*calls):
    return "".join(f"<tool_call>\n{call if isinstance(call, str) else json.dumps(call)}\n</tool_call>" for call in calls)


def call(name, **arguments):
    return {"name": name, "arguments": arguments}


@pytest.mark.parametrize("text, calls", [
    ("a plain answer", []),
    ("the tag <tool_call> is closed by nothing", ["the call is no JSON"]),
    (tag(call("add", a=1)), [call("add", a=1)]),
    ("First " + tag(call("add", a=1), call("add", a=2)) + " then", [call("add", a=1), call("add", a=2)]),
    (f"<think>{tag(call('add', a=1))}</think>{tag(call('add', a=2))}", [call("add", a=2)]),
    (tag('{"name": "add", "arguments": "{\\"a\\": 1}"}'), [call("add", a=1)]),
    (tag('{"name": "add"}'), [call("add")]),
    (tag({"function": {"name": "add", "arguments": {"a": 1}}}), [call("add", a=1)]),
    (tag('{"name": "add", "arguments": [1]}'), ["the arguments of add are [1]; they must be an object"]),
    (tag('{"name": "add", "arguments": "a=1"}'), ["the arguments of add are text that is no JSON"]),
    (tag("[1]"), ['the call is [1]; it must be {"name": ..., "arguments": {...}}']),
    (tag("{'name': 'add'}", call("add", a=2)), ["the call is no JSON", call("add", a=2)]),
    ('<tool_call>{"name": "add", "arguments": {"a": 1}}<tool_call>{"name": "add"}</tool_call>', [call("add", a=1), call("add")]),
])  # fmt: skip
def test_calls_in_tags(text, calls):
    assert [x[: len("the call is no JSON")] if str(x).startswith("the call is no JSON") else x for x in parse_tagged_json(text)] == calls


@pytest.mark.parametrize("text, calls", [
    ("a plain answer with {braces}", []),
    ('{"answer": 3}', []),
    ('{"name": "add", "parameters": {"a": 1}}', [call("add", a=1)]),
    (' <|python_tag|>{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 2}} ', [call("add", a=1), call("add", a=2)]),
    ('{"type": "function", "name": "add", "parameters": {"a": 1}}', [call("add", a=1)]),
    ('{"name": "add", "parameters": {"a": 1', ["the call is no JSON"]),
    ("<|python_tag|>add(1)", ["the call is no JSON"]),
    ("<|python_tag|>", ["the call is empty"]),
    ('{"name": "add", "parameters": {"a": 1}} and more', [call("add", a=1), "the call is no JSON"]),
])  # fmt: skip
def test_calls_of_llama_3(text, calls):
    assert [x[: len("the call is no JSON")] if str(x).startswith("the call is no JSON") else x for x in parse_llama_3_json(text)] == calls


@pytest.mark.parametrize("arguments, answer", [
    ({"a": 2}, "3"),
    ({"a": 2, "b": 3}, "5"),
    ({}, "error: the arguments of add are wrong: missing a required argument: 'a'"),
    ({"a": 2, "c": 3}, "error: the arguments of add are wrong: got an unexpected keyword argument 'c'"),
    ({"a": "2"}, "error: a is '2'; it must be an integer"),
    ({"a": True}, "error: a is True; it must be an integer"),
])  # fmt: skip
def test_the_arguments_of_a_call_are_checked(mine, arguments, answer):
    answered = tools_of(mine).step(turn(tag(call("add", **arguments))))
    assert (answered.texts, answered.calls, answered.errors) == ((answer,), 1, int(answer.startswith("error")))


@pytest.mark.parametrize("name, arguments, answer", [
    ("paint", {"color": "red"}, "RED None"),
    ("paint", {"color": "red", "other": "blue"}, "RED BLUE"),
    ("paint", {"color": "red", "other": None}, "RED None"),
    ("paint", {"color": "green"}, "error: color is 'green'; it must be one of red, blue"),
    ("paint", {"color": None}, "error: color is None; it must be one of red, blue"),
    ("make", {"what": "number"}, "3"),
    ("make", {"what": "numbers"}, "[1.0, 1.0]"),
    ("make", {"what": "place"}, '[{"name": "here"}]'),
    ("make", {"what": "set"}, '["a", "b"]'),
    ("make", {"what": "keys"}, "{(1, 2): 3}"),
    ("make", {"what": "half"}, "\N{REPLACEMENT CHARACTER}"),
    ("make", {"what": "object"}, "error: TypeError: the tool returned an object of the type NoText, which is no JSON"),
    ("make", {"what": "objects"}, "error: TypeError: the tool returned an object of the type dict, which is no JSON"),
    ("make", {"what": "broken"}, "error: ValueError: no text"),
    ("ends", {}, "error: SystemExit: 2"),
    ("says", {"what": "\ud800"}, "error: ValueError: \N{REPLACEMENT CHARACTER}"),
    ("says", {"what": "x" * 10**6}, f"error: ValueError: {'x' * 478}..."),
    ("says", {"what": 3 * 10**600}, f"error: what is 3{'0' * 481}..."),
    ("says_nothing", {}, "error: ValueError"),
    ("\ud800" + "y" * 200, {}, f"error: there is no tool \N{REPLACEMENT CHARACTER}{'y' * 99}; known: ends, make, paint, says, says_nothing"),
])  # fmt: skip
def test_whatever_a_tool_does_the_policy_gets_an_answer(odd, name, arguments, answer):
    tools = tools_of(odd, ("paint", "make", "ends", "says", "says_nothing"))
    answered = read_reply(tools.step(turn(tag(call(name, **arguments)))))
    assert (answered.texts, answered.errors) == ((answer,), int(answer.startswith("error")))


@pytest.mark.parametrize("name, sentence", [
    ("yields", "which yields; a tool must return its result"),
    ("many", "whose argument *a has no name for a call"),
    ("named", r"whose argument **a has no name for a call"),
    ("placed", "whose argument a has no name for a call"),
    ("decorated", "whose argument *args has no name for a call"),
])  # fmt: skip
def test_a_tool_that_no_call_fits_is_refused(odd, name, sentence):
    with pytest.raises(ConfigError) as error:
        load_tools([f"{odd}:{name}"])
    assert f"tools[0] is '{odd}:{name}', {sentence}" in str(error.value)
    assert load_tools([f"{odd}:partial"])


def test_calls_are_answered_in_order_and_a_turn_without_one_ends(mine):
    tools = tools_of(mine)
    answered = tools.step(turn(tag(call("search", query="é"), "{", call("add", a=1), call("fails", a=1), call("other"))))
    assert (answered.calls, answered.errors) == (5, 3)
    assert answered.texts[0] == '{"query": "é", "tags": null}' and answered.texts[2] == "2"
    assert answered.texts[1].startswith("error: the call is no JSON: Expecting property name")
    assert answered.texts[3].startswith("error: ZeroDivisionError: ")
    assert answered.texts[4] == "error: there is no tool other; known: add, fails, search"
    assert tools.step(turn("It is 2.")).texts is None
    wrong = tools.step(turn(tag(call("search", query="a", order="best"), call("search", query="a", tags=[1]))))
    assert wrong.texts == ("error: order is 'best'; it must be one of new, old", "error: tags is [1]; it must be a list of text or null")


def test_a_parser_of_the_users_file(mine):
    tools = tools_of(mine, parser=f"{mine}:parse")
    assert tools.step(turn("add 2")).texts == ("3",) and tools.step(turn("done")).texts is None
    assert tools.step(turn("broken")).texts == ("error: no call",)
    assert "it must be a list of {name, arguments}" in tools.step(turn("wrong")).texts[0]


def test_a_tool_on_a_loop_that_runs_already(mine):
    async def main():
        return tools_of(mine).step(turn(tag(call("search", query="a"))))

    assert asyncio.run(main()).errors == 0


def test_a_schema_is_made_from_hints_and_docstring(mine):
    tools = tools_of(mine, ("add", "search", "plain")).tools
    schema = make_schema("add", tools["add"])["function"]
    assert schema["name"] == "add" and schema["description"] == "Add two numbers."
    assert schema["parameters"]["properties"]["a"] == {"type": "integer", "description": "The first number."}
    assert schema["parameters"]["required"] == ["a"]
    assert make_schema("search", tools["search"])["function"]["parameters"]["properties"]["order"]["enum"] == ["new", "old"]
    with pytest.raises(ConfigError, match="tool plain cannot be described to the model: .* it needs a docstring"):
        make_schema("plain", tools["plain"])


def test_two_tools_of_a_name_are_refused(mine):
    with pytest.raises(ConfigError, match=r"tools\[1\] is .*mine.py:add', and an earlier tool has the name add"):
        tools_of(mine, ("add", "add"))


@pytest.mark.parametrize("family, form", [*zip(FAMILIES, ["tagged_json", "tagged_json", "llama_3_json", None, None], strict=True)])
def test_the_form_is_recognised_from_the_template(family, form):
    tokenizer, _ = tokenizer_of(family)
    assert recognise_parser(tokenizer.chat_template, None, "add") == form


def test_a_form_that_the_template_does_not_write_is_not_recognised():
    template = "<tool_call>{name}</tool_call>"
    assert recognise_parser(template, '<tool_call>{"name": "add", "arguments": {}}</tool_call>', "add") == "tagged_json"
    assert recognise_parser(template, "<tool_call>add(a=1)</tool_call>", "add") is None
    for tag_of_its_own in ("<function=", "<arg_key>"):
        assert recognise_parser(f"<tool_call>\n{tag_of_its_own}add>", None, "add") is None


def test_the_chat_template_of_the_documents_describes_writes_and_answers_calls():
    tokenizer, config = load_tokenizer("builtin:tiny"), DataConfig(prompt="chat", template="{messages}")
    end = tokenizer.eos_token_id
    tokenizer.chat_template = TEMPLATE.replace("<|im_end|>", tokenizer.eos_token)
    assert find_parser(tokenizer, config) == "tagged_json"
    Boundary(tokenizer, config, [end], role="tool")  # refuses a template that omits the answer
    offer_tools(tokenizer, [{"type": "function", "function": {"name": "multiply"}}])
    row = json.loads(re.search(r"```json\n(.*?)```", (ROOT / "docs" / "environments.md").read_text(), re.S)[1])
    ids, marks = encode_conversation(tokenizer, read_conversation(row["messages"]), config, {end}, end)
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\n") and '"name": "multiply"' in text and "<|im_start|>tool\n357<|end|>" in text
    trained = tokenizer.decode([token for token, mark in zip(ids, marks, strict=True) if mark])
    call = '<tool_call>{"name": "multiply", "arguments": {"a": 7, "b": 51}}</tool_call>'
    assert trained == f"{call}<|end|>#### 357<|end|>" and parse_tagged_json(trained)[0]["arguments"] == {"a": 7, "b": 51}
