r"""Projection onto the dual cone of the gradients.

For weights x, the point of :math:`\{d : J d \ge 0\}` that is closest to :math:`J^\top x` is :math:`J^\top w` with

.. math::  \min_w \; w^\top G w \quad \text{s.t.} \quad w \ge x .

In the unit-diagonal form the multipliers :math:`\lambda = S (w - x) \ge 0` solve the complementarity problem
:math:`C \lambda \ge -C S x`: again non-negative least squares.

Shapes: K = objectives, P = vectors to project.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64

from mogb.solvers.active_set import DESCENT, block_pivoting, descend, least_squares
from mogb.solvers.scaling import EPS, factor, unit_diagonal

ConeSolver = Literal["active-set", "quadprog"]

# Largest residual that counts as solved when rounding does not force a larger one.
TOLERANCE = 1e-12
# From so many objectives on, all vectors are projected together.
MANY = 24
# The smallest eigenvalue that quadprog is given.
RIDGE = 1e-12


@dataclass(frozen=True, eq=False)
class ConeProjection:
    r"""The projections, as weights on the gradients.

    Attributes:
        weights: One row for each vector.
        residual: How far the optimality conditions are from holding, in the worst row: the largest of
            :math:`-g_i \cdot d / \|g_i\|` (a conflict) and :math:`\min((w - x)_i \|g_i\|, g_i \cdot d / \|g_i\|)`,
            relative to :math:`\max_i |x_i| \|g_i\|`.
        converged: Whether the residual is below 1e-12, or below what rounding leaves of it.
    """

    weights: Float64[np.ndarray, "P K"]
    residual: float
    converged: bool


def project_on_dual_cone(
    gramian: Float64[np.ndarray, "K K"],
    coefficients: Float64[np.ndarray, "P K"],
    *,
    solver: ConeSolver = "active-set",
    max_steps: int | None = None,
) -> ConeProjection:
    """Projects vectors, given by their weights on the gradients, onto the cone that conflicts with none of them.

    The answer is exact up to rounding and adds no ridge. A zero row is no constraint and keeps its weight.

    Args:
        gramian: Symmetric and positive semidefinite up to rounding, finite.
        coefficients: The weights x, one row for each vector.
        solver: ``"active-set"``, or ``"quadprog"`` for the dual method of Goldfarb and Idnani on the same scaled
            problem, which needs the package of that name.
        max_steps: Of the active-set method. None means more than it ever needs; a smaller limit gives the best point
            so far, with ``converged=False``.

    Raises:
        ValueError: An unknown solver.
        ImportError: quadprog is asked for and not installed.
    """
    if solver not in ("active-set", "quadprog"):
        raise ValueError(f"Unknown solver {solver!r}. Known ones: active-set, quadprog.")
    norms, cosines = unit_diagonal(gramian)
    points = coefficients * norms
    scales = np.abs(points).max(axis=1)
    scales[scales == 0] = 1.0
    points /= scales[:, None]
    products = points.dot(cosines)
    open_rows = (products.min(axis=1) < 0).nonzero()[0]
    if open_rows.size == 0:
        return ConeProjection(coefficients.copy(), 0.0, True)
    if max_steps is None:
        max_steps = 30 * len(norms)
    targets = -products[open_rows]
    if solver == "quadprog":
        multipliers, error = _quadprog(cosines, targets), 0.0
    else:
        multipliers, error = _active_set(cosines, points[open_rows], targets, max_steps)
    residuals = _residuals(cosines, targets, multipliers)
    residual = float(residuals.max())
    mass = np.abs(points[open_rows]).sum(axis=1) + multipliers.sum(axis=1)
    resolution = (8 * len(norms) * EPS + error) * float(mass.max())
    raised = multipliers * (scales[open_rows, None] / np.where(norms > 0, norms, np.inf))
    weights = coefficients.copy()
    weights[open_rows] += raised
    return ConeProjection(weights, residual, residual <= max(TOLERANCE, resolution))


def _active_set(
    cosines: Float64[np.ndarray, "K K"],
    points: Float64[np.ndarray, "P K"],
    targets: Float64[np.ndarray, "P K"],
    max_steps: int,
) -> tuple[Float64[np.ndarray, "P K"], float]:
    """The multipliers, and how far the factor that they were found with is from the cosines."""
    multipliers = np.zeros_like(points)
    left = np.arange(len(points))
    rows, error = factor(cosines)
    if len(cosines) >= MANY and 2 * len(rows) >= len(cosines):
        multipliers, solved = block_pivoting(cosines, targets, min(max_steps, 100))
        left = (~solved | (_residuals(cosines, targets, multipliers) > TOLERANCE)).nonzero()[0]
    images = points.dot(-rows.T)
    for row in left:
        found = least_squares(rows, images[row], max_steps)
        if found is None:
            found, _ = descend(cosines, targets[row], multipliers[row], min(max_steps, DESCENT))
        multipliers[row] = found
    return multipliers, error


def _residuals(
    cosines: Float64[np.ndarray, "K K"], targets: Float64[np.ndarray, "*P K"], multipliers: Float64[np.ndarray, "*P K"]
) -> Float64[np.ndarray, "*P"]:
    slack = multipliers.dot(cosines) - targets
    return np.maximum(-slack, np.minimum(multipliers, slack)).max(axis=-1)


def _quadprog(cosines: Float64[np.ndarray, "K K"], targets: Float64[np.ndarray, "P K"]) -> Float64[np.ndarray, "P K"]:
    try:
        import quadprog
    except ImportError as error:
        raise ImportError('solver="quadprog" needs the package quadprog: pip install "mogb[quadprog]".') from error
    identity = np.eye(len(cosines))
    least = float(np.linalg.eigvalsh(cosines)[0])
    regular = cosines + max(RIDGE - least, 0.0) * identity  # it takes none but positive definite matrices
    solutions = [quadprog.solve_qp(regular, target, identity, np.zeros(len(cosines)))[0] for target in targets]
    return np.maximum(solutions, 0.0)
