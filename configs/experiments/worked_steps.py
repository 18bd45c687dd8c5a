"""A reward with partial credit: the share of a problem's solution steps that a completion contains, in order."""

import re

EQUATION = re.compile(r"(?<![\d.])(\d+) *([-+*/x×÷]) *(\d+) *= *(\d+)(?![.\d]*\d)")
SIGNS = {"x": "*", "×": "*", "÷": "/"}


def worked_steps(completions, cot):
    """Return the share of solution steps that the completion contains, in [0, 1].

    The next expected step gives half a point for the right operation and half a point for its result. The points are
    divided by the number of steps in the completion or in the solution `cot`, whichever is larger, so superfluous steps
    lower the reward.
    """
    return [_score(steps_in(text), steps_in(worked)) for text, worked in zip(completions, cot, strict=True)]


def steps_in(text):
    """Return every `a + b = c` of the text in order, as (operation, result); the operands of + and * are sorted."""
    steps = []
    for left, sign, right, result in EQUATION.findall(text):
        operands, sign = (int(left), int(right)), SIGNS.get(sign, sign)
        steps.append(((sign, *(sorted(operands) if sign in "+*" else operands)), int(result)))
    return steps


def _score(written, wanted):
    points = matched = 0  # matched: the number of solution steps that were found
    for operation, result in written:
        if matched < len(wanted) and operation == wanted[matched][0]:
            points += 0.5 + 0.5 * (result == wanted[matched][1])
            matched += 1
    return points / max(len(wanted), len(written), 1)
