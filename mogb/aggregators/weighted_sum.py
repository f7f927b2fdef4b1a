r"""Weighted sum: fixed weights, by default the mean.

.. math::  d = \sum_k w_k \, g_k , \qquad w_k = \tfrac{1}{K} \text{ by default} .

The baseline that every method is compared with. Beware of the convention: the sum is K times the mean, which is the
same as a learning rate K times larger.

Shapes: K = objectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64

from mogb.base import LossAggregator, Promise, Reference, Solution
from mogb.options import check_type


@dataclass(frozen=True, init=False)
class WeightedSum(LossAggregator, name="weighted_sum"):
    """Adds up the gradients with the same weights at every step: one backward pass.

    Args:
        weights: One finite number per objective; None means the mean, 1/K each.

    Examples:
        >>> import torch
        >>> WeightedSum(weights=[1.0, 3.0])(torch.eye(2))
        tensor([1., 3.])
    """

    reference: ClassVar = Reference(
        authors="J. Fliege and B. F. Svaiter",
        title="Steepest descent methods for multicriteria optimization",
        venue="Mathematical Methods of Operations Research",
        year=2000,
        url="https://doi.org/10.1007/s001860000043",
    )
    promises: ClassVar = frozenset({Promise.SIMPLEX_WEIGHTS, Promise.PERMUTATION_EQUIVARIANT, Promise.HOMOGENEOUS})
    needs_values: ClassVar = False

    fixed: tuple[float, ...] | None = None

    def __init__(self, *, weights: Sequence[float] | None = None) -> None:
        check_type("weights", weights, Sequence[float] | None)
        object.__setattr__(self, "fixed", None if weights is None else tuple(float(weight) for weight in weights))
        self.__post_init__()

    def _check(self) -> None:
        if self.fixed is not None and (not self.fixed or not np.isfinite(self.fixed).all()):
            raise ValueError(f"weights must be finite numbers, one per objective, but got {list(self.fixed)}.")

    def __repr__(self) -> str:
        return f"WeightedSum(weights={None if self.fixed is None else list(self.fixed)})"

    @property
    def keeps(self) -> frozenset[Promise]:
        return self.promises if self.fixed is None else frozenset({Promise.HOMOGENEOUS})

    def _only(self, live: Bool[np.ndarray, " K"]) -> "WeightedSum":
        if self.fixed is None:
            return self
        self._check_size(len(live))
        return WeightedSum(weights=[weight for weight, part in zip(self.fixed, live, strict=True) if part])

    def _check_size(self, size: int) -> None:
        if self.fixed is not None and len(self.fixed) != size:
            raise ValueError(f"weights must have one number per objective, {size}, but got {len(self.fixed)}.")

    def _weights(self, losses: Float64[np.ndarray, " K"]) -> Solution:
        size = len(losses)
        if self.fixed is None:
            return Solution(np.full(size, 1 / size))
        self._check_size(size)
        return Solution(np.array(self.fixed))
