"""Parse the calls of tools in a turn of the policy.

A parser is a function of a turn's text that returns its calls in order; [] if the turn has none. A call is {"name":
..., "arguments": {...}}, or a text that says why it cannot be read. A user's tool_parser is such a function too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from grpo_core.config.environment_functions import TOOL_PARSERS
from grpo_core.objective.answers import cut_thinking

Call = dict[str, Any] | str
OPEN, CLOSE = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
NOT_JSON = ("<function=", "<parameter=", "<arg_key>", "<invoke")  # of calls that are tags of their own in a template
_SEPARATOR = re.compile(r"[\s;,]*")
_IN_TAGS = re.compile(rf"{OPEN}(.*?)(?:{CLOSE}|(?={OPEN})|$)", re.S)


def parse_tagged_json(text: str) -> list[Call]:
    """Return the calls in <tool_call>{"name": ..., "arguments": ...}</tool_call>, the form of Qwen and Hermes.

    >>> parse_tagged_json('Let me see. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    [{'name': 'add', 'arguments': {'a': 1}}]
    """
    return [_parse_object(part.strip(), "arguments") for part in _IN_TAGS.findall(cut_thinking(text))]


def parse_llama_3_json(text: str) -> list[Call]:
    """Return the calls of a turn that is {"name": ..., "parameters": ...} alone, the form of Llama 3.

    <|python_tag|> may stand in front, and several objects may follow one another.

    >>> parse_llama_3_json('<|python_tag|>{"name": "add", "parameters": {"a": 1}}')
    [{'name': 'add', 'arguments': {'a': 1}}]
    """
    text = cut_thinking(text).strip()
    is_call = text.startswith(PYTHON_TAG) or bool(re.match(r'\{\s*"(type|name|parameters|function)"', text))
    text, calls = text.removeprefix(PYTHON_TAG).strip(), list[Call]()
    if not is_call:
        return []
    place = 0
    while place < len(text):
        try:
            value, place = json.JSONDecoder().raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            return [*calls, f"the call is no JSON: {error}"]
        calls.append(_parse_call(value, "parameters"))
        place = _SEPARATOR.match(text, place).end()  # type: ignore[union-attr]
    return calls or ["the call is empty"]


PARSERS: dict[str, Callable[[str], list[Call]]] = {
    "tagged_json": parse_tagged_json,
    "llama_3_json": parse_llama_3_json,
}
for _name, _parser in PARSERS.items():
    TOOL_PARSERS.register(_name)(_parser)


def recognise_parser(template: str, rendered: str | None, name: str) -> str | None:
    """Return the name of the parser for the calls that a chat template asks for, or None.

    `rendered` is what the template writes for an assistant's turn that calls the tool `name`; None if it refuses it.
    """
    if OPEN in template and not any(tag in template for tag in NOT_JSON):
        parser = "tagged_json"
    elif PYTHON_TAG in template or ("ipython" in template and '"parameters"' in template.replace("\\", "")):
        parser = "llama_3_json"
    else:
        return None
    if rendered is None or name not in rendered:
        return parser
    calls = PARSERS[parser](rendered)
    return parser if any(isinstance(call, dict) and call["name"] == name for call in calls) else None


def _parse_object(text: str, key: str) -> Call:
    try:
        return _parse_call(json.loads(text), key)
    except (ValueError, RecursionError) as error:
        return f"the call is no JSON: {error}"


def _parse_call(value: Any, key: str) -> Call:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return f'the call is {json.dumps(value)[:60]}; it must be {{"name": ..., "{key}": {{...}}}}'
    arguments = next((value[name] for name in (key, "arguments", "parameters") if name in value), {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return f"the {key} of {value['name']} are text that is no JSON"
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return f"the {key} of {value['name']} are {json.dumps(arguments)[:60]}; they must be an object"
    return {"name": value["name"], "arguments": arguments}


def check_calls(value: Any) -> Sequence[Call]:
    """Return what a parser has returned, if it is a list of calls.

    Raises:
        TypeError: it is something else.
    """
    is_list = isinstance(value, (list, tuple))
    if not is_list or not all(
        isinstance(call, str)
        or (isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict))
        for call in value
    ):
        raise TypeError(f"the tool_parser returned {repr(value)[:60]}; it must be a list of {{name, arguments}}")
    return value
