"""The unit-diagonal form and the factor of a Gramian."""

import numpy as np
import pytest
from gramians import FAMILIES, gramian, jacobian, norms

from mogb.solvers.scaling import factor, unit_diagonal


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_cosines_are_those_of_the_rows(family):
    rows = jacobian(family, 6)
    lengths, cosines = unit_diagonal(gramian(rows))
    units = rows / norms(rows)[:, None]
    np.testing.assert_allclose(lengths, norms(rows), rtol=1e-14)
    np.testing.assert_allclose(cosines, units @ units.T, atol=1e-14)
    assert (cosines.diagonal() == 1).all()
    assert (cosines == cosines.T).all()


def test_zero_rows_have_no_norm_and_no_cosines():
    lengths, cosines = unit_diagonal(np.array([[4.0, 0.0, 2.0], [0.0, 0.0, 0.0], [2.0, 0.0, 4.0]]))
    np.testing.assert_array_equal(lengths, [2.0, 0.0, 2.0])
    np.testing.assert_array_equal(cosines, [[1.0, 0.0, 0.5], [0.0, 0.0, 0.0], [0.5, 0.0, 1.0]])


def test_a_diagonal_that_rounding_made_negative_is_zero():
    lengths, _ = unit_diagonal(np.array([[1.0, 0.0], [0.0, -1e-20]]))
    np.testing.assert_array_equal(lengths, [1.0, 0.0])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_no_scale_overflows(scale):
    rows = jacobian("independent", 4) * scale
    lengths, cosines = unit_diagonal(gramian(rows))
    np.testing.assert_allclose(lengths / scale, norms(rows / scale), rtol=1e-14)
    assert np.isfinite(cosines).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_factor_gives_the_cosines_back(family):
    _, cosines = unit_diagonal(gramian(jacobian(family, 9)))
    rows, error = factor(cosines)
    np.testing.assert_allclose(rows.T @ rows, cosines, atol=1e-14)
    assert error <= 1e-14
    assert len(rows) <= 9


def test_the_factor_of_dependent_rows_has_their_rank():
    _, cosines = unit_diagonal(gramian(jacobian("more rows than columns", 9)))
    assert len(factor(cosines)[0]) == 3


def test_what_is_cut_off_an_indefinite_matrix_is_reported():
    cosines = np.array([[1.0, 1.25], [1.25, 1.0]])  # eigenvalues 2.25 and -0.25
    rows, error = factor(cosines)
    np.testing.assert_allclose(rows.T @ rows, np.full((2, 2), 1.125))
    assert error == pytest.approx(0.125)
