r"""The dual problem of CAGrad: the convex combination that is worst for the mean gradient.

With the mean gradient :math:`g_0 = J^\top b`, :math:`b_k = 1/K` unless another mean is asked for, and
:math:`g_w = J^\top w`,

.. math::  \min_w \; g_w^\top g_0 + c \, \|g_0\| \, \|g_w\|
           \quad \text{s.t.} \quad w \ge 0, \; \textstyle\sum_k w_k = 1 ,

and the direction is :math:`g_0 + \mu \, g_w` with :math:`\mu = c \|g_0\| / \|g_w\|`. (Liu et al., NeurIPS 2021, eq. 4.)

Once the support of w is known, the solution lies on the line :math:`w(\tau)` of minimizers of
:math:`\|g_w + \tau g_0\|^2` over its affine hull. Along it :math:`\|g_w\|^2 = a + e \tau^2`, and
:math:`c \|g_0\| \tau = \|g_w\|` gives :math:`\tau^2 = a / (c^2 \|g_0\|^2 - e)`. A search over supports is all that
remains to be done.

Shapes: K = objectives, A = objectives in the support.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.linalg.lapack import dposv

from mogb.solvers.active_set import Move, Slack, least_squares, search_supports
from mogb.solvers.cone import project_on_dual_cone
from mogb.solvers.scaling import EPS, factor, unit_diagonal

# Largest residual that counts as solved when rounding does not force a larger one.
TOLERANCE = 1e-11
# Below this, c^2 |g_0|^2 - e is zero up to rounding.
LEVEL = 1e-10
# Guesses of tau before the search starts.
ROUNDS = 4


@dataclass(frozen=True, eq=False)
class ConflictAverse:
    r"""The solution of the dual problem.

    Attributes:
        simplex: The weights w, on the simplex.
        multiplier: :math:`\mu`; the direction's weights are :math:`b + \mu w`.
        residual: How far the optimality conditions are from holding: with :math:`d = g_0 + \mu g_w`,
            :math:`\max_i (g_w - g_i) \cdot d / (\|g_i\| (1 + c) \|g_0\|)`, of which 0 is the least possible.
        converged: Whether the residual is below 1e-11, or below what rounding leaves of it.
        stationary: Whether :math:`g_w = 0` is optimal up to rounding. Then the multiplier has no meaning and is 0: the
            mean gradient cannot be improved on.
    """

    simplex: Float64[np.ndarray, " K"]
    multiplier: float
    residual: float
    converged: bool
    stationary: bool


@dataclass(frozen=True, eq=False)
class _Problem:
    """Everything in units of the shortest gradient, in the variable u = w / v."""

    cosines: Float64[np.ndarray, "K K"]
    rows: Float64[np.ndarray, "R K"]  # rows.T @ rows = cosines
    relative: Float64[np.ndarray, " K"]  # v: the shortest norm over each norm
    mean: Float64[np.ndarray, " K"]  # coefficients of g_0 on the unit gradients
    slopes: Float64[np.ndarray, " K"]  # inner products of g_0 with the unit gradients
    mean_norm: float
    radius: float  # c |g_0|
    rounding: float  # of the cosines


def conflict_averse(
    gramian: Float64[np.ndarray, "K K"],
    c: float,
    mean: Float64[np.ndarray, " K"] | None = None,
    *,
    max_steps: int | None = None,
) -> ConflictAverse:
    """Solves the dual problem exactly, by a search over the supports of w.

    Args:
        gramian: Symmetric and positive semidefinite up to rounding, finite.
        c: Not negative. With 0 the direction is the mean gradient.
        mean: b, on the simplex. None means 1/K each.
        max_steps: Changes of the support. None means more than it ever needs; a smaller limit gives the best point so
            far, with ``converged=False``.

    Raises:
        ValueError: c is negative or not finite.
    """
    if not 0 <= c < np.inf:
        raise ValueError(f"c must be a finite number of at least 0, but got {c}.")
    size = len(gramian)
    norms, cosines = unit_diagonal(gramian)
    live = norms.nonzero()[0]  # zero rows count in the mean, and are otherwise the point 0 of the hull
    mean = np.full(size, 1 / size) if mean is None else mean
    if live.size == 0:
        return ConflictAverse(mean, 0.0, 0.0, True, True)
    if live.size < size:
        norms, cosines = norms[live], cosines[live[:, None], live]
    problem = _scaled(norms, cosines, mean[live], size, c)
    mass = float(problem.mean.sum())
    if problem.mean_norm <= np.sqrt(problem.rounding) * mass:
        return ConflictAverse(mean, 0.0, 0.0, True, True)
    if c == 0:
        weights = np.zeros(size)
        weights[live[(problem.slopes / problem.relative).argmin()]] = 1.0
        return ConflictAverse(weights, 0.0, 0.0, True, False)
    point = _solve(problem, 3 * size + 20 if max_steps is None else max_steps, live.size < size)
    if point is None:
        return ConflictAverse(mean, 0.0, 0.0, True, True)
    slack, multiplier = _optimality(problem, point)
    weights = np.zeros(size)
    weights[live] = point * problem.relative
    unit = (1 + c) * problem.mean_norm
    residual = max(float(-slack.min()), 0.0) / unit
    pull = multiplier * float(point.sum())
    resolution = 2 * problem.rounding * (mass + pull + pull**2 / problem.radius) / unit
    return ConflictAverse(weights / weights.sum(), multiplier, residual, residual <= max(TOLERANCE, resolution), False)


def _scaled(
    norms: Float64[np.ndarray, " K"],
    cosines: Float64[np.ndarray, "K K"],
    shares: Float64[np.ndarray, " K"],
    size: int,
    c: float,
) -> _Problem:
    relative = norms[norms.argmin()] / norms
    rows, error = factor(cosines)
    if error > 0:
        cosines = rows.T @ rows  # rounding must not make the problem non-convex
    mean = shares / relative
    slopes = cosines.dot(mean)
    mean_norm = float(np.sqrt(max(mean.dot(slopes), 0.0)))
    return _Problem(cosines, rows, relative, mean, slopes, mean_norm, c * mean_norm, 4 * size * EPS + error)


def _solve(problem: _Problem, max_steps: int, has_zero: bool) -> Float64[np.ndarray, " K"] | None:
    """The solution, or None where the point 0 of the hull is optimal."""
    point, _ = _search(problem, _start(problem), max_steps)
    if not has_zero and not _is_zero(problem, point):
        return point
    # Zero is in the hull. It is optimal if and only if the part of g_0 that the cone of the gradients can cancel is
    # no longer than c |g_0|.
    away = project_on_dual_cone(problem.cosines, problem.mean[None]).weights[0] - problem.mean
    if np.linalg.norm(problem.rows.dot(away)) <= problem.radius * (1 + LEVEL):
        return None
    point, _ = _search(problem, away / problem.relative.dot(away), max_steps)
    return point


def _start(problem: _Problem) -> Float64[np.ndarray, " K"]:
    """A point whose support is nearly right: some rounds of tau = |g_w(tau)| / (c |g_0|)."""
    gradients = problem.rows / problem.relative
    mean = problem.rows.dot(problem.mean)[:, None]
    system = np.empty((len(gradients) + 1, gradients.shape[1]))
    target = np.zeros(len(system))
    target[-1] = 1.0
    tau, weights = problem.mean_norm / problem.radius, 1.0 * (problem.relative == 1)
    for _ in range(ROUNDS):
        shifted = gradients + tau * mean
        lengths = np.sqrt((shifted * shifted).sum(axis=0))
        shortest = lengths[lengths.argmin()]
        if shortest == 0:
            weights = 1.0 * (lengths == 0)
            break
        np.divide(shifted, lengths, out=system[:-1])
        shares = system[-1] = shortest / lengths
        found = least_squares(system, target, 30 * len(shares))
        if found is None:
            break
        weights = found * shares
        combined = gradients.dot(weights) / weights.sum()
        last, tau = tau, float(np.sqrt(combined.dot(combined))) / problem.radius
        if 0.5 * last < tau < 2 * last:
            break
    return weights / (weights.sum() * problem.relative)


def _search(
    problem: _Problem, start: Float64[np.ndarray, " K"], max_steps: int
) -> tuple[Float64[np.ndarray, " K"], int]:
    mass = float(problem.mean.sum())

    def toward(index: np.ndarray, point: np.ndarray) -> Move:
        return _toward_minimum(problem, index, point)

    def slack(point: np.ndarray) -> Slack:
        if _is_zero(problem, point):
            return np.zeros_like(point), 0.0
        values, multiplier = _optimality(problem, point)
        return values, 8 * EPS * (mass + multiplier * float(point.sum()))

    return search_supports(start, toward, slack, max_steps)


def _toward_minimum(problem: _Problem, index: np.ndarray, point: Float64[np.ndarray, " A"]) -> Move:
    """The move to the minimum over the affine hull of the support, or along it where there is none."""
    relative, block = problem.relative[index], problem.cosines[index[:, None], index]
    system = block + relative[:, None] * relative
    _, solutions, info = dposv(system, np.stack([relative, problem.slopes[index]], axis=1))
    if info != 0:  # dependent gradients: one of them can go without changing g_w
        return np.linalg.eigh(system)[1][:, 0], False
    nearest = solutions[:, 0] / relative.dot(solutions[:, 0])
    line = relative.dot(solutions[:, 1]) * nearest - solutions[:, 1]
    squared = max(float(nearest.dot(block.dot(nearest))), 0.0)
    room = problem.radius**2 - float(line.dot(block.dot(line)))
    if room > LEVEL * problem.radius**2:
        return nearest + np.sqrt(squared / room) * line - point, True
    return line, False


def _optimality(problem: _Problem, point: Float64[np.ndarray, " K"]) -> tuple[Float64[np.ndarray, " K"], float]:
    """By how much every gradient is ahead of g_w along the direction, in units of its own norm; and the multiplier."""
    products = problem.cosines.dot(point)
    multiplier = problem.radius / float(np.sqrt(point.dot(products)))
    slopes = problem.slopes + multiplier * products
    return slopes - point.dot(slopes) * problem.relative, multiplier


def _is_zero(problem: _Problem, point: Float64[np.ndarray, " K"]) -> bool:
    mass = float(point.sum())
    return bool(point.dot(problem.cosines.dot(point)) <= problem.rounding * mass * mass)
