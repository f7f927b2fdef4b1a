r"""CAGrad: the direction near the mean gradient that improves the worst objective most.

.. math::  d = \arg\max_d \min_k d \cdot g_k \quad \text{s.t.} \quad \|d - g_0\| \le c \, \|g_0\| , \qquad
           g_0 = \tfrac1K \sum_k g_k .

By duality :math:`d = g_0 + \frac{c \|g_0\|}{\|g_w\|} g_w` with :math:`g_w = \sum_k w_k g_k`, and w on the simplex
minimizes :math:`g_w \cdot g_0 + c \|g_0\| \|g_w\|`. With preferences p on the simplex :math:`g_0 = \sum_k p_k \, g_k`.

Shapes: K = objectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float64

from mogb.aggregators._options import as_preference, preference_array
from mogb.base import GramianAggregator, Promise, Reference, Solution
from mogb.solvers.conflict_averse import conflict_averse


@dataclass(frozen=True, kw_only=True)
class CAGrad(GramianAggregator, name="cagrad"):
    r"""Solves the dual problem exactly, at any scale of the gradients.

    The official solver stops at its start for short gradients (mean norm below about 0.04), and is then the mean
    gradient. Where :math:`g_w = 0`, the point is Pareto stationary and the formula divides by zero; the answer is then
    the mean gradient, not rescaled, and the solution's note says so.

    Args:
        c: Radius of the trust region, relative to the mean gradient. 0 is the mean gradient; from 1 on no objective
            gets worse.
        rescale: What the official function divides d by: 1 (its default) means :math:`1 + c^2`, 2 means
            :math:`1 + c`, and 0 nothing, as in the paper.
        preference: Non-negative numbers, one per objective, scaled to sum 1: the weighted mean that the direction stays
            near. None means the mean, as in the paper and its code.

    Examples:
        >>> import torch
        >>> CAGrad(c=0.5, rescale=0)(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
        tensor([1.5000, 1.5000])
    """

    reference: ClassVar = Reference(
        authors="B. Liu, X. Liu, X. Jin, P. Stone and Q. Liu",
        title="Conflict-Averse Gradient Descent for Multi-task Learning",
        venue="Advances in Neural Information Processing Systems",
        year=2021,
        arxiv="2110.14048",
        code="Cranial-XIX/CAGrad",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT, Promise.HOMOGENEOUS})

    c: float = 0.5
    rescale: Literal[0, 1, 2] = 1
    preference: Sequence[float] | None = None

    def _check(self) -> None:
        if not 0 <= self.c < float("inf"):
            raise ValueError(f"c must be 0 or a positive number, but got {self.c!r}.")
        if self.rescale not in (0, 1, 2):
            raise ValueError(f"rescale must be 0 (none), 1 (1 + c^2) or 2 (1 + c), but got {self.rescale!r}.")
        object.__setattr__(self, "preference", as_preference(self.preference))

    @property
    def keeps(self) -> frozenset[Promise]:
        return self.promises if self.preference is None else self.promises - {Promise.PERMUTATION_EQUIVARIANT}

    def _weights(self, gramian: Float64[np.ndarray, "K K"]) -> Solution:
        wishes = preference_array(self.preference, len(gramian), 1.0)
        preferred = wishes / wishes.sum()
        found = conflict_averse(gramian, self.c, preferred)
        if found.stationary:
            note = f"Pareto stationary: the {'mean' if self.preference is None else 'preferred'} gradient"
            return Solution(preferred, found.residual, found.converged, note=note)
        divisor = (1.0, 1 + self.c**2, 1 + self.c)[self.rescale]
        weights = (preferred + found.multiplier * found.simplex) / divisor
        return Solution(weights, found.residual, found.converged, details={"simplex": found.simplex})
