r"""The bargaining fixed point G w = w^(-1/alpha).

Shapes: K = objectives.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from mogb.solvers.min_norm import solve_min_norm
from mogb.solvers.scaling import unit_diagonal

TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Bargain:
    """The weights of the bargain."""

    weights: Float64[np.ndarray, " K"]
    residual: float
    converged: bool
    stationary: bool


def bargain(gramian: Float64[np.ndarray, "K K"], alpha: float = 1.0) -> Bargain:
    """Solves it by a primal-dual Newton method on u and z = C u."""
    norms, cosines = unit_diagonal(gramian)
    if not norms.all():
        raise ValueError(f"The gradients of objectives {np.flatnonzero(norms == 0).tolist()} are zero: leave them out.")
    if solve_min_norm(cosines).squared_norm <= 1e-14 * len(norms):
        return Bargain(np.zeros(len(norms)), 0.0, True, True)
    power = 1 / alpha
    logs = np.log(norms)
    center = logs.mean()
    target = (power - 1) * (logs - center)
    u = np.ones(len(norms))
    z = np.ones(len(norms))
    for _ in range(200):
        gap = target - np.log(z) - power * np.log(u)
        infeasibility = z - cosines @ u
        if max(np.abs(gap).max(), np.abs(infeasibility / z).max()) < 1e-14:
            break
        step_u = np.linalg.solve(cosines + np.diag(power * z / u), infeasibility + z * gap)
        step_z = z * gap - power * z / u * step_u
        length = min(1.0, 0.9 / max(-(step_u / u).min(), -(step_z / z).min(), 1e-9))
        length = min(length, 1.0)
        u += length * step_u
        z += length * step_z
    weights = u / norms * np.exp(center * (1 - 2 * alpha / (alpha + 1)))
    residual = float(np.abs(gramian @ weights * weights**power - 1).max())
    return Bargain(weights, residual, residual <= TOLERANCE, False)
