"""Where a loss's gradient stops in the plane of p, the policy's probability of the token, and q, the sampler's."""

import pytest

from grpo_core.commands.check_loss import PLANE_COLUMNS, PLANE_ROWS, draw_plane
from grpo_core.objective.losses import LOSSES


def centers():
    """(row from the top, column, p, q) of every character."""
    for row in range(PLANE_ROWS):
        for column in range(PLANE_COLUMNS):
            yield row, column, (column + 0.5) / PLANE_COLUMNS, 1 - (row + 0.5) / PLANE_ROWS


@pytest.mark.parametrize(
    "name, args, stops",
    [
        ("grpo", {"clip_low": 0.2, "clip_high": 0.3}, lambda p, q, sign: p / q > 1.3 if sign > 0 else p / q < 0.8),
        ("dppo_tv", {"delta_low": 0.11, "delta_high": 0.21}, lambda p, q, sign: p - q > 0.21 if sign > 0 else q - p > 0.11),
        ("reinforce", {}, lambda p, q, sign: False),
    ],
)
def test_the_plane_is_drawn_as_the_formula_says(name, args, stops):
    for sign in (1, -1):
        plane = draw_plane(LOSSES.build(name, args), sign)
        assert len(plane) == PLANE_ROWS
        for row, column, p, q in centers():
            assert plane[row][column] == ("." if stops(p, q, sign) else "#"), (sign, p, q)


def test_a_pull_against_the_advantage_is_drawn():
    plane = draw_plane(LOSSES.build("ipo", {"threshold": 0.1}), -1)
    assert plane[0][0] == "-" and "#" in plane[PLANE_ROWS - 1]  # far below the sampler only the penalty is left
