"""Shifts of end points, by hand."""

import numpy as np
import pytest

from mogb.metrics import end_point_shift


def test_shifts_by_hand():
    ends = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    moved = ends + np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]])
    found = end_point_shift(ends, moved, extent=10.0)
    np.testing.assert_allclose(found.each, [0.5, 0.0, 0.1])
    assert found.largest == pytest.approx(0.5)
    assert found.median == pytest.approx(0.1)
    assert found.moved == pytest.approx(2 / 3)
    assert end_point_shift(ends, moved, extent=10.0, tolerance=0.2).moved == pytest.approx(1 / 3)


def test_a_run_that_diverged_once_moved_and_one_that_always_does_is_left_out():
    ends = np.array([[0.0], [np.nan], [np.inf], [1.0]])
    again = np.array([[0.0], [np.nan], [2.0], [1.0]])
    found = end_point_shift(ends, again)
    np.testing.assert_array_equal(found.each, [0.0, np.nan, np.inf, 0.0])
    assert found.largest == np.inf
    assert found.moved == pytest.approx(1 / 3)


def test_bad_input_is_explained():
    with pytest.raises(ValueError, match=r"extent must be a positive number, but got 0.0"):
        end_point_shift(np.ones((1, 2)), np.ones((1, 2)), extent=0.0)
    with pytest.raises(ValueError, match="nothing to compare"):
        end_point_shift(np.full((1, 2), np.nan), np.full((1, 2), np.nan))
