r"""GLS: the geometric mean of the losses.

.. math::  f(L) = \prod_k L_k^{\lambda_k} , \qquad w_k = \frac{\partial f}{\partial L_k} = \lambda_k \frac{f}{L_k} ,

with the preference :math:`\lambda` on the simplex, by default :math:`1 / K`.

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
class GLS(LossAggregator, name="gls"):
    r"""Treats relative improvements of all losses alike. Losses must be positive.

    Computed with logarithms, so that products of many losses neither overflow nor vanish. The direction is that of
    LibMTL; the weights that LibMTL reports beside it are not the derivatives, these are.

    Args:
        preference: The :math:`\lambda`, one non-negative number per objective, scaled to sum 1. None means uniform, the
            published form; the paper's focused strategy multiplies some losses once more, which is a 2 among ones.

    Raises:
        ValueError: On a call with a loss that is not positive; it names the objective.

    Examples:
        >>> import torch
        >>> GLS().weights(losses=torch.tensor([2.0, 0.5]))
        tensor([0.2500, 1.0000])
    """

    reference: ClassVar = Reference(
        authors="S. Chennupati, G. Sistu, S. Yogamani and S. A. Rawashdeh",
        title="MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task Learning",
        venue="CVPR Workshops",
        year=2019,
        arxiv="1904.08492",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT, Promise.SCALE_FREE, Promise.HOMOGENEOUS})

    preference: Sequence[float] | None = None

    @property
    def needs_positive_losses(self) -> bool:
        return True

    @property
    def keeps(self) -> frozenset[Promise]:
        return self.promises if self.preference is None else self.promises - {Promise.PERMUTATION_EQUIVARIANT}

    def _check(self) -> None:
        object.__setattr__(self, "preference", as_preference(self.preference))

    def _only(self, live: Bool[np.ndarray, " K"]) -> "GLS":
        return replace(self, preference=pick(self.preference, live))

    def _weights(self, losses: Float64[np.ndarray, " K"]) -> Solution:
        require_above(self.name, losses, everyone(len(losses)))
        logs, preference = np.log(losses), shares(self.preference, len(losses))
        mean = preference @ logs
        return Solution(preference * np.exp(mean - logs), value=float(np.exp(mean)))
