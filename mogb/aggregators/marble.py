r"""MARBLE: min-norm balancing of the unit gradients, with averaged weights and the scale of the raw gradients.

.. math::  \alpha_t = \arg\min_{\alpha \in \Delta} \Big\| \sum_k \alpha_k \frac{g_k}{\|g_k\|} \Big\|^2 , \qquad
           \bar\alpha_t = \rho \, \bar\alpha_{t-1} + (1 - \rho) \, \alpha_t , \quad \bar\alpha_1 = \alpha_1 ,

.. math::  d = \Big( \frac1K \sum_k \|g_k\| \Big) \sum_k \bar\alpha_k \frac{g_k}{\|g_k\|} .

Shapes: K = objectives; :math:`\Delta` = the simplex.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64

from mogb.aggregators.mgda import MGDA
from mogb.base import Aggregator, Promise, Reference, Solution, Wrapper
from mogb.wrappers.normalized import Normalized
from mogb.wrappers.rescaled import Rescaled
from mogb.wrappers.smoothed import Smoothed


@dataclass(kw_only=True)
class MARBLE(Wrapper, name="marble"):
    r"""A composition of wrappers; their order is the definition: the average is taken inside the normalization.

    Zero gradients are left out of the solve and of the mean norm. They keep their average, and the weights of the
    others are brought back onto the simplex, so that an objective that is silent at one step is not muted afterwards.
    The simplex weights in use are in the solution's details under ``"simplex"``.

    Args:
        decay: The :math:`\rho` of the moving average, in [0, 1). The paper finds 0.7 best.

    Examples:
        >>> import torch
        >>> MARBLE()(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        tensor([1., 1.])
    """

    reference: ClassVar = Reference(
        authors="C. Zhao, H. Chen, Y. Tong, Y. Qiao, J. Li and C. Shen",
        title="MARBLE: Multi-Aspect Reward Balance for Diffusion RL",
        year=2026,
        arxiv="2605.06507",
        code="aim-uofa/MARBLE",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT, Promise.SCALE_FREE, Promise.HOMOGENEOUS})

    decay: float = 0.7
    inner: Aggregator = field(init=False, repr=False, compare=False)

    def _check(self) -> None:
        averaged = Smoothed(MGDA(), decay=self.decay)
        self.inner = Rescaled(Normalized(averaged), length="times_mean_norm")

    def _solve_live(
        self,
        gramian: Float64[np.ndarray, "K K"] | None,
        losses: Float64[np.ndarray, " K"] | None,
        live: Bool[np.ndarray, " K"],
    ) -> Solution:
        solution = self.inner._solve_live(gramian, losses, live)
        return replace(solution, details={**solution.details, "simplex": solution.details["unit"]})
