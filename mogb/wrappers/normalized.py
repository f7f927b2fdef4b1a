r"""Normalized: balance the unit gradients.

.. math::  d = \sum_k a_k \, \frac{g_k}{\|g_k\|} , \qquad w_k = \frac{a_k}{\|g_k\|} ,

where a are the weights that the method inside gives to the unit gradients.

Shapes: K = objectives.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float64

from mogb.base import Aggregator, Promise, Solution, Wrapper


@dataclass(frozen=True)
class Normalized(Wrapper):
    """Shows the method inside the cosines between the gradients in place of their inner products.

    A zero gradient has no direction: it is left out. The direction does not see the scale of any loss; its length is
    that of a combination of unit vectors (see :class:`~mogb.wrappers.rescaled.Rescaled`). The weights on the unit
    gradients are in the solution's details under ``"unit"``.

    Args:
        inner: The method.

    Examples:
        >>> import torch
        >>> from mogb.aggregators.mgda import MGDA
        >>> Normalized(MGDA())(torch.tensor([[9.0, 0.0], [0.0, 0.1]]))
        tensor([0.5000, 0.5000])
    """

    needs_gramian = True

    inner: Aggregator

    @property
    def promises(self) -> frozenset[Promise]:  # type: ignore[override]
        kept = self.inner.keeps & {Promise.NON_CONFLICTING, Promise.PERMUTATION_EQUIVARIANT}
        return kept | {Promise.SCALE_FREE}

    def _solve_live(
        self,
        gramian: Float64[np.ndarray, "K K"] | None,
        losses: Float64[np.ndarray, " K"] | None,
        live: Bool[np.ndarray, " K"],
    ) -> Solution:
        assert gramian is not None
        norms = np.sqrt(np.maximum(gramian.diagonal(), 0.0))
        live = live & (norms > 0)
        inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=live)
        cosines = gramian * inverse * inverse[:, None]
        cosines.flat[:: len(norms) + 1] = live
        solution = self.inner._solve_live(cosines, losses, live)
        return replace(
            solution, weights=solution.weights * inverse, details={**solution.details, "unit": solution.weights}
        )
