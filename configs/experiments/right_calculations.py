"""A reward for GSM8K's marked calculations, <<3*4=12>>: how many of those that a solution needs are right."""

import ast
import math
import operator
import re

MARKED = re.compile(r"<<([-+*/.() \d]+)=(-?[\d.]+)>>")
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def right_calculations(completions, answer):
    """In [0, 1]: the different right calculations, over the most of what is written and what the given solution has.

    To leave one out pays as little as to write one twice.
    """
    return [
        _score(MARKED.findall(text), len(MARKED.findall(worked)))
        for text, worked in zip(completions, answer, strict=True)
    ]


def holds(formula, result):
    """Whether the formula, of + - * / and brackets, has this value, to what GSM8K rounds to; not if it has none."""
    try:
        return math.isclose(value_of(formula), float(result), abs_tol=0.005, rel_tol=0.001)
    except (SyntaxError, ValueError, ZeroDivisionError, KeyError, OverflowError, RecursionError, MemoryError):
        return False


def value_of(formula):
    """The formula's value.

    Raises:
        SyntaxError, ValueError, KeyError, ZeroDivisionError, RecursionError, MemoryError: it is not made of + - * / and
            brackets, or has no value.
    """
    return _value(ast.parse(formula.strip(), mode="eval").body)


def _score(written, needed):
    right = {formula for formula, result in written if holds(formula, result)}
    return min(len(right), needed) / max(len(written), needed, 1)


def _value(node):
    if isinstance(node, ast.BinOp):
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand)
    return float(ast.literal_eval(node))
