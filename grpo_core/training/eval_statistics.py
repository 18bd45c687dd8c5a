"""Statistics of evaluations: pass@k, maj@k, confidence intervals, and the comparison of two policies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from grpo_core.random_keys import make_generator, make_key


def pass_at_k(correct: Sequence[int], n: int, k: int) -> list[float]:
    """Return pass@k of each problem, the probability that at least one of k samples is correct.

    `correct` holds c, the number of correct samples among n, for each problem. The unbiased estimate is
    1 - C(n - c, k) / C(n, k). arXiv:2107.03374.

    >>> pass_at_k([0, 1, 4], n=4, k=2)
    [0.0, 0.5, 1.0]
    """
    assert 1 <= k <= n and all(0 <= c <= n for c in correct)
    return [1.0 - math.comb(n - c, k) / math.comb(n, k) for c in correct]


def majority_at_k(answers: Sequence[Sequence[Hashable | None]], right: Sequence[Sequence[bool]], k: int) -> list[float]:
    """Return maj@k of each problem: 1 if the most common answer of its first k samples is correct, else 0.

    `answers` holds the answer of each sample; equivalent answers must compare equal, and None means no answer. `right`
    holds True for each correct sample. With a tie, the value is the share of correct answers among the tied ones. A
    problem without an answer gives 0. arXiv:2203.11171.

    >>> majority_at_k([["7", "7", "8"], ["1", "2", None]], [[True, True, False], [True, False, False]], k=3)
    [1.0, 0.5]
    """
    shares = []
    for samples, marks in zip(answers, right, strict=True):
        counts = Counter(answer for answer in samples[:k] if answer is not None)
        most = max(counts.values(), default=0)
        winners = {answer for answer, count in counts.items() if count == most}
        correct = {answer for answer, mark in zip(samples[:k], marks[:k], strict=True) if mark and answer in winners}
        shares.append(len(correct) / len(winners) if winners else 0.0)
    return shares


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of the proportion correct / n; by default at 95 %.

    It is accurate near 0 and 1 too. Wilson 1927, J. Am. Stat. Assoc. 22, 209-212.
    """
    if n == 0:
        return 0.0, 1.0
    p, spread = correct / n, z * z / n
    centre = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the bootstrap interval of the mean: resample problems with replacement. Efron 1979, Ann. Stat. 7, 1-26.

    `values` holds one number per problem, so that the samples of a problem stay together.
    """
    array, generator = np.asarray(values, dtype=float), make_generator(make_key("bootstrap", seed))
    parts = [min(500, draws - done) for done in range(0, draws, 500)]  # bounds the memory to a few MB
    means = [array[generator.integers(len(array), size=(part, len(array)))].mean(axis=1) for part in parts]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int, float]:
    """Compare two policies on the same problems; return (solved only before, solved only after, p-value).

    The exact two-sided p-value is that of a fair coin on the problems on which the policies differ. McNemar 1947,
    Psychometrika 12, 153-157.

    >>> mcnemar([True, False, False, False, False, False], [True, True, True, True, True, True])
    (0, 5, 0.0625)
    """
    lost = sum(first and not second for first, second in zip(before, after, strict=True))
    won = sum(second and not first for first, second in zip(before, after, strict=True))
    n, fewer = lost + won, min(lost, won)
    tail = sum(math.comb(n, i) for i in range(fewer + 1)) * 2
    return lost, won, 1.0 if n == 0 or 2 * fewer == n else min(1.0, float(tail / 2**n))
