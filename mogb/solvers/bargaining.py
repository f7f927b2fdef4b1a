r"""The bargaining weights: the fixed point :math:`G w = (p / w)^{1/\alpha}` with w > 0, where p = 1 by default.

It minimizes a convex barrier, for alpha = 1 :math:`\tfrac12 w^\top G w - \sum_k p_k \log w_k`, and exists, uniquely,
unless zero is in the convex hull of the gradients. Nash-MTL is the case alpha = 1, FairGrad the general one.

With :math:`S = \mathrm{diag}(\|g_k\|)`, the cosines C and :math:`u = S w` it reads, for every objective i,

.. math::  z = C u , \qquad \log z_i + \beta \log u_i = (\beta - 1) \log s_i + \beta \log p_i , \qquad
           \beta = 1 / \alpha .

Newton's method for both u and z in logarithms keeps them positive and sees nothing but small numbers, whatever the
norms and the exponent.

Shapes: K = objectives.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.linalg.lapack import dposv

from mogb.solvers.min_norm import solve_min_norm
from mogb.solvers.scaling import EPS, factor, unit_diagonal

# The equations hold to this, on a logarithmic scale, where Newton's method stops.
SOLVED = 1e-13
# Newton steps of one run, and the longest step of a logarithm.
STEPS = 60
LONGEST = 10.0
# With less than this certain of the slopes z, the next question is whether a bargain exists at all.
UNCERTAIN = 1e-2


@dataclass(frozen=True, eq=False)
class Bargain:
    r"""The weights of the bargain.

    Attributes:
        weights: On the gradients; all positive, or all zero where no bargain exists.
        residual: :math:`\max_i | (G w)_i \, (w_i / p_i)^{1/\alpha} - 1 |`, evaluated at the weights returned; 0 where
            no bargain exists.
        converged: Whether the equations for u and z hold to 1e-13 or, where that is more, to the rounding of C u. Close
            to stationarity, and for alpha below 1 with norms that differ by 1e3 and more, a residual evaluated in
            float64 is larger than the error of the weights.
        stationary: Whether zero is in the convex hull of the gradients up to rounding, so that no bargain exists.
    """

    weights: Float64[np.ndarray, " K"]
    residual: float
    converged: bool
    stationary: bool


@dataclass(frozen=True, eq=False)
class _Point:
    """The logarithms of u and of z, and how certain z = C u is: 1 means not at all."""

    logs: Float64[np.ndarray, "2 K"]
    uncertainty: float
    solved: bool


def bargain(
    gramian: Float64[np.ndarray, "K K"],
    alpha: float = 1.0,
    *,
    preference: Float64[np.ndarray, " K"] | None = None,
    max_steps: int = STEPS,
) -> Bargain:
    """Solves the fixed point by Newton's method, and certifies the gradients for which there is none.

    Args:
        gramian: Symmetric and positive semidefinite up to rounding, finite, without zero rows.
        alpha: Positive; 0.1 to 20 is tested. Towards 0 the weights become equal, towards infinity the smallest
            improvement as large as possible.
        preference: p, positive. None means 1 each.
        max_steps: Newton steps; a smaller limit gives the best point so far, with ``converged=False``.

    Raises:
        ValueError: alpha or a preference is not positive and finite, or a row is zero.
    """
    if preference is not None and not (preference.min() > 0 and np.isfinite(preference).all()):
        raise ValueError(f"preference must be positive and finite, but got {preference.tolist()}.")
    if not 0 < alpha < np.inf:
        raise ValueError(f"alpha must be positive and finite, but got {alpha}.")
    norms, cosines = unit_diagonal(gramian)
    if not norms.all():
        zero = np.flatnonzero(norms == 0).tolist()
        raise ValueError(f"The gradients of objectives {zero} are zero, and no bargain includes them: leave them out.")
    if len(norms) == 2 and alpha == 1 and preference is None:
        return _two(gramian, norms, float(cosines[0, 1]))
    beta = 1 / alpha
    log_norms = np.log(norms)
    center = float(log_norms.sum() / len(norms))
    target = (beta - 1) * (log_norms - center)
    wishes = np.zeros_like(target) if preference is None else np.log(preference)
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        point = _solve(cosines, beta, target + beta * wishes, wishes, max_steps)
    if point is None:
        return Bargain(np.zeros(len(norms)), 0.0, True, True)
    # G / t^2 has the fixed point w t^(2 alpha / (1 + alpha)).
    weights = np.exp(point.logs[0] - log_norms + center * (1 - 2 * alpha / (1 + alpha)))
    asked = weights if preference is None else weights / preference
    return Bargain(weights, _residual(gramian.dot(weights), asked, beta), point.solved, False)


def _two(gramian: Float64[np.ndarray, "2 2"], norms: Float64[np.ndarray, " 2"], cosine: float) -> Bargain:
    """The closed form for two gradients: u is the same for both, and C u = 1 / u reads (1 + cos) u = 1 / u."""
    if 1 + cosine <= 16 * EPS:
        return Bargain(np.zeros(2), 0.0, True, True)
    weights = 1 / (np.sqrt(1 + cosine) * norms)
    return Bargain(weights, _residual(gramian.dot(weights), weights, 1.0), True, False)


def _solve(
    cosines: Float64[np.ndarray, "K K"],
    beta: float,
    target: Float64[np.ndarray, " K"],
    wishes: Float64[np.ndarray, " K"],
    max_steps: int,
) -> _Point | None:
    """The solution, or None where there is none."""
    start = np.empty((2, len(target)))
    start[:] = target / (1 + beta)
    point = _newton(cosines, beta, target, start, max_steps)
    if (not point.solved or point.uncertainty > UNCERTAIN) and _is_stationary(cosines):
        return None
    if not point.solved and max_steps >= STEPS:
        return _follow(cosines, beta, target, wishes)
    return point


def _newton(
    cosines: Float64[np.ndarray, "K K"],
    beta: float,
    target: Float64[np.ndarray, " K"],
    logs: Float64[np.ndarray, "2 K"],
    max_steps: int,
) -> _Point:
    diagonal = slice(None, None, len(target) + 1)
    magnitudes = np.abs(cosines)
    for step in range(max_steps + 1):
        u, z = np.exp(logs)
        equation = target - logs[1] - beta * logs[0]
        mismatch = z - cosines.dot(u)
        uncertainty = EPS * float((magnitudes.dot(u) / z).max())
        solved = np.abs(equation).max() <= SOLVED and np.abs(mismatch / z).max() <= max(SOLVED, 4 * uncertainty)
        if solved or step == max_steps:
            break
        system = cosines * u * u[:, None]
        system.flat[diagonal] += beta * z * u
        _, change, info = dposv(system, u * (mismatch + z * equation))
        changes = np.stack([change, equation - beta * change])
        longest = np.abs(changes).max()
        if info != 0 or not np.isfinite(longest):
            break
        if longest > LONGEST:
            changes *= LONGEST / longest
        logs = logs + np.where(changes > 0, np.log1p(np.abs(changes)), changes)
    return _Point(logs, uncertainty, bool(solved))


def _follow(
    cosines: Float64[np.ndarray, "K K"],
    beta: float,
    target: Float64[np.ndarray, " K"],
    wishes: Float64[np.ndarray, " K"],
) -> _Point:
    """Follows the solution from alpha = 1, where it is easy to find, to the exponent that is asked for."""
    point = _newton(cosines, 1.0, wishes, np.stack([wishes, wishes]) / 2, STEPS)
    reached, stride = 0.0, 0.5
    while point.solved and reached < 1 and stride > 1e-4:
        ahead = min(1.0, reached + stride)
        goal = wishes + ahead * (target - wishes)
        trial = _newton(cosines, 1 + ahead * (beta - 1), goal, point.logs, 12)
        if trial.solved:
            point, reached, stride = trial, ahead, 2 * stride
        else:
            stride /= 2
    return point


def _is_stationary(cosines: Float64[np.ndarray, "K K"]) -> bool:
    _, error = factor(cosines)
    return solve_min_norm(cosines).squared_norm <= 4 * len(cosines) * EPS + error


def _residual(slopes: Float64[np.ndarray, " K"], weights: Float64[np.ndarray, " K"], beta: float) -> float:
    if slopes.min() <= 0:
        return float((1 - slopes * weights**beta).max())
    return float(np.abs(np.expm1(np.log(slopes) + beta * np.log(weights))).max())
