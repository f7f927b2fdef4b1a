r"""Shortest vector in the convex hull of K gradients.

Shapes: K = objectives.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.optimize import nnls

from mogb.solvers.scaling import factor, unit_diagonal

TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class MinNorm:
    """The shortest vector in the convex hull, as weights, with its certificate."""

    weights: Float64[np.ndarray, " K"]
    squared_norm: float
    gap: float
    converged: bool
    iterations: int


def solve_min_norm(gramian: Float64[np.ndarray, "K K"]) -> MinNorm:
    """Solves it."""
    norms, cosines = unit_diagonal(gramian)
    if not norms.all():
        weights = (norms == 0) / np.count_nonzero(norms == 0)
        return MinNorm(weights, 0.0, 0.0, True, 0)
    relative = norms.min() / norms
    system = np.vstack([factor(cosines), relative])
    target = np.zeros(len(system))
    target[-1] = 1.0
    scaled, _ = nnls(system, target, maxiter=30 * len(norms))
    weights = scaled * relative
    weights /= weights.sum()
    products = gramian @ weights
    squared_norm = float(max(weights @ products, 0.0))
    gap = float(np.max((squared_norm - products) / (norms * norms.min())))
    return MinNorm(weights, squared_norm, max(gap, 0.0), gap <= TOLERANCE, 0)
