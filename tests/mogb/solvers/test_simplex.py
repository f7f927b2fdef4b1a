"""Projection onto the simplex, against hand calculations and the conditions that characterize it."""

import numpy as np
import pytest
from gramians import supports
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mogb.solvers.simplex import project_on_simplex

vectors = hnp.arrays(np.float64, st.integers(1, 7), elements=st.floats(-1e6, 1e6))


@pytest.mark.parametrize(
    ("vector", "expected"),
    [
        ([5.0], [1.0]),
        ([0.3, 0.7], [0.3, 0.7]),
        ([2.0, 0.0], [1.0, 0.0]),
        ([1.0, 1.0, 1.0], [1 / 3, 1 / 3, 1 / 3]),
        ([0.5, 0.5, -3.0], [0.5, 0.5, 0.0]),
        ([1.0, 0.5, 0.0], [0.75, 0.25, 0.0]),  # subtract 1/4 from the first two
    ],
)
def test_hand_calculations(vector, expected):
    np.testing.assert_allclose(project_on_simplex(np.array(vector)), expected, atol=1e-15)


@given(vectors)
def test_it_is_the_closest_point_of_every_face(vector):
    found = project_on_simplex(vector)
    assert (found >= 0).all()
    assert found.sum() == pytest.approx(1, abs=1e-15)
    best = np.inf
    for support in supports(len(vector)):
        point = np.zeros(len(vector))
        point[support] = vector[support] - (vector[support].sum() - 1) / len(support)
        if point.min() >= 0:
            best = min(best, np.linalg.norm(point - vector))
    assert np.linalg.norm(found - vector) <= best * (1 + 1e-12) + 1e-9


@given(vectors, st.floats(-1e8, 1e8))
def test_a_common_shift_changes_nothing(vector, shift):
    np.testing.assert_allclose(project_on_simplex(vector + shift), project_on_simplex(vector), atol=1e-7)


def test_huge_numbers_keep_their_differences():
    np.testing.assert_allclose(project_on_simplex(np.array([2.0**60, 2.0**60])), [0.5, 0.5])
    np.testing.assert_allclose(project_on_simplex(np.array([1e300, 0.0])), [1.0, 0.0])


@pytest.mark.parametrize("bad", [[], [1.0, np.nan], [np.inf, 0.0]])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        project_on_simplex(np.array(bad))
