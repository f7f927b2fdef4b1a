r"""GLS: the geometric mean of the losses.

.. math::  f(L) = \Bigl( \prod_k L_k \Bigr)^{1/K} , \qquad w_k = \frac{\partial f}{\partial L_k} = \frac{f}{K L_k}

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
class GLS(LossAggregator, name="gls"):
    """Treats relative improvements of all losses alike. Losses must be positive.

    Computed with logarithms, so that products of many losses neither overflow nor vanish. The direction is that of
    LibMTL; the weights that LibMTL reports beside it are not the derivatives, these are.

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

    @property
    def needs_positive_losses(self) -> bool:
        return True

    def _weights(self, losses: Float64[np.ndarray, " K"]) -> Solution:
        require_above(self.name, losses, everyone(len(losses)))
        logs = np.log(losses)
        mean = logs.mean()
        return Solution(np.exp(mean - logs) / len(losses), value=float(np.exp(mean)))
