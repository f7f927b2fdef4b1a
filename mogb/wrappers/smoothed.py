r"""Smoothed: a moving average of the weights.

.. math::  \bar w_t = \rho \, \bar w_{t-1} + (1 - \rho) \, w_t , \qquad \bar w_1 = w_1 .

Shapes: K = objectives.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float64

from mogb.base import Aggregator, Promise, Solution, Wrapper, state
from mogb.errors import NonFiniteError


@dataclass
class Smoothed(Wrapper):
    """Averages the weights over the steps, starting from the first ones.

    An objective that is left out of a step keeps its average and has the weight 0 at that step; one that was always
    left out so far starts with its own first weight. Where the method inside promises weights on the simplex, those in
    use are brought back onto it.

    Args:
        inner: The method.
        decay: The weight of the past, in [0, 1); 0 averages nothing.

    Examples:
        >>> import torch
        >>> from mogb.aggregators.mgda import MGDA
        >>> smoothed = Smoothed(MGDA(), decay=0.5)
        >>> smoothed.weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.2000, 0.8000])
        >>> smoothed.weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([0.5000, 0.5000])
    """

    inner: Aggregator
    decay: float = 0.9
    _average: Float64[np.ndarray, " K"] | None = state()  # NaN for an objective that never took part

    def _check(self) -> None:
        super()._check()
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), but got {self.decay!r}.")

    @property
    def promises(self) -> frozenset[Promise]:  # type: ignore[override]
        return self.inner.keeps - {Promise.NON_CONFLICTING}

    def _solve_live(
        self,
        gramian: Float64[np.ndarray, "K K"] | None,
        losses: Float64[np.ndarray, " K"] | None,
        live: Bool[np.ndarray, " K"],
    ) -> Solution:
        if self._average is not None and len(self._average) != len(live):
            raise ValueError(
                f"The average is over {len(self._average)} objectives, but this step has {len(live)}: call reset() "
                "before the number changes."
            )
        solution = self.inner._solve_live(gramian, losses, live)
        if not np.isfinite(solution.weights).all():
            raise NonFiniteError("direction", None)
        part = np.ones(len(live), dtype=bool)
        part[list(solution.left_out)] = False
        before = np.full(len(live), np.nan) if self._average is None else self._average
        average = self.decay * before + (1 - self.decay) * solution.weights
        average = np.where(np.isnan(before), solution.weights, average)
        self._average = np.where(part, average, before)
        weights = np.where(part, average, 0.0)
        if Promise.SIMPLEX_WEIGHTS in self.inner.keeps and (total := weights.sum()) > 0:
            weights = weights / total
        return replace(solution, weights=weights)
