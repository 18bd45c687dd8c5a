"""The first line of every docstring is a sentence: it does not begin with a question word or a dangling pronoun."""

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
    for folder in ("grpo_core", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
FORMULAS = {  # the first line of these docstrings is a formula
    function.__name__
    for registry in (ADVANTAGES, AVERAGES, CORRECTIONS, KLS, LOSSES, TRUNCATIONS)
    for function in registry.functions.values()
}


def fragments(source, formulas=frozenset()):
    """Return (line number, first line) of every docstring that begins with one of the words."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text and FRAGMENT.match(text) and getattr(node, "name", "") not in formulas:
            found.append((getattr(node, "lineno", 1), text.splitlines()[0]))
    return found


@pytest.mark.parametrize("name", FILES)
def test_the_first_line_of_a_docstring_is_a_sentence(name):
    formulas = FORMULAS if name.startswith("grpo_core/objective/") else frozenset()
    assert fragments(FILES[name].read_text(encoding="utf-8"), formulas) == []


def test_fragments_are_seen():
    for word in ("What a run does.", "Where it lies.", "Of two.", "Which one.", "How it is read.", "Whether it is so."):
        assert fragments(f'"""{word}"""') == [(1, word)]
    for text in ("As `load`.", "See `load`.", "Its rows."):
        assert fragments(f'class A:\n    def f(self):\n        """{text}\n\n        More.\n        """') == [(2, text)]
    for text in ("Assert it.", "Seed torch.", "Return what is there.", "Whatever is left."):
        assert fragments(f'def f():\n    """{text}"""') == []
    assert fragments('def f():\n    """As a formula"""', {"f"}) == []
