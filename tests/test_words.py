"""Docstrings begin with a sentence, not with a question word or a dangling pronoun, and locals have telling names."""

import ast
import re

import pytest
from conftest import ROOT

from grpo_core.objective.advantages import ADVANTAGES
from grpo_core.objective.corrections import CORRECTIONS
from grpo_core.objective.kl import KLS
from grpo_core.objective.losses import LOSSES
from grpo_core.objective.token_weights import AVERAGES
from grpo_core.objective.truncation import TRUNCATIONS

FRAGMENT = re.compile(r"(What|Where|Of|Which|How|Whether|As|See|Its)\b")
FILES = {
    path.relative_to(ROOT).as_posix(): path
    for folder in ("grpo_core", "benchmarks", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
VAGUE = {"found", "told", "how", "one", "kept", "shown"}  # where a noun exists
FORMULAS = {  # the first line of these docstrings is a formula
    function.__name__
    for registry in (ADVANTAGES, AVERAGES, CORRECTIONS, KLS, LOSSES, TRUNCATIONS)
    for function in registry.functions.values()
}


def first_lines(source):
    """Yield (line number, name, first line) of every docstring."""
    for node in ast.walk(ast.parse(source)):
        is_documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if is_documented and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), getattr(node, "name", ""), text.splitlines()[0]


def fragments(source, formulas=frozenset()):
    """Return (line number, first line) of every docstring that begins with one of the words."""
    return [(n, line) for n, name, line in first_lines(source) if FRAGMENT.match(line) and name not in formulas]


def unfinished(source):
    """Return (line number, first line) of every docstring whose first line does not end with a period."""
    return [(n, line) for n, _, line in first_lines(source) if not line.endswith(".")]


def vague_names(source):
    """Return (line number, name) of every variable and parameter with one of the names."""
    names = [
        (node.lineno, node.arg if isinstance(node, ast.arg) else node.id)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.arg) or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    ]
    return sorted((n, name) for n, name in names if name in VAGUE)


@pytest.mark.parametrize("name", FILES)
def test_the_first_line_of_a_docstring_is_a_sentence(name):
    formulas = FORMULAS if name.startswith("grpo_core/objective/") else frozenset()
    assert fragments(FILES[name].read_text(encoding="utf-8"), formulas) == []


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("benchmarks/")])
def test_the_first_line_of_a_benchmarks_docstring_ends_with_a_period(name):
    assert unfinished(FILES[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", FILES)
def test_locals_have_telling_names(name):
    assert vague_names(FILES[name].read_text(encoding="utf-8")) == []


def test_unfinished_lines_and_vague_names_are_seen():
    source = '"""Of two"""\n\n\ndef f(how, *told):\n    """Return it."""\n    found, kept = [one for one in told]\n    return found\n'
    assert unfinished(source) == [(1, "Of two")]
    assert vague_names(source) == [(4, "how"), (4, "told"), (6, "found"), (6, "kept"), (6, "one")]
    assert vague_names("found.one = kept[told]") == [] == unfinished('"""Return two."""')


def test_fragments_are_seen():
    for word in ("What a run does.", "Where it lies.", "Of two.", "Which one.", "How it is read.", "Whether it is so."):
        assert fragments(f'"""{word}"""') == [(1, word)]
    for text in ("As `load`.", "See `load`.", "Its rows."):
        assert fragments(f'class A:\n    def f(self):\n        """{text}\n\n        More.\n        """') == [(2, text)]
    for text in ("Assert it.", "Seed torch.", "Return what is there.", "Whatever is left."):
        assert fragments(f'def f():\n    """{text}"""') == []
    assert fragments('def f():\n    """As a formula"""', {"f"}) == []
