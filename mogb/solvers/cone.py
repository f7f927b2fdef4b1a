r"""Projection onto the dual cone of the gradients.

Shapes: K = objectives, P = vectors to project.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64
from scipy.optimize import nnls

from mogb.solvers.scaling import factor, unit_diagonal

TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class ConeProjection:
    """The projections, as weights."""

    weights: Float64[np.ndarray, "P K"]
    residual: float
    converged: bool


def project_on_dual_cone(
    gramian: Float64[np.ndarray, "K K"],
    coefficients: Float64[np.ndarray, "P K"],
    *,
    solver: Literal["active-set", "quadprog"] = "active-set",
) -> ConeProjection:
    """Projects."""
    if solver not in ("active-set", "quadprog"):
        raise ValueError(f"Unknown solver {solver!r}. Known ones: active-set, quadprog.")
    norms, cosines = unit_diagonal(gramian)
    x = coefficients * norms
    if solver == "quadprog":
        multipliers = _quadprog(cosines, x)
    else:
        f = factor(cosines)
        multipliers = np.array([nnls(f, -f @ row, maxiter=30 * len(norms))[0] for row in x])
    u = x + multipliers
    slack = u @ cosines
    scale = np.maximum(np.abs(x).max(axis=1, initial=0.0), np.finfo(float).tiny)
    residual = float(np.max(np.maximum(-slack, np.minimum(multipliers, np.abs(slack))) / scale[:, None], initial=0.0))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    weights = np.where(norms > 0, u * inverse, coefficients)
    return ConeProjection(weights, residual, residual <= TOLERANCE)


def _quadprog(cosines: Float64[np.ndarray, "K K"], x: Float64[np.ndarray, "P K"]) -> Float64[np.ndarray, "P K"]:
    try:
        import quadprog
    except ImportError as error:
        raise ImportError('solver="quadprog" needs the package quadprog: pip install "mogb[quadprog]".') from error
    size = len(cosines)
    hessian = cosines + 1e-12 * np.eye(size)
    return np.array([quadprog.solve_qp(hessian, -cosines @ row, np.eye(size), np.zeros(size))[0] for row in x])
