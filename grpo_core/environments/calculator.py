"""The built-in environment `calculator`: it completes `expression =` wherever the policy writes it.

The policy's turn ends at a text of sampling.stop that ends in an equals sign; the calculator appends the value, and the
policy goes on. Any other turn ends the completion.

    bash launch.sh 2 name=mine environment.name=calculator sampling.stop=' ='
"""

import ast
import operator
import re
from typing import Any

from grpo_core.config.environment_functions import CALCULATOR, ENVIRONMENTS
from grpo_core.environments.interface import Turn

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
EXPRESSION = re.compile(r"([\d+*/ ()-]*\d[\d+*/ ()-]*)=$")  # at the end of a text


@ENVIRONMENTS.register(CALCULATOR)
class Calculator:
    """The calculator of one completion. It has no state, so the row and the seed are not needed."""

    def __init__(self, row: dict[str, Any], seed: int, *, most_digits: int = 12) -> None:
        self.most_digits = most_digits

    def step(self, turn: Turn) -> str | None:
        """Return the value of the expression in front of the equals sign; None, the end, after any other turn.

        It is "?" if there is no value, or one of more than `most_digits` digits.
        """
        if not (turn.ended_by == "stop" and turn.text.endswith("=")):
            return None
        expression = EXPRESSION.search(turn.completion)
        value = evaluate(expression[1].strip()) if expression else None
        return " ?" if value is None or abs(value) >= 10**self.most_digits else f" {value}"


def evaluate(expression: str) -> int | None:
    """Return the value of an expression of whole numbers, + - * / and brackets, or None if it has none.

    >>> [evaluate(text) for text in ("7 * (6 - 9)", "7 / 2", "2 ** 9", "")]
    [-21, None, None, None]
    """

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
    except (ValueError, SyntaxError, KeyError, ZeroDivisionError, RecursionError, MemoryError):
        return None
