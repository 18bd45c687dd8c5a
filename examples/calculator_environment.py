"""An environment of your own: a calculator that completes `expression =` wherever the policy writes it.

The policy's turn ends at the stop string; the calculator appends the value, and the policy goes on:

    python examples/calculator_environment.py
    bash launch.sh 2 name=mine environment.name=examples/calculator_environment.py:Calculator sampling.stop=' ='

docs/environments.md describes what an environment receives, what it may return, and what happens when it fails.
"""

import ast
import operator
import re

from grpo_core import Turn

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
EXPRESSION = re.compile(r"([\d+*/ ()-]*\d[\d+*/ ()-]*)=$")  # at the end of a text


class Calculator:
    """The calculator of one completion. It has no state, so the row and the seed are not needed."""

    def __init__(self, row: dict, seed: int, *, most_digits: int = 12):  # environment.args: {most_digits: 20}
        self.most_digits = most_digits

    def step(self, turn: Turn) -> str | None:
        """Return the value of the expression in front of the equals sign; None, the end, after any other turn."""
        if turn.ended_by != "stop":
            return None
        expression = EXPRESSION.search(turn.completion)
        value = evaluate(expression[1].strip()) if expression else None
        return f" {value}" if value is not None and len(str(abs(value))) <= self.most_digits else " ?"


def evaluate(expression: str) -> int | None:
    """Return the value of an expression of whole numbers, or None if it has none."""

    def visit(node: ast.AST) -> int:
        if isinstance(node, ast.Constant):
            return int(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -visit(node.operand)
        if isinstance(node, ast.BinOp):
            left, right = visit(node.left), visit(node.right)
            if isinstance(node.op, ast.Div) and left % right == 0:
                return left // right
            return OPERATORS[type(node.op)](left, right)
        raise ValueError("another kind of expression")

    try:
        return visit(ast.parse(expression, mode="eval").body)
    except (ValueError, SyntaxError, KeyError, ZeroDivisionError, RecursionError):
        return None


if __name__ == "__main__":
    calculator = Calculator({}, 0)
    for text in ("She has 7 * 6 =", "(3 - 10) * 2 =", "x =", "2 ** 9999 ="):
        print(f"{text}{calculator.step(Turn(text, text, 0, 'stop'))}")
