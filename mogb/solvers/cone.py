r"""Projection onto the dual cone of the gradients.

For weights x, the point of :math:`\{d : J d \ge 0\}` that is closest to :math:`J^\top x` is :math:`J^\top w` with

.. math::  \min_w \; w^\top G w \quad \text{s.t.} \quad w \ge x .

In the unit-diagonal form the multipliers :math:`\lambda = S (w - x) \ge 0` solve the complementarity problem
:math:`C \lambda \ge -C S x`: again non-negative least squares.

Shapes: K = objectives, P = vectors to project, R = rank of the Gramian.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64

from mogb.solvers.active_set import DESCENT, block_pivoting, descend, least_squares
from mogb.solvers.scaling import EPS, factor, unit_diagonal

ConeSolver = Literal["active-set", "quadprog"]

# Largest residual that counts as solved when rounding does not force a larger one.
TOLERANCE = 1e-12
# From so many objectives on, all vectors are projected together.
MANY = 24
# The smallest eigenvalue that quadprog is given.
RIDGE = 1e-12
# Of block pivoting; what it has not solved by then is solved one by one.
ROUNDS = 100


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
    if len(gramian) == 2 and solver == "active-set":
        return _project_between_two(gramian, coefficients)
    norms, cosines = unit_diagonal(gramian)
    points = coefficients * norms
    scales = np.abs(points).max(axis=1)
    scales[scales == 0] = 1.0
    points /= scales[:, None]
    targets = -points.dot(cosines)
    conflicting = (targets.max(axis=1) > 0).nonzero()[0]
    if conflicting.size == 0:
        return ConeProjection(coefficients.copy(), 0.0, True)
    rows, error = factor(cosines)
    problem = _Problem(cosines, rows, points[conflicting], targets[conflicting], 8 * len(norms) * EPS + error)
    if solver == "quadprog":
        multipliers = _quadprog(problem)
        residuals, wrong = problem.check(multipliers)
    else:
        multipliers, residuals, wrong = _active_set(problem, 30 * len(norms) if max_steps is None else max_steps)
    weights = coefficients.copy()
    weights[conflicting] += multipliers * (scales[conflicting, None] / np.where(norms > 0, norms, np.inf))
    return ConeProjection(weights, float(residuals.max()), not wrong.any())


def _project_between_two(
    gramian: Float64[np.ndarray, "2 2"], coefficients: Float64[np.ndarray, "P 2"]
) -> ConeProjection:
    """The closed form for two gradients: at most one multiplier is positive, or both cancel the vector."""
    first, second = math.sqrt(max(gramian[0, 0], 0.0)), math.sqrt(max(gramian[1, 1], 0.0))
    cosine = 0.0
    if first > 0 and second > 0:
        cosine = min(max((gramian[0, 1] / first / second + gramian[1, 0] / first / second) / 2, -1.0), 1.0)
    weights = coefficients.copy()
    worst = 0.0
    for row in weights:
        a, b = float(row[0]) * first, float(row[1]) * second
        lacks_a, lacks_b = -(a + cosine * b), -(b + cosine * a)
        if max(lacks_a, lacks_b) <= 0:
            continue
        up_a, up_b = max(lacks_a, 0.0), max(lacks_b, 0.0)
        candidates = [(up_a, 0.0), (0.0, up_b)] + ([(-a, -b)] if max(a, b) <= 0 else [])
        found = [(_residual_of_two(x, y, cosine, lacks_a, lacks_b), x, y) for x, y in candidates]
        residual, x, y = min(found)
        worst = max(worst, residual / max(abs(a), abs(b)))
        row += (x / first if x else 0.0, y / second if y else 0.0)
    return ConeProjection(weights, worst, worst <= TOLERANCE)


def _residual_of_two(x: float, y: float, cosine: float, lacks_a: float, lacks_b: float) -> float:
    slack_a, slack_b = x + cosine * y - lacks_a, y + cosine * x - lacks_b
    return max(-slack_a, -slack_b, min(x, slack_a), min(y, slack_b))


@dataclass(frozen=True, eq=False)
class _Problem:
    """Find multipliers >= 0 with cosines @ multipliers >= targets, complementary, for every row."""

    cosines: Float64[np.ndarray, "K K"]
    rows: Float64[np.ndarray, "R K"]  # rows.T @ rows = cosines
    points: Float64[np.ndarray, "P K"]
    targets: Float64[np.ndarray, "P K"]  # -points @ cosines
    rounding: float  # of the cosines

    def check(
        self, multipliers: Float64[np.ndarray, "P K"]
    ) -> tuple[Float64[np.ndarray, " P"], Bool[np.ndarray, " P"]]:
        """The residual of every row, and whether rounding does not explain it."""
        slack = multipliers.dot(self.cosines) - self.targets
        residuals = np.maximum(-slack, np.minimum(multipliers, slack)).max(axis=1)
        mass = np.abs(self.points).sum(axis=1) + multipliers.sum(axis=1)
        return residuals, residuals > np.maximum(TOLERANCE, self.rounding * mass)


def _active_set(
    problem: _Problem, max_steps: int
) -> tuple[Float64[np.ndarray, "P K"], Float64[np.ndarray, " P"], Bool[np.ndarray, " P"]]:
    multipliers = np.zeros_like(problem.points)
    wrong = np.ones(len(multipliers), dtype=bool)
    size = len(problem.cosines)
    if size >= MANY and 2 * len(problem.rows) >= size:
        multipliers = block_pivoting(problem.cosines, problem.targets, min(max_steps, ROUNDS))
        residuals, wrong = problem.check(multipliers)
        if not wrong.any():
            return multipliers, residuals, wrong
    images = problem.points.dot(-problem.rows.T)
    for row in wrong.nonzero()[0]:
        found = least_squares(problem.rows, images[row], max_steps)
        multipliers[row] = 0.0 if found is None else found
    residuals, wrong = problem.check(multipliers)
    if wrong.any():
        for row in wrong.nonzero()[0]:
            steps = min(max_steps, DESCENT)
            multipliers[row], _ = descend(problem.cosines, problem.targets[row], multipliers[row], steps)
        residuals, wrong = problem.check(multipliers)
    return multipliers, residuals, wrong


def _quadprog(problem: _Problem) -> Float64[np.ndarray, "P K"]:
    try:
        import quadprog
    except ImportError as error:
        raise ImportError('solver="quadprog" needs the package quadprog: pip install "mogb[quadprog]".') from error
    size = len(problem.cosines)
    least = float(np.linalg.eigvalsh(problem.cosines)[0])
    regular = problem.cosines + max(RIDGE - least, 0.0) * np.eye(size)  # it takes none but positive definite matrices
    solutions = [quadprog.solve_qp(regular, target, np.eye(size), np.zeros(size))[0] for target in problem.targets]
    return np.maximum(solutions, 0.0)
