"""Counts and small numbers in messages: "1 step", "7,500 steps"."""

from __future__ import annotations

ROUNDING = 5e-7  # a mean of float32 values that is 0 in exact arithmetic is below it


def quantify(number: float, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, which is plural unless the number is 1; from 1,000 on with separators.

    A number that is not an integer has three significant digits.

    >>> quantify(1, "step"), quantify(7500, "step"), quantify(2, "process", "processes")
    ('1 step', '7,500 steps', '2 processes')
    """
    text = f"{number:,}" if isinstance(number, int) else f"{number:.3g}"
    return f"{text} {noun if text == '1' else plural or f'{noun}s'}"


def name_interval(number: int, noun: str) -> str:
    """Return a number with its noun, as after "every": "step", "5 steps"."""
    return noun if number == 1 else quantify(number, noun)


def format_fixed(value: float, digits: int) -> str:
    """Return a number with `digits` decimals; one that rounds to zero has no minus sign.

    >>> format_fixed(-5.4e-09, 4), format_fixed(-0.25, 3)
    ('0.0000', '-0.250')
    """
    return f"{round(value, digits) + 0.0:.{digits}f}"


def format_significant(value: float, digits: int = 4) -> str:
    """Return a mean of log-probs or losses with `digits` significant digits; below ROUNDING it is 0.

    >>> format_significant(-5.4e-09), format_significant(0.0123456)
    ('0', '0.01235')
    """
    return "0" if abs(value) < ROUNDING else f"{value:.{digits}g}"
