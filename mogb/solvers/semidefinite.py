r"""Linear systems and eigensystems of positive semidefinite matrices, such as Gramians, that may be singular.

Shapes: K = objectives.
"""

import numpy as np
from jaxtyping import Float64
from scipy.linalg.lapack import dpocon, dpotrf, dpotrs, dsyevd

from mogb.solvers.scaling import EPS


def eigensystem(matrix: Float64[np.ndarray, "K K"]) -> tuple[Float64[np.ndarray, " K"], Float64[np.ndarray, "K K"]]:
    """Eigenvalues in ascending order, and orthonormal eigenvectors as columns."""
    values, vectors, info = dsyevd(matrix, lower=1)
    if info != 0:  # divide and conquer failed to converge, which the other drivers need not
        values, vectors = np.linalg.eigh(matrix)
    return values, vectors


def solve_semidefinite(
    matrix: Float64[np.ndarray, "K K"], target: Float64[np.ndarray, " K"]
) -> Float64[np.ndarray, " K"]:
    r"""The shortest v that minimizes :math:`\|M v - t\|`: the solution, or the pseudo-inverse where M is singular.

    Eigenvalues up to 4 K eps times the largest, which rounding alone can cause, count as zero.
    """
    size = len(matrix)
    triangle, info = dpotrf(matrix)
    if info == 0:
        reciprocal_condition, _ = dpocon(triangle, matrix.trace())  # the trace is at least the largest eigenvalue
        if reciprocal_condition > 64 * size * EPS:
            solution, _ = dpotrs(triangle, target)
            return solution
    values, vectors = eigensystem(matrix)
    kept = values > 4 * size * EPS * values[-1]
    return vectors[:, kept] @ ((target @ vectors[:, kept]) / values[kept])
