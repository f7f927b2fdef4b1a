r"""FairGrad: the alpha-fair allocation of gains among the objectives.

.. math::  d = \sum_k w_k \, g_k , \qquad G w = w^{-1/\alpha} , \quad w > 0 .

:math:`\alpha = 1` is the Nash bargain, :math:`\alpha \to 0` the plain sum, and :math:`\alpha \to \infty` makes the
gains :math:`d \cdot g_k` equal. With preferences p, scaled to mean 1, it is :math:`G w = (p / w)^{1/\alpha}`, the
weighted fairness of Mo and Walrand (IEEE/ACM Transactions on Networking, 2000).

Shapes: K = objectives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64

from mogb.aggregators._options import as_preference, check_max_norm, clipped, pick, relative_preference
from mogb.base import GramianAggregator, Promise, Reference, Solution
from mogb.solvers.bargaining import bargain


@dataclass(frozen=True, kw_only=True)
class FairGrad(GramianAggregator, name="fairgrad"):
    r"""Returns the weights of the fixed point themselves, as the official function ``fairgrad`` does.

    The training loop of the official code multiplies the direction by K and clips it at norm 1 afterwards; ``max_norm``
    is that clip. Where no fixed point exists, because the point is Pareto stationary, the direction is 0 and the
    solution's note says so. Zero gradients are left out.

    Args:
        alpha: Fairness, positive. The paper's experiments use 1 and 2.
        max_norm: Longest direction; 0 switches the clip off.
        preference: Positive numbers, one per objective, scaled to mean 1. None means equal ones. The official code has
            none.

    Examples:
        >>> import torch
        >>> FairGrad(alpha=1.0).weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 1.0000])
    """

    reference: ClassVar = Reference(
        authors="H. Ban and K. Ji",
        title="Fair Resource Allocation in Multi-Task Learning",
        venue="International Conference on Machine Learning",
        year=2024,
        arxiv="2402.15638",
        code="OptMN-Lab/fairgrad",
    )
    promises: ClassVar = frozenset({Promise.NON_CONFLICTING, Promise.PERMUTATION_EQUIVARIANT, Promise.SCALE_FREE})

    alpha: float = 1.0
    max_norm: float = 0.0
    preference: Sequence[float] | None = None

    def _check(self) -> None:
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"alpha must be positive and finite, but got {self.alpha!r}.")
        check_max_norm(self.max_norm)
        object.__setattr__(self, "preference", as_preference(self.preference, positive=True))

    @property
    def keeps(self) -> frozenset[Promise]:
        broken = set() if self.alpha == 1 else {Promise.SCALE_FREE}
        return self.promises - (broken if self.preference is None else broken | {Promise.PERMUTATION_EQUIVARIANT})

    @property
    def leaves_out_zero(self) -> bool:
        return True

    def _only(self, live: Bool[np.ndarray, " K"]) -> "FairGrad":
        return self if self.preference is None else replace(self, preference=pick(self.preference, live))

    def _weights(self, gramian: Float64[np.ndarray, "K K"]) -> Solution:
        found = bargain(gramian, self.alpha, preference=relative_preference(self.preference, len(gramian)))
        note = "Pareto stationary: no fair allocation exists" if found.stationary else ""
        weights = clipped(found.weights, gramian, self.max_norm)
        return Solution(weights, found.residual, found.converged, note=note)
