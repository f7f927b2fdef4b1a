r"""CAGrad's dual problem over the simplex.

Shapes: K = objectives.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.optimize import nnls

from mogb.solvers.min_norm import solve_min_norm
from mogb.solvers.scaling import factor, unit_diagonal

TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class ConflictAverse:
    """The solution of the dual problem."""

    simplex: Float64[np.ndarray, " K"]
    multiplier: float
    residual: float
    converged: bool
    stationary: bool


def conflict_averse(gramian: Float64[np.ndarray, "K K"], c: float) -> ConflictAverse:
    """Solves it by a fixed-point search on tau = |g_w| / (c |g_0|)."""
    size = len(gramian)
    norms, cosines = unit_diagonal(gramian)
    rows = factor(cosines)[0] * norms  # columns are the gradients
    mean = rows.mean(axis=1)
    mean_norm = float(np.linalg.norm(mean))
    shortest = solve_min_norm(gramian)
    floor = 1e-7 * norms.max(initial=0.0)
    if c == 0 or mean_norm <= floor:
        return ConflictAverse(shortest.weights, 0.0, 0.0, True, mean_norm <= floor)
    low, high = 0.0, np.inf
    tau = 1 / c
    weights = shortest.weights
    for _ in range(200):
        weights = _shifted(rows, tau * mean)
        length = float(np.linalg.norm(rows @ weights))
        if length > c * mean_norm * tau:
            low = tau
        else:
            high = tau
        guess = length / (c * mean_norm)
        if abs(guess - tau) <= 1e-14 * tau or high - low <= 1e-15 * tau:
            break
        if not low < guess < high:
            guess = (low + high) / 2
        tau = guess
        if tau < 1e-9:
            break
    length = float(np.linalg.norm(rows @ weights))
    if length <= floor:
        return ConflictAverse(weights, 0.0, 0.0, True, True)
    multiplier = c * mean_norm / length
    slopes = gramian @ (1 / size + multiplier * weights)
    scale = np.maximum(norms, np.finfo(float).tiny) * (mean_norm * (1 + c))
    residual = float(np.max((weights @ slopes - slopes) / scale))
    return ConflictAverse(weights, multiplier, max(residual, 0.0), residual <= TOLERANCE, False)


def _shifted(rows: Float64[np.ndarray, "K K"], shift: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, " K"]:
    points = rows + shift[:, None]
    lengths = np.sqrt((points * points).sum(axis=0))
    shortest = lengths.min()
    if shortest == 0:
        return (lengths == 0) / np.count_nonzero(lengths == 0)
    relative = shortest / lengths
    system = np.vstack([points / lengths, relative])
    target = np.zeros(len(system))
    target[-1] = 1.0
    weights = nnls(system, target, maxiter=30 * len(relative))[0] * relative
    return weights / weights.sum()
