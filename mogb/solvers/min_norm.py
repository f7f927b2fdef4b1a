r"""The shortest vector in the convex hull of K gradients.

.. math::  \min_w \; \|J^\top w\|^2 = w^\top G w \quad \text{s.t.} \quad w \ge 0, \; \textstyle\sum_k w_k = 1

Let :math:`s_k = \|g_k\|`, :math:`v_k = \min_j s_j / s_k \in (0, 1]` and C the cosines between the gradients. In the
variable :math:`u_k \propto w_k / v_k` it is a problem of non-negative least squares,

.. math::  \min_{u \ge 0} \; u^\top C u + (v^\top u - 1)^2 ,

whose optimality conditions :math:`C u + v v^\top u \ge v` measure every objective on the scale of its own gradient.

Shapes: K = objectives.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from mogb.solvers.active_set import DESCENT, descend, least_squares
from mogb.solvers.scaling import EPS, factor, unit_diagonal

# Largest gap that counts as solved when rounding does not force a larger one.
TOLERANCE = 1e-12


@dataclass(frozen=True, eq=False)
class MinNorm:
    r"""The shortest vector :math:`d = J^\top w` in the convex hull of the gradients.

    Attributes:
        weights: On the simplex.
        squared_norm: :math:`\|d\|^2 = w^\top G w`.
        gap: :math:`\max_i (\|d\|^2 - g_i \cdot d) / (\|g_i\| \min_j \|g_j\|)` over the non-zero rows. At the shortest
            vector it is 0, and only there.
        converged: Whether the gap is below 1e-12, or below what the rounding of weights and Gramian leaves of it.
        iterations: Active-set solves: 0 for a closed form, 1 when the first one was right.
    """

    weights: Float64[np.ndarray, " K"]
    squared_norm: float
    gap: float
    converged: bool
    iterations: int


def solve_min_norm(gramian: Float64[np.ndarray, "K K"], *, max_steps: int | None = None) -> MinNorm:
    """Solves the problem exactly: in closed form for K = 2, by an active-set method otherwise.

    A zero row makes the point Pareto stationary: the weight goes on the zero rows, in equal parts, and d = 0. Where
    several weights give the shortest vector (dependent gradients), they are one choice among them.

    Args:
        gramian: Symmetric and positive semidefinite up to rounding, finite.
        max_steps: Of the active-set method. None means more than it ever needs; a smaller limit gives the best point
            so far, with ``converged=False``.
    """
    squares = gramian.diagonal()
    if squares.min() <= 0:
        zero = squares <= 0
        return MinNorm(zero / np.count_nonzero(zero), 0.0, 0.0, True, 0)
    if len(gramian) == 1:
        return MinNorm(np.ones(1), float(squares[0]), 0.0, True, 0)
    if len(gramian) == 2:
        return _certified(gramian, _two(gramian), np.sqrt(squares), 0.0, 0)
    return _many(gramian, 30 * len(gramian) if max_steps is None else max_steps)


def _two(gramian: Float64[np.ndarray, "2 2"]) -> Float64[np.ndarray, " 2"]:
    (first, upper), (lower, second) = gramian.tolist()
    product = (upper + lower) / 2
    first_share, second_share = second - product, first - product  # exact where the gradients are nearly equal
    if first_share <= 0 or second_share <= 0:
        if first == second:
            return np.array([0.5, 0.5])
        return np.array([1.0, 0.0]) if first < second else np.array([0.0, 1.0])
    total = first_share + second_share
    return np.array([first_share / total, second_share / total])


def _many(gramian: Float64[np.ndarray, "K K"], max_steps: int) -> MinNorm:
    norms, cosines = unit_diagonal(gramian)
    relative = norms[norms.argmin()] / norms
    rows, error = factor(cosines)
    system = np.empty((len(rows) + 1, len(norms)))
    system[:-1] = rows
    system[-1] = relative
    target = np.zeros(len(system))
    target[-1] = 1.0
    scaled = least_squares(system, target, max_steps)
    if scaled is None:
        scaled = (relative == 1.0) / np.count_nonzero(relative == 1.0)
        found = MinNorm(scaled, np.inf, np.inf, False, 0)
    else:
        found = _certified(gramian, scaled * relative, norms, error, 1)
    if not found.gap <= TOLERANCE:
        matrix = cosines + np.outer(relative, relative)
        scaled, steps = descend(matrix, relative, scaled, min(max_steps, DESCENT))
        again = _certified(gramian, scaled * relative, norms, error, steps + 1)
        found = again if again.gap < found.gap else found
    return found


def _certified(
    gramian: Float64[np.ndarray, "K K"],
    weights: Float64[np.ndarray, " K"],
    norms: Float64[np.ndarray, " K"],
    error: float,
    iterations: int,
) -> MinNorm:
    weights = weights / weights.sum()
    products = (gramian.dot(weights) + weights.dot(gramian)) / 2
    squared_norm = float(weights.dot(products))
    shortest = norms[norms.argmin()]
    gap = max(float(((squared_norm - products) / norms).max() / shortest), 0.0)
    return MinNorm(
        weights, max(squared_norm, 0.0), gap, gap <= TOLERANCE or gap <= _resolution(weights, norms, error), iterations
    )


def _resolution(weights: Float64[np.ndarray, " K"], norms: Float64[np.ndarray, " K"], error: float) -> float:
    """The gap that the rounding of weights and Gramian may leave at the exact solution."""
    mass = float(weights @ norms / norms.min())
    return (4 * len(norms) * EPS + error) * mass * (1 + mass)
