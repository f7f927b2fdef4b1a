r"""COSMOS: a weighted sum of the losses, and a reward for losses in the preferred ratio.

.. math::  f(L) = \lambda \cdot L - \mu \, \frac{\lambda \cdot L}{\|\lambda\| \, \|L\|} , \qquad
           w = \nabla f = \lambda - \mu \Bigl( \frac{\lambda}{\|\lambda\| \, \|L\|}
               - \frac{(\lambda \cdot L) \, L}{\|\lambda\| \, \|L\|^3} \Bigr)

with :math:`L - z` in place of L where an ideal point z is given.

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


@dataclass(frozen=True, kw_only=True)
class COSMOS(LossAggregator, name="cosmos"):
    r"""The objective of COSMOS. Its weights may be negative, and its minima need not be Pareto optimal.

    The whole method draws a preference for every batch and feeds it to the network beside the data, so that one
    network learns the front. For that, make one instance per preference; they are stateless and cost nothing.

    Args:
        penalty: The :math:`\mu` of the cosine, at least 0. 2 as in the official code for MultiMNIST; its other
            settings range from 0.01 to 8.
        preference: The :math:`\lambda`, one non-negative number per objective, scaled to sum 1. None means uniform.
        ideal: The point z, from which the losses are measured. None means the origin, as in the paper.

    Examples:
        >>> import torch
        >>> COSMOS(penalty=1.0).weights(losses=torch.tensor([1.0, 0.0]))
        tensor([ 0.5000, -0.2071])
    """

    reference: ClassVar = Reference(
        authors="M. Ruchte and J. Grabocka",
        title="Scalable Pareto Front Approximation for Deep Multi-Objective Learning",
        venue="ICDM",
        year=2021,
        arxiv="2103.13392",
        code="ruchtem/cosmos",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT})

    penalty: float = 2.0
    preference: Sequence[float] | None = None
    ideal: Sequence[float] | None = None

    def _check(self) -> None:
        if not 0 <= self.penalty < np.inf:
            raise ValueError(f"penalty must be at least 0 and finite, but got {self.penalty!r}.")
        object.__setattr__(self, "preference", as_preference(self.preference))
        object.__setattr__(self, "ideal", as_point(self.ideal, "ideal"))

    @property
    def keeps(self) -> frozenset[Promise]:
        return self.promises if self.preference is None and self.ideal is None else frozenset()

    def _only(self, live: Bool[np.ndarray, " K"]) -> "COSMOS":
        return replace(self, preference=pick(self.preference, live), ideal=pick_point(self.ideal, live, "ideal"))

    def _weights(self, losses: Float64[np.ndarray, " K"]) -> Solution:
        size = len(losses)
        preference = shares(self.preference, size)
        point = losses - point_array(self.ideal, size, "ideal")
        distance = np.linalg.norm(point)
        if distance == 0:
            return Solution(preference, note="the losses are at the ideal point", value=0.0)
        ray, unit = preference / np.linalg.norm(preference), point / distance
        cosine = ray @ unit
        weights = preference - self.penalty * (ray - cosine * unit) / distance
        return Solution(weights, value=float(preference @ point - self.penalty * cosine))
