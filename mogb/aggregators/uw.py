r"""UW: uncertainty weighting, with learned log variances s.

.. math::  f(L, s) = \sum_k \tfrac12 e^{-s_k} L_k + \tfrac12 s_k , \qquad
           w_k = \frac{\partial f}{\partial L_k} = \tfrac12 e^{-s_k} , \qquad
           \frac{\partial f}{\partial s_k} = \tfrac12 \bigl( 1 - e^{-s_k} L_k \bigr)

For fixed losses the best s is :math:`\log L_k`, with the weights :math:`1 / (2 L_k)`.

Shapes: K = objectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64

from mogb.aggregators._state import everyone
from mogb.base import LossAggregator, Phase, Promise, Reference, Solution, state
from mogb.learned import LearnedVector, initial_numbers


@dataclass(kw_only=True)
class UW(LossAggregator, name="uw"):
    """Learns the weights with the model, by the same optimizer.

    Give ``parameters()`` to the optimizer; every solve sets their ``.grad``. The Nash-MTL and FAMO benchmarks give
    them a learning rate of 0.025 of their own. They start as an empty tensor that takes its size at the first solve
    (with Adagrad, which cannot wait, give one ``init`` per objective).

    The formula is the paper's for regression, applied to every loss as in the Nash-MTL code, LibMTL and TorchJD; some
    ports leave out the first one half, which is the paper's form for classification. A loss that stays below zero has
    no best s: its weight grows for ever.

    Args:
        init: Where the log variances start, one number for all or one for each objective. 0 as in the Nash-MTL code;
            LibMTL has -0.5.

    Raises:
        RuntimeError: On a second call, if nobody called ``parameters()``.

    Examples:
        >>> import torch
        >>> method = UW()
        >>> optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
        >>> method.weights(losses=torch.tensor([3.0, 1.0]))
        tensor([0.5000, 0.5000])
        >>> optimizer.step()
        >>> method.weights(losses=torch.tensor([3.0, 1.0]))
        tensor([0.1839, 0.5000])
    """

    reference: ClassVar = Reference(
        authors="A. Kendall, Y. Gal and R. Cipolla",
        title="Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics",
        venue="CVPR",
        year=2018,
        arxiv="1705.07115",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT, Promise.HOMOGENEOUS})

    init: float | Sequence[float] = 0.0
    _log_variances: LearnedVector = state(kind="learned")

    def _check(self) -> None:
        self.init = initial_numbers(self.init, "init")

    def _start(self) -> None:
        if self._log_variances is None:
            self._log_variances = LearnedVector(initial_numbers(self.init, "init"))

    @property
    def phases(self) -> frozenset[Phase]:
        return frozenset({"parameters"})

    @property
    def keeps(self) -> frozenset[Promise]:
        alike = not isinstance(self.init, tuple)
        return self.promises if alike else self.promises - {Promise.PERMUTATION_EQUIVARIANT}

    def _weights(self, losses: Float64[np.ndarray, " K"]) -> Solution:
        return self._solve_live(None, losses, everyone(len(losses)))

    def _solve_live(
        self,
        gramian: Float64[np.ndarray, "K K"] | None,
        losses: Float64[np.ndarray, " K"] | None,
        live: Bool[np.ndarray, " K"],
    ) -> Solution:
        assert losses is not None
        logs = self._log_variances.values(self.name, len(losses))
        with np.errstate(over="ignore", invalid="ignore"):  # numbers that diverged are refused by the caller
            weights = np.where(live, 0.5 * np.exp(-logs), 0.0)
            slope = np.where(live, 0.5 - weights * losses, 0.0)
            value = (weights * losses + 0.5 * logs)[live].sum()
        if np.isfinite(slope).all():
            self._log_variances.learn(slope)
        negative = np.flatnonzero(live & (losses < 0))
        note = f"loss {negative[0]} is below zero: its weight grows without bound" if len(negative) else ""
        return Solution(weights, left_out=tuple(np.flatnonzero(~live).tolist()), note=note, value=float(value))
