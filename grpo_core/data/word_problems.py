"""Generate the built-in data: arithmetic word problems in the form of GSM8K.

Every problem takes two or three operations on small numbers, or on numbers that are `scale` times as large. A row holds
`question`, `cot` (the worked steps) and `answer` ("#### number"). The split of a problem is a function of its question,
so the splits are disjoint for all sizes and seeds.
"""

import random
import zlib
from collections.abc import Callable

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Ida", "Jon", "Kim", "Leo", "Mia", "Noah", "Ola")
ITEMS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pens", "shells", "stamps", "stickers")

Problem = tuple[str, list[tuple[int, str, int]]]  # question; steps as (left operand, operator, right operand)
HELD_OUT = 10  # one in so many questions belongs to the test split
MAX_RESULT = 1000  # results of all steps are below it, times the square of the scale, and above 0


class Numbers(random.Random):
    """Random choices, and whole numbers that are `scale` times as large as those of the small problems."""

    def __init__(self, seed: str, scale: int) -> None:
        super().__init__(seed)
        self.scale = scale

    def number(self, low: int, high: int) -> int:
        """Return a number from low to high, times the scale, of as many digits as that has."""
        return self.randint(low * self.scale, (high + 1) * self.scale - 1)


def make_word_problems(split: str, count: int, seed: int = 0, scale: int = 1) -> list[dict[str, str]]:
    """Return `count` distinct problems of `split` ('train' or 'test') as rows of question, cot and answer.

    >>> make_word_problems("test", 1)[0]["answer"].startswith("#### ")
    True
    """
    assert split in ("train", "test")
    rng = Numbers(f"{split}-{seed}", scale)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        question, steps = rng.choice(PROBLEM_KINDS)(rng)
        results = [compute(*step) for step in steps]
        is_test = zlib.crc32(question.encode()) % HELD_OUT == 0
        is_wanted = is_test == (split == "test") and question not in rows
        if is_wanted and all(0 < result < MAX_RESULT * scale**2 for result in results):
            lines = [f"{a} {operator} {b} = {result}" for (a, operator, b), result in zip(steps, results, strict=True)]
            rows[question] = {"question": question, "cot": ". ".join(lines) + ".", "answer": f"#### {results[-1]}"}
    return list(rows.values())


def compute(left: int, operator: str, right: int) -> int:
    """Return the result of one step; division is exact in every problem."""
    return {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[operator]


def _buys_and_gives(rng: Numbers) -> Problem:
    name, item, a, b = rng.choice(NAMES), rng.choice(ITEMS), rng.number(10, 50), rng.number(5, 40)
    c = rng.randint(2, a + b - 1)
    return (
        f"{name} has {a} {item}. {name} buys {b} more and gives {c} away. How many {item} are left?",
        [(a, "+", b), (a + b, "-", c)],
    )


def _boxes(rng: Numbers) -> Problem:
    name, item, n, k = rng.choice(NAMES), rng.choice(ITEMS), rng.number(3, 9), rng.number(3, 9)
    extra = rng.number(5, 40)
    sold = rng.randint(2, n * k + extra - 1)
    return (
        f"{name} has {n} boxes with {k} {item} each and {extra} loose {item}, and sells {sold}. "
        f"How many {item} are left?",
        [(n, "*", k), (n * k, "+", extra), (n * k + extra, "-", sold)],
    )


def _change(rng: Numbers) -> Problem:
    name, item, n, price = rng.choice(NAMES), rng.choice(ITEMS), rng.number(3, 12), rng.number(3, 9)
    paid = n * price + rng.number(3, 40)
    return (
        f"{name} buys {n} {item} for {price} dollars each and pays with {paid} dollars. How many dollars come back?",
        [(n, "*", price), (paid, "-", n * price)],
    )


def _shares(rng: Numbers) -> Problem:
    name, item, people, each = rng.choice(NAMES), rng.choice(ITEMS), rng.number(3, 9), rng.number(3, 9)
    total, lost = people * each, rng.number(3, 20)
    a = rng.randint(2, total + lost - 2)
    return (
        f"{name} finds {a} {item}, then {total + lost - a} more, loses {lost}, and shares the rest evenly among "
        f"{people} friends. How many {item} does each friend get?",
        [(a, "+", total + lost - a), (total + lost, "-", lost), (total, "/", people)],
    )


def _ages(rng: Numbers) -> Problem:
    (first, second, third), a, b, k = rng.sample(NAMES, 3), rng.number(5, 20), rng.number(3, 12), rng.randint(2, 3)
    return (
        f"{first} is {a} years old. {second} is {b} years older. {third} is {k} times as old as {second}. "
        f"How old are {first} and {third} together?",
        [(a, "+", b), (a + b, "*", k), (k * (a + b), "+", a)],
    )


def _days(rng: Numbers) -> Problem:
    name, item, a, days = rng.choice(NAMES), rng.choice(ITEMS), rng.number(3, 9), rng.number(3, 9)
    b, c = rng.randint(2, a * days - 1), rng.number(5, 40)
    return (
        f"{name} makes {a} {item} a day for {days} days, sells {b} and then gets {c} as a gift. "
        f"How many {item} does {name} have now?",
        [(a, "*", days), (a * days, "-", b), (a * days - b, "+", c)],
    )


def _two_shops(rng: Numbers) -> Problem:
    name, (first, second) = rng.choice(NAMES), rng.sample(ITEMS, 2)
    a, p, b, q = rng.number(3, 9), rng.number(3, 9), rng.number(3, 9), rng.number(3, 9)
    return (
        f"{name} buys {a} {first} for {p} dollars each and {b} {second} for {q} dollars each. "
        f"How many dollars does {name} spend?",
        [(a, "*", p), (b, "*", q), (a * p, "+", b * q)],
    )


def _teams(rng: Numbers) -> Problem:
    item, a, b, c, k = rng.choice(ITEMS), *(rng.number(3, 12) for _ in range(3)), rng.randint(2, 4)
    return (
        f"Three teams collect {a}, {b} and {c} {item}. A fourth team collects {k} times as many as the three together. "
        f"How many {item} does the fourth team collect?",
        [(a, "+", b), (a + b, "+", c), (a + b + c, "*", k)],
    )


PROBLEM_KINDS: tuple[Callable[[Numbers], Problem], ...] = (
    _buys_and_gives, _boxes, _change, _shares, _ages, _days, _two_shops, _teams,
)  # fmt: skip
