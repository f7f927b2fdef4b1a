"""Small dense problems, K by K, in float64. Pure functions of NumPy arrays; they know nothing of aggregators."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mogb.errors import NonFiniteError
from mogb.solvers.min_norm import solve_min_norm


@dataclass(frozen=True, eq=False)
class MinNormResult:
    r"""The shortest vector in the convex hull of the gradients.

    Attributes:
        weights: On the simplex, ``[K]``, in the dtype and on the device of the Gramian.
        squared_norm: Of that vector, :math:`w^\top G w`.
        gap: Certified optimality gap, :math:`\max_i (\|d\|^2 - g_i \cdot d) / (\|g_i\| \min_j \|g_j\|)` over the
            non-zero rows; 0 means optimal.
        converged: Whether the gap reached what float64 can resolve.
    """

    weights: Float[Tensor, " K"]
    squared_norm: float
    gap: float
    converged: bool


def min_norm(gramian: Float[Tensor, "K K"]) -> MinNormResult:
    r"""Shortest vector in the convex hull of K gradients, from their inner products.

    .. math::  \min_w w^\top G w \quad \text{s.t.} \quad w \ge 0, \; \textstyle\sum_k w_k = 1

    Args:
        gramian: Symmetric and positive semidefinite, any floating dtype, any device.

    Raises:
        TypeError: No floating-point tensor.
        ValueError: Not square.
        NonFiniteError: NaN or Inf; a ValueError that names the objective.

    Examples:
        >>> min_norm(torch.tensor([[4.0, 0.0], [0.0, 1.0]])).weights
        tensor([0.2000, 0.8000])
    """
    if not isinstance(gramian, Tensor) or not gramian.is_floating_point():
        raise TypeError(
            f"gramian must be a floating-point tensor [K, K], but got {getattr(gramian, 'dtype', gramian)}."
        )
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or len(gramian) == 0:
        raise ValueError(f"gramian must have the shape [K, K] with K >= 1, but got {list(gramian.shape)}.")
    if not bool(torch.isfinite(gramian).all()):
        finite = torch.isfinite(gramian)
        rows = finite.diagonal() if not bool(finite.diagonal().all()) else finite.all(dim=1)
        raise NonFiniteError("gradient", int(rows.int().argmin()))
    found = solve_min_norm(gramian.detach().to("cpu", torch.float64).numpy())
    weights = torch.from_numpy(found.weights).to(gramian.device, gramian.dtype)
    return MinNormResult(weights, found.squared_norm, found.gap, found.converged)
