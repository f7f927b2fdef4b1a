r"""Projection onto the probability simplex.

Shapes: K = number of coordinates.
"""

import numpy as np
from jaxtyping import Float64


def project_on_simplex(v: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, " K"]:
    r"""The point of the simplex that is closest to ``v``.

    .. math::  \arg\min_w \|w - v\|^2 \quad \text{s.t.} \quad w \ge 0, \; \textstyle\sum_k w_k = 1

    It is :math:`\max(v - \theta, 0)` with the one threshold :math:`\theta` for which the weights sum to 1; sorting the
    coordinates finds it exactly (Held, Wolfe and Crowder, Validation of subgradient optimization, 1974).

    Raises:
        ValueError: No coordinate, or one that is NaN or infinite.
    """
    if v.size == 0 or not np.isfinite(v).all():
        raise ValueError(f"v must hold at least one number, all of them finite, but got {v}.")
    shifted = v - v.max()  # the projection does not see a common shift, and rounding does
    descending = np.sort(shifted)[::-1]
    thresholds = (np.cumsum(descending) - 1) / np.arange(1, v.size + 1)
    weights = np.maximum(shifted - thresholds[np.count_nonzero(descending > thresholds) - 1], 0.0)
    return weights / weights.sum()
