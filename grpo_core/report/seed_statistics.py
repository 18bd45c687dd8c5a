"""Statistics over the seeds of a study: intervals of means, exact permutation tests, Holm's correction."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import combinations, product

ROUNDING = 1e-12  # sums that are equal in exact arithmetic differ by less


def exchange_p(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float:
    """Return the exact two-sided p of the difference of two means; `a` and `b` hold the values of each seed.

    If the two do not differ, the values of one seed can be exchanged between them. p is the share of all exchanges
    whose difference is at least as large as the observed one. With one value for each seed an exchange is a flip of the
    sign of its difference, 2**seeds in all. Fisher 1935, The Design of Experiments, section 21.

    >>> exchange_p([[1.0], [2.0], [4.0]], [[0.0], [0.0], [0.0]])
    0.25
    """
    whole, observed = sum(map(sum, (*a, *b))), abs(sum(map(sum, a)) - sum(map(sum, b)))
    choices = [
        [sum(chosen) for chosen in combinations([*left, *right], len(left))] for left, right in zip(a, b, strict=True)
    ]
    return statistics.mean(abs(2 * sum(sums) - whole) >= observed - ROUNDING for sums in product(*choices))


def smallest_p(seeds: int) -> float:
    """Return the smallest p that `exchange_p` can have with one value for each seed.

    >>> smallest_p(5)
    0.0625
    """
    return min(1.0, 2.0 / 2**seeds)


def count_needed_seeds(comparisons: int, level: float) -> int:
    """Return the number of seeds from which on the smallest p, times the number of comparisons, is at most `level`.

    >>> count_needed_seeds(1, 0.05), count_needed_seeds(7, 0.05)
    (6, 9)
    """
    return next(seeds for seeds in range(1, 1000) if comparisons * smallest_p(seeds) <= level)


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number: the smallest times n, the next times n - 1, and so on, ascending.

    The chance of one false rejection or more is then at most the level. Holm 1979, Scand. J. Stat. 6, 65-70.

    >>> holm([0.04, 0.01, 0.03])
    [0.06, 0.03, 0.06]
    """
    corrected, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = largest
    return corrected


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Return Student's interval of the mean; None for fewer than two values. It assumes a normal distribution."""
    if len(values) < 2:
        return None
    mean, n = statistics.mean(values), len(values)
    half = t_quantile(level, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return mean - half, mean + half


def t_quantile(level: float, degrees: int) -> float:
    """Return the t with P(|T| < t) = `level` for Student's distribution with `degrees` degrees of freedom.

    >>> round(t_quantile(0.95, 1), 3), round(t_quantile(0.95, 4), 3)
    (12.706, 2.776)
    """
    low, high = 0.0, math.pi / 2  # of the angle atan(t / sqrt(degrees))
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _t_probability(angle, degrees) < level else (low, angle)
    return math.tan(low) * math.sqrt(degrees)


def _t_probability(angle: float, degrees: int) -> float:
    """Return P(|T| < sqrt(degrees) tan(angle)), a finite sum. Abramowitz and Stegun 1964, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for i in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * i / (i + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
