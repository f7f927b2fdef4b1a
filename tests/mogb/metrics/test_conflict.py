"""Conflict metrics, against the published code and hand calculations."""

import json
import math
import pathlib

import numpy as np
import pytest
import torch

from mogb.metrics import condition_number, conflict_share, cosines, curvature, harmony, magnitude_similarity

CASES = json.loads((pathlib.Path(__file__).parents[2] / "cases" / "problems.json").read_text())["metrics"]


def table(entries):
    return np.array([[float(entry) for entry in row] for row in entries])


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["jacobian"]))
@pytest.mark.parametrize("as_input", [np.array, torch.tensor])
def test_measures_are_those_of_the_published_code(case, as_input):
    jacobian = as_input(case["jacobian"])
    np.testing.assert_allclose(cosines(jacobian), table(case["cos"]), rtol=1e-5)
    np.testing.assert_allclose(curvature(jacobian), table(case["cbm"]), rtol=1e-4, atol=1e-5)
    assert condition_number(jacobian) == pytest.approx(case["cn"], rel=1e-5)
    expected = table(case["gms"])
    np.testing.assert_allclose(magnitude_similarity(jacobian), expected, rtol=1e-5)


def test_measures_survive_norms_whose_squares_leave_the_range():
    jacobian = np.array([[3e200, 4e200], [3e-200, 0.0], [0.0, 5e-200]])
    np.testing.assert_allclose(cosines(jacobian), [[1, 0.6, 0.8], [0.6, 1, 0], [0.8, 0, 1]], atol=1e-15)
    assert magnitude_similarity(jacobian)[1, 2] == pytest.approx(2 * 15 / 34)


def test_opposite_gradients_have_no_curvature_measure_and_equal_ones_have_none_either():
    measure = curvature(np.array([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]))
    assert np.isnan(measure[0, 1])
    assert measure[0, 2] == 0.0


def test_the_share_of_conflicting_pairs_leaves_zero_gradients_out():
    jacobian = np.array([[1.0, 0.0], [-1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    assert conflict_share(jacobian) == pytest.approx(1 / 3)  # of 3 pairs of non-zero gradients
    assert conflict_share(jacobian[:1]) == 0.0


def test_a_jacobian_of_zeros_has_condition_number_one():
    assert condition_number(np.zeros((2, 3))) == 1.0


def test_harmony_by_hand():
    # Cosines with d = (1, 0): 0.6 and -0.8 in the first mini-batch, 1 and 0 in the second.
    gradients = np.array([[[3.0, 4.0], [-8.0, 6.0]], [[5.0, 0.0], [0.0, -2.0]]])
    found = harmony(np.array([[1.0, 0.0], [7.0, 0.0]]), gradients)
    np.testing.assert_allclose(found.cosines, [[0.6, -0.8], [1.0, 0.0]], atol=1e-15)
    assert found.minimum == pytest.approx(-0.4)
    assert found.mean == pytest.approx(0.2)
    assert found.variance == pytest.approx((0.7**2 + 0.5**2) / 2)
    assert found.conflict_rate == 0.5
    assert found.worst == pytest.approx(-0.8)


def test_harmony_leaves_silent_gradients_and_silent_mini_batches_out():
    directions = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    gradients = torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, 1.0]]])
    found = harmony(directions, gradients)
    assert np.isnan(found.cosines[0, 1])
    assert np.isnan(found.cosines[1]).all()
    assert found.conflict_rate == 0.5
    assert found.minimum == pytest.approx((math.sqrt(0.5) - math.sqrt(0.5)) / 2)


def test_rounding_of_a_right_angle_is_no_conflict():
    angle = -1e-14
    gradients = np.array([[[1.0, 0.0], [angle, 1.0]]])
    assert harmony(np.array([[1.0, 0.0]]), gradients).conflict_rate == 0.0
    assert harmony(np.array([[1.0, 0.0]]), gradients, tolerance=0.0).conflict_rate == 1.0


@pytest.mark.parametrize(
    ("directions", "gradients", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 2, 4)), "must agree in their last dimension, but got 3 and 4"),
        (np.ones((2, 3)), np.ones((3, 2, 3)), "must cover the same T, but got 2 and 3"),
        (np.zeros((2, 3)), np.ones((2, 2, 3)), "nothing to compare"),
        (np.full((2, 3), np.nan), np.ones((2, 2, 3)), "directions holds NaN or Inf"),
    ],
)
def test_bad_input_is_explained(directions, gradients, message):
    # Shapes are also checked by the annotations while testing, hence the wider exception type.
    with pytest.raises((ValueError, TypeError)) as error:
        harmony(directions, gradients)
    assert message in str(error.value) or "type-check" in str(error.value).lower()
