import itertools
import math
import random

import pytest

from grpo_core.training.eval_statistics import bootstrap_interval, majority_at_k, mcnemar, pass_at_k


@pytest.mark.parametrize("n, c, k", [(n, c, k) for n in range(1, 7) for c in range(n + 1) for k in range(1, n + 1)])
def test_pass_at_k_is_the_mean_over_all_choices_of_k(n, c, k):
    samples = [i < c for i in range(n)]
    choices = list(itertools.combinations(samples, k))
    assert pass_at_k([c], n, k)[0] == pytest.approx(sum(any(choice) for choice in choices) / len(choices))


def test_majority():
    right = [[True, False, True, False]]
    assert majority_at_k([["a", "b", "a", "c"]], right, 4) == [1.0]
    assert majority_at_k([["a", "b", "a", "c"]], right, 2) == [0.5]
    assert majority_at_k([["a", "b", "a", "c"]], right, 1) == [1.0]
    assert majority_at_k([["a", "b", "b", "b"]], [[True, False, False, False]], 4) == [0.0]
    assert majority_at_k([[None, None, None, "a"]], [[False, False, False, True]], 4) == [1.0]
    assert majority_at_k([[None, None]], [[False, False]], 2) == [0.0]


def test_the_bootstraps_interval_covers_and_is_the_normal_one_for_many():
    draw, covered = random.Random(0), 0
    for trial in range(60):
        low, high = bootstrap_interval([draw.random() < 0.3 for _ in range(80)], draws=400, seed=trial)
        covered += low <= 0.3 <= high
    assert 51 <= covered <= 60
    values = [draw.random() for _ in range(500)]
    mean, spread = sum(values) / 500, math.sqrt(1 / 12 / 500)
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(mean - 1.96 * spread, abs=3e-3) and high == pytest.approx(
        mean + 1.96 * spread, abs=3e-3
    )
    assert bootstrap_interval(values, seed=1) != (low, high) == bootstrap_interval(values)


def test_mcnemar():
    assert mcnemar([True] * 5, [True] * 5) == (0, 0, 1.0)
    assert mcnemar([True, False], [False, True]) == (1, 1, 1.0)
    lost, won, p = mcnemar([True] * 5 + [False] * 30, [False] * 5 + [True] * 20 + [False] * 10)
    assert (lost, won) == (5, 20) and p == pytest.approx(2 * sum(math.comb(25, i) for i in range(6)) / 2**25)
    assert mcnemar([False] * 2000, [True] * 2000)[2] == pytest.approx(0.0, abs=1e-300)  # no overflow
