"""The searches over supports, against all supports and against each other."""

import numpy as np
import pytest
from gramians import FAMILIES, gramian, jacobian, supports, whole_jacobians
from hypothesis import given, settings

from mogb.solvers.active_set import block_pivoting, descend, least_squares
from mogb.solvers.scaling import unit_diagonal


def value(matrix, target, point):
    return point @ matrix @ point / 2 - target @ point


def lowest(matrix, target):
    """The minimum over u >= 0, from the least squares solution on every support."""
    best = 0.0
    for support in supports(len(target)):
        point = np.zeros(len(target))
        point[support] = np.linalg.lstsq(matrix[np.ix_(support, support)], target[support], rcond=None)[0]
        if point.min() >= 0:
            best = min(best, value(matrix, target, point))
    return best


def violation(matrix, target, point):
    slack = matrix @ point - target
    return max(-slack.min(), -point.min(), np.minimum(point, slack).max())


@settings(max_examples=40, deadline=None)
@given(whole_jacobians)
def test_descent_finds_the_lowest_point_of_all_supports(rows):
    target = gramian(rows) @ (np.arange(len(rows)) - 1.5)  # in the range of the matrix, so that there is a minimum
    point, _ = descend(gramian(rows), target, np.zeros(len(rows)), 200)
    assert point.min() >= 0
    assert value(gramian(rows), target, point) == pytest.approx(lowest(gramian(rows), target), abs=1e-9)


@pytest.mark.parametrize("size", [5, 30])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_methods_agree_on_the_conditions_of_optimality(family, size):
    _, cosines = unit_diagonal(gramian(jacobian(family, size)))
    targets = -cosines @ np.random.default_rng(size).normal(size=(size, size))
    together = block_pivoting(cosines, targets.T, 100)
    solved = 0
    for target, point in zip(targets.T, together, strict=True):
        alone, _ = descend(cosines, target, np.zeros(size), 10 * size)
        assert violation(cosines, target, alone) <= 1e-9 * (1 + alone.sum())
        if point.any() or target.max() <= 0:
            solved += 1
            assert violation(cosines, target, point) <= 1e-9 * (1 + point.sum())
            assert value(cosines, target, point) == pytest.approx(value(cosines, target, alone), rel=1e-8, abs=1e-10)
    assert solved >= (0 if "more rows" in family else size // 2)


def test_descent_uses_its_steps_to_go_down():
    matrix = gramian(jacobian("conflict .9", 12))
    target = matrix @ np.random.default_rng(0).normal(size=12)
    values = [value(matrix, target, descend(matrix, target, np.zeros(12), steps)[0]) for steps in range(40)]
    assert values[0] == 0
    assert (np.diff(values) <= 1e-12).all()
    assert values[-1] < values[3] < 0


def test_descent_ends_on_an_indefinite_matrix():
    # 1/2 (x^2 + y^2) - 1.1 x y - x - y has no minimum over x, y >= 0.
    point, steps = descend(np.array([[1.0, -1.1], [-1.1, 1.0]]), np.ones(2), np.zeros(2), 100)
    assert steps < 10
    assert np.isfinite(point).all()


def test_least_squares_says_when_it_gave_up():
    matrix = jacobian("conflict .9", 12).T
    assert least_squares(matrix, matrix.sum(axis=1), 1) is None
    np.testing.assert_allclose(least_squares(matrix, matrix.sum(axis=1), 100), np.ones(12), rtol=1e-9)
