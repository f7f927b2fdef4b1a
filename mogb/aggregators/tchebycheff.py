r"""Tchebycheff: the largest weighted distance of a loss from the ideal point.

.. math::  f(L) = \max_k \; \lambda_k (L_k - z_k) , \qquad
           w_k = \begin{cases} \lambda_k & k = \arg\max_j \lambda_j (L_j - z_j) \\ 0 & \text{otherwise} \end{cases}

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
class Tchebycheff(LossAggregator, name="tchebycheff"):
    r"""Follows the objective that is worst off. Its minima reach a whole Pareto front, concave parts included.

    Where several are worst off together, to the last bit, they share the weight: the mean of their subgradients. The
    maximum has a kink there, across which gradient steps zigzag; STCH is the smooth form.

    The modified form, with :math:`(L_k - z_k) / \lambda_k`, is this one with preferences proportional to
    :math:`1 / \lambda_k`.

    Args:
        preference: The :math:`\lambda`, one non-negative number per objective, scaled to sum 1. None means uniform.
        ideal: The point z, usually at or below the smallest losses to expect. None means the origin.

    Examples:
        >>> import torch
        >>> Tchebycheff(preference=[0.2, 0.8]).weights(losses=torch.tensor([3.0, 1.0]))
        tensor([0.0000, 0.8000])
    """

    reference: ClassVar = Reference(
        authors="R. E. Steuer and E.-U. Choo",
        title="An interactive weighted Tchebycheff procedure for multiple objective programming",
        venue="Mathematical Programming",
        year=1983,
        url="https://doi.org/10.1007/BF02591870",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT, Promise.HOMOGENEOUS})

    preference: Sequence[float] | None = None
    ideal: Sequence[float] | None = None

    def _check(self) -> None:
        object.__setattr__(self, "preference", as_preference(self.preference))
        object.__setattr__(self, "ideal", as_point(self.ideal, "ideal"))

    @property
    def keeps(self) -> frozenset[Promise]:
        return self.promises if self.preference is None and self.ideal is None else frozenset()

    def _only(self, live: Bool[np.ndarray, " K"]) -> "Tchebycheff":
        return replace(self, preference=pick(self.preference, live), ideal=pick_point(self.ideal, live, "ideal"))

    def _weights(self, losses: Float64[np.ndarray, " K"]) -> Solution:
        size = len(losses)
        preference = shares(self.preference, size)
        distances = preference * (losses - point_array(self.ideal, size, "ideal"))
        worst = distances == distances.max()
        return Solution(np.where(worst, preference, 0.0) / worst.sum(), value=float(distances.max()))
