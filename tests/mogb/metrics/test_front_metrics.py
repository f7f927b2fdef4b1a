"""Front metrics, against their definitions in loops, moocore and hand calculations."""

import math

import moocore
import numpy as np
import pytest
import torch

from mogb.metrics import (
    distance_to_polyline,
    distance_to_samples,
    epsilon_plus,
    igd,
    igd_plus,
    non_dominated,
    spacing,
)


def draws(*shape, seed=0):
    return np.random.default_rng(seed).random(shape)


@pytest.mark.parametrize("objectives", [1, 2, 3, 6])
@pytest.mark.parametrize("grid", [False, True])
def test_the_non_dominated_points_are_those_that_no_other_dominates(objectives, grid):
    points = draws(150, objectives, seed=objectives)
    if grid:
        points = np.round(points * 4) / 4  # many equal coordinates and equal points
    expected = [not any((other <= point).all() and (other < point).any() for other in points) for point in points]
    assert non_dominated(points).tolist() == expected
    assert non_dominated(torch.from_numpy(points)).tolist() == expected


def test_rounding_of_the_sums_hides_no_domination():
    assert non_dominated(np.array([[1e17, 1.0], [1e17, 0.0]])).tolist() == [False, True]
    assert non_dominated(np.array([[0.0, 1e17], [1.0, 1e17]])).tolist() == [True, False]


@pytest.mark.parametrize("objectives", [2, 3, 5])
def test_indicators_are_those_of_moocore(objectives):
    points, front = draws(40, objectives, seed=1), draws(300, objectives, seed=2) - 0.3
    assert igd(points, front) == pytest.approx(moocore.igd(points, ref=front), rel=1e-12)
    assert igd_plus(points, front) == pytest.approx(moocore.igd_plus(points, ref=front), rel=1e-12)
    assert epsilon_plus(points, front) == pytest.approx(moocore.epsilon_additive(points, ref=front), rel=1e-12)


def test_indicators_by_hand():
    points, front = np.array([[2.0, 0.0], [0.0, 3.0]]), np.array([[0.0, 1.0], [1.0, 0.0]])
    assert igd(points, front) == pytest.approx((2.0 + 1.0) / 2)  # (0,1): sqrt5 or 2; (1,0): 1 or sqrt10
    assert igd_plus(points, front) == pytest.approx((2.0 + 1.0) / 2)
    assert epsilon_plus(points, front) == 2.0
    better = np.array([[-1.0, -1.0]])
    assert igd(better, front) == pytest.approx((math.sqrt(5) + math.sqrt(5)) / 2)
    assert igd_plus(better, front) == 0.0  # nothing is worse anywhere
    assert epsilon_plus(better, front) == -1.0


def test_distances_by_hand():
    square = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0]])
    points = np.array([[1.0, 1.0], [3.0, 3.0], [1.0, -1.0]])
    np.testing.assert_allclose(distance_to_polyline(points, square), [1.0, math.sqrt(2), 1.0])
    np.testing.assert_allclose(distance_to_samples(points, square), [math.sqrt(2)] * 3)
    np.testing.assert_allclose(distance_to_polyline(points, square[:1]), [math.sqrt(2), math.sqrt(18), math.sqrt(2)])


def test_distance_to_a_polyline_in_space():
    line = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    found = distance_to_polyline(np.array([[1.0, 0.0, 0.0], [2.0, 2.0, 2.0]]), line)
    np.testing.assert_allclose(found, [math.sqrt(2 / 3), math.sqrt(3)])


def test_many_points_are_measured_in_parts():
    points, front = draws(3000, 2, seed=3), draws(2000, 2, seed=4)
    found = distance_to_samples(points, front)
    for index in (0, 1, 1500, 2999):
        assert found[index] == pytest.approx(np.hypot(*(points[index] - front).T).min(), rel=1e-12)


def test_spacing_by_hand():
    # Manhattan distances to the nearest: 1, 1, 3, so the mean is 5/3 and the sum of squares 24/9.
    points = np.array([[0.0, 0.0], [0.5, 0.5], [2.5, 1.5]])
    assert spacing(points) == pytest.approx(math.sqrt(24 / 9 / 2))
    assert spacing(np.array([[0.0, 3.0], [1.0, 2.0], [2.0, 1.0]])) == 0.0


@pytest.mark.parametrize("metric", [igd, igd_plus, epsilon_plus, distance_to_samples, distance_to_polyline])
def test_bad_input_is_explained(metric):
    with pytest.raises(ValueError, match="front must hold at least one point"):
        metric(np.ones((2, 2)), np.ones((0, 2)))
    with pytest.raises(ValueError, match="points holds NaN or Inf"):
        metric(np.array([[1.0, np.nan]]), np.ones((1, 2)))


def test_spacing_of_one_point_is_refused():
    with pytest.raises(ValueError, match="at least two points, but got 1"):
        spacing(np.ones((1, 2)))
