r"""Nash-MTL: the bargaining solution, in which every objective gains in proportion.

.. math::  d = \sum_k w_k \, g_k , \qquad G w = 1 / w , \quad w > 0 ,

which maximizes :math:`\sum_k \log(d \cdot g_k)` among the directions of one length, so that rescaling a loss changes
nothing. Its squared norm is always K; therefore the direction is clipped.

With preferences p, scaled to mean 1, it is the asymmetric bargain :math:`G w = p / w`, which maximizes
:math:`\sum_k p_k \log(d \cdot g_k)` (Kalai, International Journal of Game Theory, 1977).

Shapes: K = objectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64

from mogb.aggregators._options import as_preference, check_max_norm, clipped, pick, relative_preference
from mogb.base import GramianAggregator, Promise, Reference, Solution
from mogb.solvers.bargaining import bargain


@dataclass(frozen=True, kw_only=True)
class NashMTL(GramianAggregator, name="nash_mtl"):
    r"""Solves the fixed point itself, by Newton's method on a convex problem.

    The official code linearizes the same problem some 20 times, warm-started from the last step, and returns weights
    of 1 without notice where that fails. Here nothing depends on past steps. Where no fixed point exists, because the
    point is Pareto stationary, the direction is 0 and the solution's note says so. Zero gradients are left out.

    Args:
        max_norm: Longest direction; 0 switches the clip off. The official default is 1.
        preference: Positive numbers, one per objective, scaled to mean 1: bargaining powers. None means equal ones. The
            official code has none.

    Examples:
        >>> import torch
        >>> NashMTL(max_norm=0).weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 1.0000])
    """

    reference: ClassVar = Reference(
        authors="A. Navon, A. Shamsian, I. Achituve, H. Maron, K. Kawaguchi, G. Chechik and E. Fetaya",
        title="Multi-Task Learning as a Bargaining Game",
        venue="International Conference on Machine Learning",
        year=2022,
        arxiv="2202.01017",
        code="AvivNavon/nash-mtl",
    )
    promises: ClassVar = frozenset({Promise.NON_CONFLICTING, Promise.PERMUTATION_EQUIVARIANT, Promise.SCALE_FREE})

    max_norm: float = 1.0
    preference: Sequence[float] | None = None

    def _check(self) -> None:
        check_max_norm(self.max_norm)
        object.__setattr__(self, "preference", as_preference(self.preference, positive=True))

    @property
    def keeps(self) -> frozenset[Promise]:
        return self.promises if self.preference is None else self.promises - {Promise.PERMUTATION_EQUIVARIANT}

    @property
    def leaves_out_zero(self) -> bool:
        return True

    def _only(self, live: Bool[np.ndarray, " K"]) -> "NashMTL":
        return self if self.preference is None else replace(self, preference=pick(self.preference, live))

    def _weights(self, gramian: Float64[np.ndarray, "K K"]) -> Solution:
        found = bargain(gramian, preference=relative_preference(self.preference, len(gramian)))
        note = "Pareto stationary: no bargain exists" if found.stationary else ""
        weights = clipped(found.weights, gramian, self.max_norm)
        return Solution(weights, found.residual, found.converged, note=note)
