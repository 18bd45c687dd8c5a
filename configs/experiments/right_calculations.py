"""For the calculations that GSM8K marks as <<3*4=12>>: a reward for the share that is right, and a calculator."""

import ast
import math
import operator
import re

MARKED = re.compile(r"<<([-+*/.() \d]+)=(-?[\d.]+)>>")
BEGUN = re.compile(r"<<([-+*/.() \d]+)=$")
FAULTS = (SyntaxError, ValueError, ZeroDivisionError, KeyError, OverflowError, RecursionError, MemoryError)
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def right_calculations(completions, answer):
    """Return the share of right calculations, in [0, 1].

    The numerator is the number of different right calculations in the completion, at most as many as the solution
    `answer` has. The denominator is the number of calculations in the completion or in the solution, whichever is
    larger. Leaving a calculation out therefore costs as much as writing one twice.
    """
    return [
        _score(MARKED.findall(text), len(MARKED.findall(worked)))
        for text, worked in zip(completions, answer, strict=True)
    ]


class Calculator:
    """An environment that completes marked calculations: after `<<3*4=` it appends `12>>`. A turn ends at an equals sign."""

    def __init__(self, row, seed):
        pass

    def step(self, turn):
        """Return the result; `?>>` for a formula without one; no text after an equals sign that is not marked."""
        if turn.ended_by != "stop":
            return None
        begun = BEGUN.search(turn.completion)
        if begun is None:
            return ""
        try:
            return f"{round(value_of(begun[1]), 2):.2f}".rstrip("0").rstrip(".") + ">>"
        except FAULTS:
            return "?>>"


def holds(formula, result):
    """Return True if the formula of + - * / and brackets has this value, up to the rounding of GSM8K."""
    try:
        return math.isclose(value_of(formula), float(result), abs_tol=0.005, rel_tol=0.001)
    except FAULTS:
        return False


def value_of(formula):
    """Return the value of a formula of + - * / and brackets.

    Raises:
        SyntaxError, ValueError, KeyError, ZeroDivisionError, RecursionError, MemoryError: the formula has something else
            in it, or no value.
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
