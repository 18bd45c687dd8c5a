"""Parse the YAML of a configuration file, where the type of a key decides how its value is read."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin

import yaml

from grpo_core.config.text_files import describe_place
from grpo_core.config.words import type_hints
from grpo_core.schema import ConfigError, first_line, list_options

MAX_DEPTH = 50  # of lists and mappings in a file
_TAG = "tag:yaml.org,2002:"
_NULL = _TAG + "null"
_NOT_TEXT = {_TAG + name for name in ("int", "float", "bool", "timestamp")}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """A safe loader that refuses a key given twice, where YAML would silently use the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _construct_integer(loader: _Loader, node: yaml.ScalarNode) -> Any:
    """Return a decimal integer; 010, 0x10 and 1:30, which are integers in YAML 1.1, stay text."""
    text = loader.construct_scalar(node)
    return int(text) if re.fullmatch(r"[+-]?(0|[1-9]\d*(_\d+)*)", text) else text


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_integer)


def parse_yaml(text: str, source: str, kind: Any) -> Any:
    """Parse YAML for a dataclass `kind`; `source` begins the message of an error.

    A value of a key of type text is taken as written, also where YAML reads a number, a date or a truth value (2024,
    2024-01-05, on). A section or a mapping with nothing in it is left out.

    Raises:
        ConfigError: the text is not YAML.
    """
    try:
        _check_nesting(text)  # first, because the loader's recursion may crash the process
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else loader.construct_document(_fit(node, kind))
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not YAML: {_describe_yaml_error(error, text)}") from None


def _check_nesting(text: str) -> None:
    """Raise an error if lists and mappings are nested too deep, or one of them contains itself through an alias."""
    anchors: list[str | None] = []  # of the lists and mappings that are open
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            anchors.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchors.pop()
        elif isinstance(event, yaml.AliasEvent) and event.anchor in anchors:
            problem = f"the alias *{event.anchor} is inside what it stands for"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        if len(anchors) > MAX_DEPTH:
            raise RecursionError


def _fit(node: yaml.Node, kind: Any) -> yaml.Node:
    """Return a node for a key of the type `kind`: numbers are text where it takes text, and empty sections are gone."""
    if kind is Any:
        return node
    options = list_options(kind)
    item = next((get_args(option)[0] for option in options if get_origin(option) is list), None)
    if isinstance(node, yaml.ScalarNode):
        takes_text = str in options or _is_text_first(item)
        tag = _TAG + "str" if takes_text and node.tag in _NOT_TEXT else node.tag
        return yaml.ScalarNode(tag, node.value, node.start_mark, node.end_mark)
    if isinstance(node, yaml.SequenceNode):
        inner_kind = item | str if _is_text_first(item) else item
        values = node.value if item is None else [_fit(inner, inner_kind) for inner in node.value]
        return yaml.SequenceNode(node.tag, values, node.start_mark, node.end_mark)
    if is_dataclass(item):  # one item needs no list
        return _fit(node, item)
    hints = next((type_hints(option) for option in options if is_dataclass(option)), {})
    value_kind = next((get_args(option)[1] for option in options if get_origin(option) is dict), Any)
    names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    pairs = []
    for key, inner in node.value:
        to = hints.get(key.value, value_kind) if isinstance(key, yaml.ScalarNode) else Any
        if inner.tag == _NULL and _is_section(to) and names.count(key.value) == 1:
            continue
        pairs.append((key, _fit(inner, to)))
    return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark)


def _is_text_first(kind: Any) -> bool:
    """Return True for a dataclass that a text alone stands for, because it sets the first field."""
    return is_dataclass(kind) and type_hints(kind)[fields(kind)[0].name] is str


def _is_section(kind: Any) -> bool:
    """Return True for a section and a mapping that cannot be null."""
    options = list_options(kind)
    return type(None) not in options and any(is_dataclass(x) or (get_origin(x) or x) is dict for x in options)


def _describe_yaml_error(error: Exception, text: str) -> str:
    """Return the problem of a YAML text, with its line and column where they are known."""
    problem, index = first_line(error), None
    if isinstance(error, yaml.MarkedYAMLError):
        problem, mark = error.problem or problem, error.problem_mark or error.context_mark
        problem = f"{error.context} {problem}" if problem.startswith("but ") else problem
        if mark is not None:
            return f"{' '.join(problem.split())} (line {mark.line + 1}, column {mark.column + 1})"
    elif isinstance(error, yaml.reader.ReaderError) and (bad := yaml.reader.Reader.NON_PRINTABLE.search(text)):
        index, problem = bad.start(), f"it has the control character {ascii(bad[0])[1:-1]}"
    elif isinstance(error, RecursionError):
        problem = f"its lists and mappings are nested more than {MAX_DEPTH} deep"
    return problem if index is None else f"{problem} ({describe_place(text, index)})"
