r"""Refreshed: solve at every n-th step, and reuse the weights in between.

.. math::  w_t = w_{n \lfloor t / n \rfloor}, \qquad t = 0, 1, 2, \dots

Shapes: K = objectives.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

from mogb.base import Aggregator, Promise, Solution, Wrapper, state


@dataclass
class Refreshed(Wrapper):
    """Solves at the first call and at every ``every``-th one after it.

    It still reads what the method inside reads. To save the K backward passes as well, use
    :class:`mogb.Balancer` with ``refresh_every``. An objective that is left out of a step in between has the weight 0
    at that step, and is told apart in the solution.

    Args:
        inner: The method.
        every: Steps from one solve to the next.

    Examples:
        >>> import torch
        >>> from mogb.aggregators.mgda import MGDA
        >>> refreshed = Refreshed(MGDA(), every=2)
        >>> refreshed.weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.2000, 0.8000])
        >>> refreshed.weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([0.2000, 0.8000])
    """

    inner: Aggregator
    every: int = 10
    _step: int = state(0, kind="number")
    _weights: Float64[np.ndarray, " K"] | None = state()
    _left_out: Float64[np.ndarray, " K"] | None = state()  # 1 for those that took no part in the last solve

    def _check(self) -> None:
        super()._check()
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ValueError(f"every must be a positive integer, but got {self.every!r}.")

    @property
    def promises(self) -> frozenset[Promise]:  # type: ignore[override]
        return self.inner.keeps - {Promise.NON_CONFLICTING}

    def _solve_live(
        self,
        gramian: Float64[np.ndarray, "K K"] | None,
        losses: Float64[np.ndarray, " K"] | None,
        live: Bool[np.ndarray, " K"],
    ) -> Solution:
        if self._weights is not None and len(self._weights) != len(live):
            raise ValueError(
                f"The weights are for {len(self._weights)} objectives, but this step has {len(live)}: call reset() "
                "before the number changes."
            )
        if self._weights is None or self._step % self.every == 0:
            solution = self.inner._solve_live(gramian, losses, live)
            self._weights = solution.weights.copy()
            self._left_out = np.zeros(len(live))
            self._left_out[list(solution.left_out)] = 1.0
        else:
            assert self._left_out is not None
            part = live & (self._left_out == 0)
            weights = np.where(part, self._weights, 0.0)
            if Promise.SIMPLEX_WEIGHTS in self.inner.keeps and (total := weights.sum()) > 0:
                weights = weights / total
            solution = Solution(weights, left_out=tuple((~part).nonzero()[0].tolist()), note="weights reused")
        self._step += 1
        return solution
