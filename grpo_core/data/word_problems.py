"""The built-in data: arithmetic word problems in GSM8K's form, made by a seeded generator.

Every problem takes two or three operations on small numbers. A row holds `question`, `cot` (the worked steps) and
`answer` ("#### number"). The text of the question alone decides its split, so the splits are disjoint whatever their
sizes and seeds.
"""

import random
import zlib
from collections.abc import Callable

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Ida", "Jon", "Kim", "Leo", "Mia", "Noah", "Ola")
ITEMS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pens", "shells", "stamps", "stickers")

Problem = tuple[str, list[tuple[int, str, int]]]  # question, steps as (left, operator, right)


def word_problems(split: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` distinct problems of `split` ('train' or 'test') as rows of question, cot and answer.

    >>> word_problems("test", 1)[0]["answer"].startswith("#### ")
    True
    """
    assert split in ("train", "test")
    rng = random.Random(f"{split}-{seed}")
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        question, steps = rng.choice(KINDS)(rng)
        held_out = zlib.crc32(question.encode()) % 10 == 0
        if held_out == (split == "test") and question not in rows and all(0 < solve(*step) < 1000 for step in steps):
            lines = [f"{left} {sign} {right} = {solve(left, sign, right)}" for left, sign, right in steps]
            answer = f"#### {solve(*steps[-1])}"
            rows[question] = {"question": question, "cot": ". ".join(lines) + ".", "answer": answer}
    return list(rows.values())


def solve(left: int, sign: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[sign]


def _buys_and_gives(rng: random.Random) -> Problem:
    name, item, a, b = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(10, 50), rng.randint(5, 40)
    c = rng.randint(2, a + b - 1)
    return (
        f"{name} has {a} {item}. {name} buys {b} more and gives {c} away. How many {item} are left?",
        [(a, "+", b), (a + b, "-", c)],
    )


def _boxes(rng: random.Random) -> Problem:
    name, item, n, k = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(3, 9), rng.randint(3, 9)
    extra = rng.randint(5, 40)
    sold = rng.randint(2, n * k + extra - 1)
    return (
        f"{name} has {n} boxes with {k} {item} each and {extra} loose {item}, and sells {sold}. "
        f"How many {item} are left?",
        [(n, "*", k), (n * k, "+", extra), (n * k + extra, "-", sold)],
    )


def _change(rng: random.Random) -> Problem:
    name, item, n, price = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(3, 12), rng.randint(3, 9)
    paid = n * price + rng.randint(3, 40)
    return (
        f"{name} buys {n} {item} for {price} dollars each and pays with {paid} dollars. How many dollars come back?",
        [(n, "*", price), (paid, "-", n * price)],
    )


def _shares(rng: random.Random) -> Problem:
    name, item, people, each = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(3, 9), rng.randint(3, 9)
    total, lost = people * each, rng.randint(3, 20)
    a = rng.randint(2, total + lost - 2)
    return (
        f"{name} finds {a} {item}, then {total + lost - a} more, loses {lost}, and shares the rest evenly among "
        f"{people} friends. How many {item} does each friend get?",
        [(a, "+", total + lost - a), (total + lost, "-", lost), (total, "/", people)],
    )


def _ages(rng: random.Random) -> Problem:
    (one, two, three), a, b, k = rng.sample(NAMES, 3), rng.randint(5, 20), rng.randint(3, 12), rng.randint(2, 3)
    return (
        f"{one} is {a} years old. {two} is {b} years older. {three} is {k} times as old as {two}. "
        f"How old are {one} and {three} together?",
        [(a, "+", b), (a + b, "*", k), (k * (a + b), "+", a)],
    )


def _days(rng: random.Random) -> Problem:
    name, item, a, days = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(3, 9), rng.randint(3, 9)
    b, c = rng.randint(2, a * days - 1), rng.randint(5, 40)
    return (
        f"{name} makes {a} {item} a day for {days} days, sells {b} and then gets {c} as a gift. "
        f"How many {item} does {name} have now?",
        [(a, "*", days), (a * days, "-", b), (a * days - b, "+", c)],
    )


def _two_shops(rng: random.Random) -> Problem:
    name, (first, second) = rng.choice(NAMES), rng.sample(ITEMS, 2)
    a, p, b, q = rng.randint(3, 9), rng.randint(3, 9), rng.randint(3, 9), rng.randint(3, 9)
    return (
        f"{name} buys {a} {first} for {p} dollars each and {b} {second} for {q} dollars each. "
        f"How many dollars does {name} spend?",
        [(a, "*", p), (b, "*", q), (a * p, "+", b * q)],
    )


def _teams(rng: random.Random) -> Problem:
    item, a, b, c, k = rng.choice(ITEMS), *(rng.randint(3, 12) for _ in range(3)), rng.randint(2, 4)
    return (
        f"Three teams collect {a}, {b} and {c} {item}. A fourth team collects {k} times as many as the three together. "
        f"How many {item} does the fourth team collect?",
        [(a, "+", b), (a + b, "+", c), (a + b + c, "*", k)],
    )


KINDS: tuple[Callable[[random.Random], Problem], ...] = (
    _buys_and_gives, _boxes, _change, _shares, _ages, _days, _two_shops, _teams,
)  # fmt: skip
