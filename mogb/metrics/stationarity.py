r"""Distance to Pareto stationarity, with a certificate.

A point is Pareto stationary when 0 is in the convex hull of the gradients: no direction lowers all losses at first
order. How far it is from that is the length of the shortest vector in the hull,

.. math::  \min_{w \ge 0, \, \sum w = 1} \| J^\top w \| .

Shapes: K = objectives, N = numbers in one gradient.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

from mogb.metrics._arrays import Array, as_array
from mogb.solvers.min_norm import solve_min_norm


@dataclass(frozen=True, eq=False)
class Stationarity:
    r"""How far a point is from Pareto stationary.

    Attributes:
        absolute: Length of the shortest vector d in the hull of the gradients.
        relative: That, divided by the length of the longest gradient; 0 where all gradients are zero.
        gap: :math:`\max(0, \|d\|^2 - \min_k g_k \cdot d) / \|d\|^2`: with it, the true minimum is proven to lie in
            :math:`\|d\| [1 - \text{gap}, 1]`; 0 where d is zero.
        weights: The convex combination that gives d.
    """

    absolute: float
    relative: float
    gap: float
    weights: Float64[np.ndarray, " K"]


def stationarity(jacobian: Float[Array, "K N"], *, unit: bool = False) -> Stationarity:
    """The min-norm residual of one point, computed from the gradients themselves.

    Args:
        jacobian: One gradient a row. On a bounded problem these should be the gradients that the bounds leave, as
            ``Problem.jacobian`` gives them.
        unit: Whether every gradient is divided by its length first. The residual is then between 0 and 1 and does not
            depend on the scales of the losses; a zero gradient still means stationary.

    Raises:
        ValueError: A wrong shape, NaN or Inf.
    """
    rows = as_array(jacobian, "jacobian", "K N")
    if len(rows) == 0:
        raise ValueError("jacobian must hold at least one gradient, but is empty.")
    longest = float(np.abs(rows).max(initial=0.0))
    if longest == 0:
        return Stationarity(0.0, 0.0, 0.0, np.full(len(rows), 1 / len(rows)))
    scaled = rows / longest  # squares stay in range
    if unit:
        norms = np.linalg.norm(scaled, axis=1, keepdims=True)
        scaled, longest = np.divide(scaled, norms, out=np.zeros_like(scaled), where=norms > 0), 1.0
    weights = solve_min_norm(scaled @ scaled.T).weights
    shortest = weights @ scaled
    length = float(np.linalg.norm(shortest))
    gap = max(0.0, length**2 - float((scaled @ shortest).min())) / length**2 if length > 0 else 0.0
    return Stationarity(
        absolute=longest * length,
        relative=length / float(np.linalg.norm(scaled, axis=1).max()),
        gap=gap,
        weights=weights,
    )
