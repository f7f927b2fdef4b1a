r"""PBI: how far the losses are from the ideal point along a preferred ray, and how far off the ray.

.. math::  f(L) = d_1 + \theta d_2 , \qquad d_1 = \hat\lambda \cdot (L - z) , \qquad
           d_2 = \bigl\| L - z - d_1 \hat\lambda \bigr\| , \qquad \hat\lambda = \lambda / \|\lambda\| ,

.. math::  w = \nabla f = \hat\lambda + \theta \, \frac{L - z - d_1 \hat\lambda}{d_2} .

Shapes: K = objectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64

from mogb.aggregators._losses import as_point, pick_point, point_array, shares
from mogb.aggregators._options import as_preference, pick
from mogb.base import LossAggregator, Promise, Reference, Solution

# Distances from the ray below this share of the distance from the ideal point are rounding.
ON_THE_RAY = 1e-14


@dataclass(frozen=True, kw_only=True)
class PBI(LossAggregator, name="pbi"):
    r"""Penalty-based boundary intersection. Off the ray, weights may be negative: such a loss is driven up, to the ray.

    On the ray :math:`d_2` has a kink; the weights are :math:`\hat\lambda` there, its smallest subgradient. Minima of f
    need not be Pareto optimal.

    Args:
        theta: The penalty, at least 0. 5 as in the paper.
        preference: The direction :math:`\lambda` of the ray, one non-negative number per objective: the ratio of the
            losses to reach. None means equal.
        ideal: Where the ray begins, usually at or below the smallest losses to expect. None means the origin.

    Examples:
        >>> import torch
        >>> PBI(theta=2.0).weights(losses=torch.tensor([3.0, 1.0]))
        tensor([ 2.1213, -0.7071])
    """

    reference: ClassVar = Reference(
        authors="Q. Zhang and H. Li",
        title="MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition",
        venue="IEEE Transactions on Evolutionary Computation",
        year=2007,
        url="https://doi.org/10.1109/TEVC.2007.892759",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT, Promise.HOMOGENEOUS})

    theta: float = 5.0
    preference: Sequence[float] | None = None
    ideal: Sequence[float] | None = None

    def _check(self) -> None:
        if not 0 <= self.theta < np.inf:
            raise ValueError(f"theta must be at least 0 and finite, but got {self.theta!r}.")
        object.__setattr__(self, "preference", as_preference(self.preference))
        object.__setattr__(self, "ideal", as_point(self.ideal, "ideal"))

    @property
    def keeps(self) -> frozenset[Promise]:
        return self.promises if self.preference is None and self.ideal is None else frozenset()

    def _only(self, live: Bool[np.ndarray, " K"]) -> "PBI":
        return replace(self, preference=pick(self.preference, live), ideal=pick_point(self.ideal, live, "ideal"))

    def _weights(self, losses: Float64[np.ndarray, " K"]) -> Solution:
        size = len(losses)
        ray = shares(self.preference, size)
        ray /= np.linalg.norm(ray)
        point = losses - point_array(self.ideal, size, "ideal")
        along = ray @ point
        across = point - along * ray
        distance = np.linalg.norm(across)
        value = float(along + self.theta * distance)
        if distance <= ON_THE_RAY * np.linalg.norm(point):
            return Solution(ray, value=value)
        return Solution(ray + self.theta * across / distance, value=value)
