"""Split gsm8k/train.jsonl into training and validation data, and add rows of calculations.

    python configs/experiments/gsm8k_files.py

Writes gsm8k/validation.jsonl (the last 500 training questions), gsm8k/rest.jsonl (the other questions) and
gsm8k/warmup.jsonl: the other questions, and rows of calculations, which are those of their solutions with other numbers.
"""

import json
import random
import re
from pathlib import Path

from right_calculations import MARKED, value_of

FOLDER = Path("gsm8k")
HELD_OUT = 500  # questions for validation
DRILLS = 3500  # rows of calculations
CALCULATIONS = 8  # in each of these rows, at most
MAX_TRIES = 40  # for other numbers in a formula


def replace_number(number, draw):
    """Return a random number of as many digits; half the time it also keeps the zeros at the end."""
    whole, point, part = number.partition(".")
    zeros = len(whole) - len(whole.rstrip("0")) if draw.random() < 0.5 and not point else 0
    digits = max(len(whole) - zeros, 1)
    low, high = (10 ** (digits - 1) if digits > 1 else (0 if point else 2)), 10**digits - 1
    digits_before = str(draw.randint(low, high)) + "0" * zeros
    return digits_before + point + "".join(str(draw.randint(1, 9)) for _ in part)


def replace_numbers(formula, draw):
    """Return the formula with other numbers, and its result; None if no try gives a result of at most two decimals."""
    for _ in range(MAX_TRIES):
        candidate = re.sub(r"\d*\.?\d+", lambda match: replace_number(match[0], draw), formula)
        if match := re.fullmatch(r"(\d+)/(\d+)", candidate):  # a division without a remainder
            candidate = f"{int(match[2]) * max(1, int(match[1]) // int(match[2]))}/{match[2]}"
        try:
            result = value_of(candidate)
        except (SyntaxError, ValueError, ZeroDivisionError, KeyError):
            return None
        if 0 <= result < 1e7 and abs(result - round(result, 2)) < 1e-9:
            return candidate, f"{round(result, 2):.2f}".rstrip("0").rstrip(".")
    return None


def main():
    draw = random.Random(0)
    rows = [json.loads(line) for line in (FOLDER / "train.jsonl").open(encoding="utf-8")]
    rest, held = rows[:-HELD_OUT], rows[-HELD_OUT:]
    formulas = [f.replace(" ", "") for row in rest for f, _ in MARKED.findall(row["answer"])]
    drills = []
    while len(drills) < DRILLS:
        tries = [replace_numbers(draw.choice(formulas), draw) for _ in range(CALCULATIONS)]
        calculations = [calculation for calculation in tries if calculation]
        lines = [f"{formula}=<<{formula}={result}>>{result}" for formula, result in calculations]
        question = "Calculate " + ", ".join(formula for formula, _ in calculations) + "."
        drills.append({"question": question, "answer": "\n".join([*lines, f"#### {calculations[-1][1]}"])})
    for name, content in (("rest", rest), ("validation", held), ("warmup", rest + drills)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (FOLDER / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
