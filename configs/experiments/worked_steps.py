"""A reward that gives part of the credit: how much of a problem's worked steps a completion holds, in their order."""

import re

EQUATION = re.compile(r"(?<![\d.])(\d+) *([-+*/x×÷]) *(\d+) *= *(\d+)(?![.\d]*\d)")
SIGNS = {"x": "*", "×": "*", "÷": "/"}


def worked_steps(completions, cot):
    """In [0, 1]: half a point for the right operation, another for its result, over the most steps of the two.

    A step counts after those before it. Steps that are too many make each count less, so writing all there could be
    does not pay.
    """
    return [_score(steps_in(text), steps_in(worked)) for text, worked in zip(completions, cot, strict=True)]


def steps_in(text):
    """Every `a + b = c` in the text, in order, as (operation, result); the operands of + and * are sorted."""
    found = []
    for left, sign, right, result in EQUATION.findall(text):
        operands, sign = (int(left), int(right)), SIGNS.get(sign, sign)
        found.append(((sign, *(sorted(operands) if sign in "+*" else operands)), int(result)))
    return found


def _score(written, wanted):
    points = held = 0
    for operation, result in written:
        if held < len(wanted) and operation == wanted[held][0]:
            points += 0.5 + 0.5 * (result == wanted[held][1])
            held += 1
    return points / max(len(wanted), len(written), 1)
