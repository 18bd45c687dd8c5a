"""Counts and small numbers in messages: "1 step", "7,500 steps"."""

from __future__ import annotations


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, which is plural unless the number is 1; from 1,000 on with separators.

    >>> count(1, "step"), count(7500, "step"), count(2, "box", "boxes")
    ('1 step', '7,500 steps', '2 boxes')
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
