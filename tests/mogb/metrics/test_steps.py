"""Steps to tolerance, by hand."""

import numpy as np
import pytest
import torch

from mogb.metrics import steps_to_tolerance

STEPS = np.array([0, 10, 20, 40])
DISTANCES = np.array([[5.0, 0.1, 9.0, np.nan], [0.5, 3.0, 9.0, 0.1], [2.0, 0.1, 9.0, np.nan], [0.5, 0.1, 9.0, 0.0]])


def test_the_first_time_counts_unless_it_has_to_stay():
    np.testing.assert_array_equal(steps_to_tolerance(STEPS, DISTANCES, 1.0), [10, 0, np.inf, 10])
    np.testing.assert_array_equal(steps_to_tolerance(STEPS, DISTANCES, 1.0, stay=True), [40, 20, np.inf, 40])


def test_tensors_and_the_tolerance_itself_count():
    found = steps_to_tolerance(torch.tensor([1, 2]), torch.tensor([[2.0], [1.0]]), 1.0)
    np.testing.assert_array_equal(found, [2])


def test_no_record_means_never():
    np.testing.assert_array_equal(steps_to_tolerance(STEPS[:0], np.zeros((0, 2)), 1.0), [np.inf, np.inf])


def test_bad_input_is_explained():
    with pytest.raises(ValueError, match="steps must rise"):
        steps_to_tolerance(STEPS[::-1].copy(), DISTANCES, 1.0)
    with pytest.raises(ValueError, match=r"tolerance must be a number of at least 0, but got -1.0"):
        steps_to_tolerance(STEPS, DISTANCES, -1.0)
