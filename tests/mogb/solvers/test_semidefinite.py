import numpy as np
import pytest

from mogb.solvers.semidefinite import eigensystem, solve_semidefinite


def gramian(size, rank, seed=0):
    rows = np.random.RandomState(seed).randn(size, rank)
    return rows @ rows.T


@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_a_regular_system_is_solved(size):
    matrix, solution = gramian(size, size + 5), np.linspace(-1, 2, size)
    np.testing.assert_allclose(solve_semidefinite(matrix, matrix @ solution), solution, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("size", "rank"), [(2, 1), (4, 2), (10, 3), (10, 9)])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_a_singular_system_is_solved_by_the_pseudo_inverse(size, rank, scale):
    matrix = scale * gramian(size, rank)
    target = np.linspace(-1, 2, size)
    expected = np.linalg.pinv(matrix, rcond=1e-12, hermitian=True) @ target
    np.testing.assert_allclose(solve_semidefinite(matrix, target), expected, rtol=1e-6, atol=1e-9 * abs(expected).max())


def test_duplicate_rows_share_alike():
    np.testing.assert_allclose(solve_semidefinite(np.ones((3, 3)), np.ones(3)), np.full(3, 1 / 3))


def test_opposite_rows_have_no_solution_for_ones():
    matrix = np.array([[1.0, -1.0], [-1.0, 1.0]])
    np.testing.assert_allclose(solve_semidefinite(matrix, np.ones(2)), np.zeros(2), atol=1e-15)


@pytest.mark.parametrize("size", [1, 3, 30])
def test_the_eigensystem_is_orthonormal_ascending_and_rebuilds_the_matrix(size):
    matrix = gramian(size, size)
    values, vectors = eigensystem(matrix)
    assert (np.diff(values) >= 0).all()
    np.testing.assert_allclose(vectors @ np.diag(values) @ vectors.T, matrix, atol=1e-12 * size * abs(matrix).max())
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(size), atol=1e-13)


def test_the_matrix_is_left_as_it_is():
    matrix = gramian(4, 4)
    before = matrix.copy()
    eigensystem(matrix)
    solve_semidefinite(matrix, np.ones(4))
    np.testing.assert_array_equal(matrix, before)
