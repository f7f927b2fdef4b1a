r"""Trimmed mean: in every coordinate, the mean without the largest and the smallest numbers.

.. math::  d_n = \frac{1}{K - 2t} \sum_{i = t + 1}^{K - t} J_{(i) n} ,

where :math:`J_{(1) n} \le \dots \le J_{(K) n}` are the sorted numbers of coordinate n.

Shapes: K = objectives, N = numbers in one gradient.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mogb.base import JacobianAggregator, Promise, Reference
from mogb.errors import NonFiniteError
from mogb.jacobian import CHUNK_WIDE, Jacobian


@dataclass(frozen=True, kw_only=True)
class TrimmedMean(JacobianAggregator, name="trimmed_mean"):
    """Outvotes outliers coordinate by coordinate: up to t gradients may be arbitrarily wrong.

    It comes from federated learning, where rows are workers with the same objective. Objectives that merely disagree
    are outvoted too, not balanced.

    Args:
        trim: The t: how many numbers to leave out at each end, less than half of them. None leaves out as many as
            possible: the coordinate-wise median, which is the paper's other estimator (of an even number, the mean of
            the two in the middle).

    Raises:
        ValueError: On a call with fewer than 2 t + 1 gradients.

    Examples:
        >>> import torch
        >>> TrimmedMean(trim=1)(torch.tensor([[1.0, 90.0], [2.0, 3.0], [-70.0, 4.0]]))
        tensor([1., 4.])
    """

    reference: ClassVar = Reference(
        authors="D. Yin, Y. Chen, K. Ramchandran and P. Bartlett",
        title="Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
        venue="ICML",
        year=2018,
        arxiv="1803.01498",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT, Promise.HOMOGENEOUS})

    trim: int | None = None

    def _check(self) -> None:
        if self.trim is not None and (isinstance(self.trim, bool) or not isinstance(self.trim, int) or self.trim < 0):
            raise ValueError(f"trim must be a whole number, at least 0, or None, but got {self.trim!r}.")

    def _direction(self, jacobian: Jacobian, losses: Float64[np.ndarray, " K"] | None) -> tuple[Tensor, ...]:
        size = len(jacobian)
        trim = (size - 1) // 2 if self.trim is None else self.trim
        if size < 2 * trim + 1:
            raise ValueError(
                f"'trimmed_mean' with trim={trim} needs at least {2 * trim + 1} gradients, but got {size}. Lower trim."
            )
        return jacobian.map(lambda rows: self._trimmed(rows, trim, jacobian))

    def _trimmed(self, rows: Float[Tensor, "K N"], trim: int, jacobian: Jacobian) -> Float[Tensor, " N"]:
        parts = []
        for part in rows.split(max(1, CHUNK_WIDE // len(rows)), dim=1):
            ordered = part.sort(dim=0).values
            if not (torch.isfinite(ordered[0]).all() and torch.isfinite(ordered[-1]).all()):  # NaN comes last
                raise NonFiniteError("gradient", jacobian.first_non_finite())
            kept = ordered[trim : len(ordered) - trim]
            parts.append(kept.mean(0, dtype=torch.promote_types(rows.dtype, torch.float32)).to(rows.dtype))
        return torch.cat(parts) if parts else rows.new_zeros(0)
