r"""Silenced: leave out the objectives whose gradient is zero or noise.

.. math::  \text{objective } k \text{ takes part} \iff \|g_k\| > \tau \max_j \|g_j\| .

Shapes: K = objectives.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

from mogb.base import Aggregator, Promise, Solution, Wrapper


@dataclass(frozen=True)
class Silenced(Wrapper):
    """Balances the other objectives as if the silent ones did not exist, and says which ones were left out.

    A silent objective, such as a reward that applies to no sample of the batch, would otherwise take the whole weight
    of a min-norm point, and stop the step. The longest gradient always takes part, unless all are zero.

    Args:
        inner: The method.
        tolerance: Norms up to this share of the longest one are silent, in [0, 1). 0 leaves out zero gradients only.

    Examples:
        >>> import torch
        >>> from mogb.aggregators.mgda import MGDA
        >>> Silenced(MGDA())(torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
        tensor([3., 0.])
    """

    needs_gramian = True

    inner: Aggregator
    tolerance: float = 1e-8

    def _check(self) -> None:
        super()._check()
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), but got {self.tolerance!r}.")

    @property
    def promises(self) -> frozenset[Promise]:  # type: ignore[override]
        if self.tolerance == 0:
            return self.inner.keeps
        return self.inner.keeps - {Promise.NON_CONFLICTING, Promise.SCALE_FREE}

    def _solve_live(
        self,
        gramian: Float64[np.ndarray, "K K"] | None,
        losses: Float64[np.ndarray, " K"] | None,
        live: Bool[np.ndarray, " K"],
    ) -> Solution:
        assert gramian is not None
        squares = np.where(live, gramian.diagonal(), 0.0)
        return self.inner._solve_live(gramian, losses, live & (squares > self.tolerance**2 * squares.max()))
