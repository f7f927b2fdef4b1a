r"""SI: the sum of the logarithms of the losses, which does not see their scales.

.. math::  f(L) = \sum_k \lambda_k \log L_k , \qquad w_k = \frac{\partial f}{\partial L_k} = \frac{\lambda_k}{L_k}

with the preference :math:`\lambda`, whose sum is K, by default 1 for every objective.

Shapes: K = objectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64

from mogb.aggregators._losses import require_above, shares
from mogb.aggregators._options import as_preference, pick
from mogb.aggregators._state import everyone
from mogb.base import LossAggregator, Promise, Reference, Solution


@dataclass(frozen=True, kw_only=True)
class SI(LossAggregator, name="si"):
    r"""Scale-invariant linear scalarization. Losses must be positive.

    Multiplying a loss by a constant changes nothing at all: not the direction, not its length. It points where GLS
    does; only the length differs.

    Follows the Nash-MTL code (``scaleinvls``); a port elsewhere takes log(1 + L), which is not invariant.

    Args:
        preference: The :math:`\lambda`, one non-negative number per objective, scaled to sum K. None means equal.

    Raises:
        ValueError: On a call with a loss that is not positive; it names the objective.

    Examples:
        >>> import torch
        >>> SI().weights(losses=torch.tensor([2.0, 0.5]))
        tensor([0.5000, 2.0000])
    """

    reference: ClassVar = Reference(
        authors="A. Navon, A. Shamsian, I. Achituve, H. Maron, K. Kawaguchi, G. Chechik and E. Fetaya",
        title="Multi-Task Learning as a Bargaining Game",
        venue="ICML",
        year=2022,
        arxiv="2202.01017",
        code="AvivNavon/nash-mtl",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT, Promise.SCALE_FREE})

    preference: Sequence[float] | None = None

    @property
    def needs_positive_losses(self) -> bool:
        return True

    @property
    def keeps(self) -> frozenset[Promise]:
        return self.promises if self.preference is None else self.promises - {Promise.PERMUTATION_EQUIVARIANT}

    def _check(self) -> None:
        object.__setattr__(self, "preference", as_preference(self.preference))

    def _only(self, live: Bool[np.ndarray, " K"]) -> "SI":
        return replace(self, preference=pick(self.preference, live))

    def _weights(self, losses: Float64[np.ndarray, " K"]) -> Solution:
        require_above(self.name, losses, everyone(len(losses)))
        preference = len(losses) * shares(self.preference, len(losses))
        return Solution(preference / losses, value=float(preference @ np.log(losses)))
