r"""SI: the sum of the logarithms of the losses, which does not see their scales.

.. math::  f(L) = \sum_k \log L_k , \qquad w_k = \frac{\partial f}{\partial L_k} = \frac{1}{L_k}

Shapes: K = objectives.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float64

from mogb.aggregators._losses import require_above
from mogb.aggregators._state import everyone
from mogb.base import LossAggregator, Promise, Reference, Solution


@dataclass(frozen=True, kw_only=True)
class SI(LossAggregator, name="si"):
    """Scale-invariant linear scalarization. Losses must be positive.

    Multiplying a loss by a constant changes nothing at all: not the direction, not its length. It points where GLS
    does; only the length differs.

    Follows the Nash-MTL code (``scaleinvls``); a port elsewhere takes log(1 + L), which is not invariant.

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

    @property
    def needs_positive_losses(self) -> bool:
        return True

    def _weights(self, losses: Float64[np.ndarray, " K"]) -> Solution:
        require_above(self.name, losses, everyone(len(losses)))
        return Solution(1 / losses, value=float(np.log(losses).sum()))
