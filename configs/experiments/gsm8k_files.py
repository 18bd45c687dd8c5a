"""gsm8k/train.jsonl cut into what is trained on and what is watched, and calculations beside it.

    python configs/experiments/gsm8k_files.py

Writes gsm8k/validation.jsonl (the last 500 training questions), gsm8k/rest.jsonl (the others) and gsm8k/warmup.jsonl: the
others and rows of calculations, of the forms that their own solutions have, with other numbers.
"""

import json
import random
import re
from pathlib import Path

from right_calculations import MARKED, value_of

FOLDER = Path("gsm8k")
HELD_OUT, DRILLS, CALCULATIONS = 500, 3500, 8  # rows; rows; in each


def another(number, draw):
    """A number of as many digits, with as many zeros at its end or, half the time, without them."""
    whole, point, part = number.partition(".")
    zeros = len(whole) - len(whole.rstrip("0")) if draw.random() < 0.5 and not point else 0
    digits = max(len(whole) - zeros, 1)
    low, high = (10 ** (digits - 1) if digits > 1 else (0 if point else 2)), 10**digits - 1
    found = str(draw.randint(low, high)) + "0" * zeros
    return found + point + "".join(str(draw.randint(1, 9)) for _ in part)


def like(formula, draw):
    """The formula with other numbers and its result, or None where none was found that can be written down."""
    for _ in range(40):
        made = re.sub(r"\d*\.?\d+", lambda found: another(found[0], draw), formula)
        if match := re.fullmatch(r"(\d+)/(\d+)", made):  # mostly without a remainder
            made = f"{int(match[2]) * max(1, int(match[1]) // int(match[2]))}/{match[2]}"
        try:
            result = value_of(made)
        except (SyntaxError, ValueError, ZeroDivisionError, KeyError):
            return None
        if 0 <= result < 1e7 and abs(result - round(result, 2)) < 1e-9:
            return made, f"{round(result, 2):.2f}".rstrip("0").rstrip(".")
    return None


def main():
    draw = random.Random(0)
    rows = [json.loads(line) for line in (FOLDER / "train.jsonl").open(encoding="utf-8")]
    rest, held = rows[:-HELD_OUT], rows[-HELD_OUT:]
    formulas = [f.replace(" ", "") for row in rest for f, _ in MARKED.findall(row["answer"])]
    drills = []
    while len(drills) < DRILLS:
        found = [one for one in (like(draw.choice(formulas), draw) for _ in range(CALCULATIONS)) if one]
        lines = [f"{formula}=<<{formula}={result}>>{result}" for formula, result in found]
        question = "Calculate " + ", ".join(formula for formula, _ in found) + "."
        drills.append({"question": question, "answer": "\n".join([*lines, f"#### {found[-1][1]}"])})
    for name, content in (("rest", rest), ("validation", held), ("warmup", rest + drills)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (FOLDER / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
