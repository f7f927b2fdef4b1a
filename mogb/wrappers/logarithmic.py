r"""Logarithmic: balance the gradients of the log losses.

.. math::  \nabla \log \ell_k = \frac{g_k}{\ell_k} , \qquad w_k = \frac{a_k}{\ell_k} ,

where a are the weights that the method inside gives to the gradients of the logarithms.

Shapes: K = objectives.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float64

from mogb.base import Aggregator, Promise, Solution, Wrapper, needs_losses


@dataclass(frozen=True)
class Logarithmic(Wrapper):
    """Shows the method inside the gradients of the logarithms of the losses, which must be positive.

    With :class:`~mogb.aggregators.weighted_sum.WeightedSum` of ones inside it minimizes the product of the losses, and
    with MGDA, CAGrad or IMTL-G it is what the FAMO repository calls ``log_mgda``, ``log_cagrad`` and ``log_imtl``.

    Args:
        inner: The method.

    Examples:
        >>> import torch
        >>> from mogb.aggregators.weighted_sum import WeightedSum
        >>> Logarithmic(WeightedSum(weights=[1.0, 1.0])).weights(torch.eye(2), losses=torch.tensor([0.5, 4.0]))
        tensor([2.0000, 0.2500])
    """

    needs_values = True

    inner: Aggregator

    @property
    def needs_positive_losses(self) -> bool:
        return True

    @property
    def promises(self) -> frozenset[Promise]:  # type: ignore[override]
        kept = self.inner.keeps & {Promise.NON_CONFLICTING, Promise.PERMUTATION_EQUIVARIANT}
        return kept if needs_losses(self.inner) else kept | {Promise.SCALE_FREE}

    def _solve_live(
        self,
        gramian: Float64[np.ndarray, "K K"] | None,
        losses: Float64[np.ndarray, " K"] | None,
        live: Bool[np.ndarray, " K"],
    ) -> Solution:
        assert losses is not None
        if losses.min() <= 0:
            index = int(losses.argmin())
            raise ValueError(
                f"Logarithms need positive losses, but losses[{index}] = {losses[index]:g}: shift that loss."
            )
        inverse = 1 / losses
        scaled = None if gramian is None else gramian * inverse * inverse[:, None]
        solution = self.inner._solve_live(scaled, np.log(losses), live)
        return replace(solution, weights=solution.weights * inverse)

    def _update(self, losses: Float64[np.ndarray, " K"] | None) -> None:
        self.inner._update(None if losses is None else np.log(losses))
