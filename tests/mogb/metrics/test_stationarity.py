"""Stationarity, against closed forms."""

import math

import numpy as np
import pytest
import torch

from mogb.metrics import stationarity


def test_two_gradients_have_the_distance_from_zero_to_their_segment():
    # The segment from (3, 0) to (0, 4) passes 0 at 12/5.
    found = stationarity(np.array([[3.0, 0.0], [0.0, 4.0]]))
    assert found.absolute == pytest.approx(2.4)
    assert found.relative == pytest.approx(0.6)
    assert found.gap < 1e-12
    np.testing.assert_allclose(found.weights, [16 / 25, 9 / 25])


def test_unit_gradients_make_it_free_of_scale():
    rows = torch.tensor([[3.0, 0.0], [0.0, 4e6]], dtype=torch.float64)
    assert stationarity(rows, unit=True).absolute == pytest.approx(math.sqrt(0.5))
    assert stationarity(rows, unit=True).relative == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("unit", [False, True])
def test_opposite_gradients_and_zero_gradients_are_stationary(unit):
    assert stationarity(np.array([[1.0, 2.0], [-3.0, -6.0]]), unit=unit).absolute < 1e-12
    assert stationarity(np.array([[1.0, 2.0], [0.0, 0.0]]), unit=unit).absolute == 0.0
    silent = stationarity(np.zeros((3, 2)), unit=unit)
    assert (silent.absolute, silent.relative, silent.gap) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
def test_no_size_of_gradients_overflows(size):
    found = stationarity(size * np.array([[3.0, 0.0], [0.0, 4.0]]))
    assert found.absolute == pytest.approx(2.4 * size, rel=1e-12)
    assert found.relative == pytest.approx(0.6)


def test_the_certificate_bounds_every_convex_combination():
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(6, 20)) + 0.5
    found = stationarity(rows)
    weights = generator.dirichlet(np.full(6, 0.3), size=20_000)
    assert (np.linalg.norm(weights @ rows, axis=1) >= found.absolute * (1 - found.gap) - 1e-12).all()
    assert np.linalg.norm(found.weights @ rows) == pytest.approx(found.absolute)
    assert found.gap < 1e-9


def test_bad_input_is_explained():
    with pytest.raises(ValueError, match="at least one gradient"):
        stationarity(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="jacobian holds NaN or Inf"):
        stationarity(np.full((2, 2), np.nan))
