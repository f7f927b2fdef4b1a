r"""IMTL-L: learned scales s that bring all losses to the same size.

.. math::  f(L, s) = \sum_k e^{s_k} L_k - s_k , \qquad
           w_k = \frac{\partial f}{\partial L_k} = e^{s_k} , \qquad
           \frac{\partial f}{\partial s_k} = e^{s_k} L_k - 1

For fixed losses the best s is :math:`-\log L_k`: every scaled loss is then 1.

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
class IMTLL(LossAggregator, name="imtl_l"):
    """The loss half of IMTL: the sum of the losses at first, of losses that are all near 1 later.

    It is twice uncertainty weighting with the sign of s changed. Give ``parameters()`` to the optimizer; every solve
    sets their ``.grad``. They start as an empty tensor that takes its size at the first solve (with Adagrad, which
    cannot wait, give one ``init`` per objective). A loss that stays below zero has no best s: its weight grows for
    ever.

    Args:
        init: Where the scales start, one number for all or one for each objective. 0 as in LibMTL and TorchJD.

    Raises:
        RuntimeError: On a second call, if nobody called ``parameters()``.

    Examples:
        >>> import torch
        >>> IMTLL().weights(losses=torch.tensor([3.0, 1.0]))
        tensor([1., 1.])
    """

    reference: ClassVar = Reference(
        authors="L. Liu, Y. Li, Z. Kuang, J.-H. Xue, Y. Chen, W. Yang, Q. Liao and W. Zhang",
        title="Towards Impartial Multi-task Learning",
        venue="ICLR",
        year=2021,
        url="https://openreview.net/forum?id=IMPnRXEWpvr",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT, Promise.HOMOGENEOUS})

    init: float | Sequence[float] = 0.0
    _scales: LearnedVector = state(kind="learned")

    def _check(self) -> None:
        self.init = initial_numbers(self.init, "init")

    def _start(self) -> None:
        if self._scales is None:
            self._scales = LearnedVector(initial_numbers(self.init, "init"))

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
        scales = self._scales.values(self.name, len(losses))
        with np.errstate(over="ignore", invalid="ignore"):  # numbers that diverged are refused by the caller
            weights = np.where(live, np.exp(scales), 0.0)
            slope = np.where(live, weights * losses - 1.0, 0.0)
            value = (weights * losses - scales)[live].sum()
        if np.isfinite(slope).all():
            self._scales.learn(slope)
        negative = np.flatnonzero(live & (losses < 0))
        note = f"loss {negative[0]} is below zero: its weight grows without bound" if len(negative) else ""
        return Solution(weights, left_out=tuple(np.flatnonzero(~live).tolist()), note=note, value=float(value))
