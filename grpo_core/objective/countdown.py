r"""Read and compute equations of the four operations, for the Countdown task.

An expression has numbers without a sign, + - * / (also × · ÷ and \times \cdot \div), a minus in front of a number or a
bracket, brackets of any kind, and \frac{}{}. It is parsed and computed in exact fractions; no text is run as code. The
time is linear in the text, whose length and depth are limited.
"""

import re
from fractions import Fraction
from typing import Any

from grpo_core.objective.answers import find_answer

MAX_EXPRESSION_CHARS = 500
MAX_DEPTH = 40  # of brackets

_TAGGED = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.S)
_TOKEN = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?(?![0-9.])|\\[dt]?frac(?![a-z])|[-+*/()])\s*")
_EQUAL_SYMBOLS = [
    (re.compile(r"\\(?:times|cdot)(?![a-z])|[×·∙⋅]"), "*"),
    (re.compile(r"\\div(?![a-z])|÷"), "/"),
    (re.compile("[−–]"), "-"),
    (re.compile(r"\\(?:left|right)(?![a-z])|\\[,;!() \[\]]|[$`]"), " "),
    (re.compile(r"[\[{]"), "("),
    (re.compile(r"[\]}]"), ")"),
]


def read_number(value: Any) -> Fraction | None:
    """Return a number of the data, which may be text, exactly; None if it is no number or below 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    text = str(value).strip()
    return Fraction(text) if re.fullmatch(r"[0-9]{1,30}(?:\.[0-9]{1,30})?", text) else None


def read_numbers(value: Any) -> list[Fraction] | None:
    """Return the numbers of a list, or of a text such as "[3, 7, 8]"; None if one of them is none."""
    items = value.strip("[]() ").replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not items:
        return None
    numbers = [read_number(item) for item in items]
    return None if None in numbers else [number for number in numbers if number is not None]


def find_equation(text: str, *, strict: bool = False) -> str | None:
    r"""Return the text in which a completion states its equation, or None.

    It is the content of the last <answer>...</answer>, else the line after the last ####, else the content of the last
    \boxed{}, else what follows the last "answer is" or "answer:", else (unless `strict`) the last line. If that has a
    colon, only the part after the last colon counts.
    """
    tagged = _TAGGED.findall(text)
    answer = tagged[-1] if tagged else find_answer(text, strict=strict)
    return None if answer is None else answer.rpartition(":")[2]


def compute(text: str) -> tuple[Fraction | None, list[Fraction]] | None:
    """Return the value of an expression, None where it divides by 0, and the numbers in it; None for another text.

    >>> compute("(44 + 19) / 3")
    (Fraction(21, 1), [Fraction(44, 1), Fraction(19, 1), Fraction(3, 1)])
    >>> compute("__import__('os')") is None
    True
    """
    tokens = _split(text)
    if not tokens:
        return None
    expression = _Expression(tokens)
    try:
        value = expression.read_sum()
    except ValueError:
        return None
    except ZeroDivisionError:
        return None, expression.numbers
    return (value, expression.numbers) if expression.is_at_end() else None


def solve(text: str | None) -> tuple[Fraction | None, list[Fraction]] | None:
    """Return the value and the numbers of an equation `expression = value`, whose right side may be left out.

    The value is None where it divides by 0 or the two sides differ. None for a text that is no equation.
    """
    if text is None or len(text) > MAX_EXPRESSION_CHARS:
        return None
    left, equals, right = text.strip().strip(".*_").partition("=")
    computed = compute(left)
    if computed is None or not equals:
        return computed
    other = compute(right)
    if other is None:
        return None
    value, numbers = computed
    return (value if value == other[0] else None), numbers


def _split(text: str) -> list[str]:
    """Return the tokens of an expression, or an empty list if there is another character."""
    for pattern, symbol in _EQUAL_SYMBOLS:
        text = pattern.sub(symbol, text)
    tokens, end = [], 0
    for match in _TOKEN.finditer(text):
        if match.start() != end:
            return []
        tokens.append(match[1])
        end = match.end()
    return tokens if end == len(text) else []


class _Expression:
    """Tokens and a place in them; each method reads one part of the grammar and returns its value.

    Raises:
        ValueError: the tokens are no expression.
        ZeroDivisionError: it divides by 0.
    """

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.place, self.depth = tokens, 0, 0
        self.numbers = [Fraction(token) for token in tokens if token[0].isdigit()]

    def is_at_end(self) -> bool:
        return self.place == len(self.tokens)

    def read_sum(self) -> Fraction:
        value = self._read_product()
        while sign := self._take("+", "-"):
            other = self._read_product()
            value = value + other if sign == "+" else value - other
        return value

    def _read_product(self) -> Fraction:
        value = self._read_signed()
        while sign := self._take("*", "/"):
            other = self._read_signed()
            value = value * other if sign == "*" else value / other
        return value

    def _read_signed(self) -> Fraction:
        return -self._read_part() if self._take("-") else self._read_part()

    def _read_part(self) -> Fraction:
        if self._peek() == "(":
            return self._read_brackets()
        token = self._peek()
        self.place += 1
        if token.startswith("\\"):
            above = self._read_brackets()
            return above / self._read_brackets()
        return Fraction(token)  # ValueError for an operator

    def _read_brackets(self) -> Fraction:
        self.depth += 1
        if not self._take("(") or self.depth > MAX_DEPTH:
            raise ValueError
        value = self.read_sum()
        if not self._take(")"):
            raise ValueError
        self.depth -= 1
        return value

    def _peek(self) -> str:
        return "" if self.is_at_end() else self.tokens[self.place]

    def _take(self, *signs: str) -> str:
        """Return the next token and go on if it is one of `signs`, else an empty text."""
        token = self._peek()
        if token not in signs:
            return ""
        self.place += 1
        return token
