r"""CR-MOGM: any weighting, with its weights averaged over the steps.

.. math::  \lambda_t = \alpha \, \lambda_{t-1} + (1 - \alpha) \, \hat\lambda_t , \qquad \lambda_1 = \hat\lambda_1 ,

where :math:`\hat\lambda_t` are the weights of the method inside. On stochastic gradients these are correlated with the
gradients that they weight, which biases the direction; averaging weakens the correlation, and the method converges
without ever larger batches.

Shapes: K = objectives.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64

from mogb.base import Aggregator, Promise, Reference, Solution, Wrapper
from mogb.wrappers.smoothed import Smoothed


@dataclass(kw_only=True)
class CRMOGM(Wrapper, name="cr_mogm"):
    """The wrapper :class:`~mogb.wrappers.smoothed.Smoothed` under its published name and with its published settings.

    The paper averages the weights of MGDA, PCGrad and CAGrad; TorchJD, whose start and default decay this follows,
    shows it with UPGrad.

    Args:
        weighting: The method inside: a registered name, or an instance for options other than its defaults.
        alpha: The weight of the past, in [0, 1). The paper's theory lets it grow toward 1 as the learning rate decays.

    Raises:
        ValueError: An unknown name, or a method that yields no weights.

    Examples:
        >>> import torch
        >>> method = CRMOGM(weighting="mgda", alpha=0.5)
        >>> method.weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.2000, 0.8000])
        >>> method.weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([0.5000, 0.5000])
    """

    reference: ClassVar = Reference(
        authors="S. Zhou, W. Zhang, J. Jiang, W. Zhong, J. Gu and W. Zhu",
        title="On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond",
        venue="Advances in Neural Information Processing Systems",
        year=2022,
        url=(
            "https://proceedings.neurips.cc/paper_files/paper/2022/file/"
            "f91bd64a3620aad8e70a27ad9cb3ca57-Paper-Conference.pdf"
        ),
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT, Promise.HOMOGENEOUS})

    weighting: Aggregator | str = "upgrad"
    alpha: float = 0.9
    inner: Aggregator = field(init=False, repr=False, compare=False)

    @property
    def keeps(self) -> frozenset[Promise]:
        """Those of the method inside that survive averaging."""
        return self.inner.keeps

    def _check(self) -> None:
        from mogb.aggregators import make  # the registry is complete only once every module is imported

        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha must be in [0, 1), but got {self.alpha!r}.")
        if isinstance(self.weighting, str):
            self.weighting = make(self.weighting)
        self.inner = Smoothed(self.weighting, decay=self.alpha)

    def _solve_live(
        self,
        gramian: Float64[np.ndarray, "K K"] | None,
        losses: Float64[np.ndarray, " K"] | None,
        live: Bool[np.ndarray, " K"],
    ) -> Solution:
        return self.inner._solve_live(gramian, losses, live)
