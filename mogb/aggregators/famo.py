r"""FAMO: lower all log losses at the same rate, judged by what the last step did.

With the learned shares :math:`z = \operatorname{softmax}(\xi)` and lower bounds b of the losses,

.. math::  f(L) = c \sum_k z_k \log (L_k - b_k) , \qquad
           w_k = c \, \frac{z_k}{L_k - b_k} , \qquad c = \Bigl( \sum_k \frac{z_k}{L_k - b_k} \Bigr)^{-1}

where c counts as a constant, so that the weights are on the simplex. After the step, with the losses
:math:`L'` of the same batch,

.. math::  \delta_k = \log \frac{L_k - b_k}{L'_k - b_k} , \qquad
           \xi \leftarrow \operatorname{Adam}\bigl( \xi, \; z \odot (\delta - z \cdot \delta) + \gamma \xi \bigr) .

Shapes: K = objectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64

from mogb.aggregators._losses import as_point, point_array, require_above, softmax
from mogb.aggregators._state import everyone, nobody, same_size
from mogb.base import LossAggregator, Phase, Promise, Reference, Solution, state

# Of Adam.
DECAYS = (0.9, 0.999)
EPS = 1e-8


@dataclass(kw_only=True)
class FAMO(LossAggregator, name="famo"):
    r"""Objectives that fell less get more of the next step: one backward pass, and one more forward pass.

    A step has two phases: after ``optimizer.step()``, call ``update`` with the losses of the *same* batch, evaluated
    again; the official toy experiment saves that forward pass and passes the losses of the next step instead. The
    logits :math:`\xi` are its own business: it holds their Adam moments.

    Differences to the official code: a constant of 1e-8 inside the logarithms is left out, so that a loss at its bound
    is refused and scales do not matter at all; and clipping the model's gradients (norm 1 there) is left to the
    training loop.

    Args:
        lr: Of the logits. 0.025 as in the paper and every code.
        weight_decay: The :math:`\gamma`. 0.001 as in most of the official run scripts, LibMTL and TorchJD; the default
            of the official class is 1e-5, that of its stand-alone version 0.01.
        min_losses: The b, one number per objective, below every loss to expect. None means 0.

    Raises:
        ValueError: On a call with a loss that is not above its bound; it names the objective.
        RuntimeError: On a call after a step whose ``update`` was forgotten.

    Examples:
        >>> import torch
        >>> method = FAMO(lr=0.5)
        >>> method.weights(losses=torch.tensor([1.0, 3.0]))
        tensor([0.7500, 0.2500])
        >>> method.update(torch.tensor([0.5, 3.0]))  # the second one did not fall
        >>> method.weights(losses=torch.tensor([1.0, 3.0]))
        tensor([0.5246, 0.4754])
    """

    reference: ClassVar = Reference(
        authors="B. Liu, Y. Feng, P. Stone and Q. Liu",
        title="FAMO: Fast Adaptive Multitask Optimization",
        venue="NeurIPS",
        year=2023,
        arxiv="2306.03792",
        code="Cranial-XIX/FAMO",
    )
    promises: ClassVar = frozenset(
        {Promise.SIMPLEX_WEIGHTS, Promise.PERMUTATION_EQUIVARIANT, Promise.SCALE_FREE, Promise.HOMOGENEOUS}
    )

    lr: float = 0.025
    weight_decay: float = 0.001
    min_losses: Sequence[float] | None = None

    _logits: Float64[np.ndarray, " K"] | None = state()
    _mean: Float64[np.ndarray, " K"] | None = state()
    _square: Float64[np.ndarray, " K"] | None = state()
    _updates: int = state(0, kind="number")
    _before: Float64[np.ndarray, " K"] | None = state()  # losses that wait for an update; NaN where one sat out

    def _check(self) -> None:
        self.min_losses = as_point(self.min_losses, "min_losses")
        for name, value in (("lr", self.lr), ("weight_decay", self.weight_decay)):
            if not 0 <= value < np.inf:
                raise ValueError(f"{name} must be at least 0 and finite, but got {value!r}.")

    @property
    def phases(self) -> frozenset[Phase]:
        return frozenset({"update"})

    @property
    def needs_positive_losses(self) -> bool:
        return self.min_losses is None

    @property
    def keeps(self) -> frozenset[Promise]:
        return self.promises if self.min_losses is None else frozenset({Promise.SIMPLEX_WEIGHTS})

    def _weights(self, losses: Float64[np.ndarray, " K"]) -> Solution:
        return self._solve_live(None, losses, everyone(len(losses)))

    def _solve_live(
        self,
        gramian: Float64[np.ndarray, "K K"] | None,
        losses: Float64[np.ndarray, " K"] | None,
        live: Bool[np.ndarray, " K"],
    ) -> Solution:
        assert losses is not None
        size = len(losses)
        if self._before is not None:
            raise RuntimeError(
                "'famo' learns from what a step did to the losses, but the last step got no update(). After every "
                "optimizer step call update(losses) with the losses of the same batch, evaluated again."
            )
        logits = np.zeros(size) if self._logits is None else self._logits
        same_size(self.name, len(logits), size)
        if not live.any():
            return nobody(size)
        gaps = self._gaps(losses, live)
        slopes = logits[live] - np.log(gaps[live])
        weights = np.zeros(size)
        weights[live] = softmax(slopes)
        simplex = softmax(logits[live])
        value = simplex @ np.log(gaps[live]) / np.exp(_log_sum(slopes) - _log_sum(logits[live]))
        self._logits, self._before = logits, np.where(live, losses, np.nan)
        return Solution(weights, left_out=tuple(np.flatnonzero(~live).tolist()), value=float(value))

    def _update(self, losses: Float64[np.ndarray, " K"] | None) -> None:
        if self._before is None or losses is None:
            self._before = None
            return
        assert self._logits is not None
        same_size(self.name, len(self._before), len(losses))
        live = ~np.isnan(self._before)
        fall = np.zeros(len(losses))
        fall[live] = np.log(self._gaps(self._before, live)[live]) - np.log(self._gaps(losses, live)[live])
        simplex = np.zeros(len(losses))
        simplex[live] = softmax(self._logits[live])
        self._learn(simplex * (fall - simplex @ fall) + self.weight_decay * self._logits, live)
        self._before = None

    def _gaps(self, losses: Float64[np.ndarray, " K"], live: Bool[np.ndarray, " K"]) -> Float64[np.ndarray, " K"]:
        bounds = point_array(self.min_losses, len(losses), "min_losses")
        require_above(self.name, losses, live, bounds, option="min_losses")
        return losses - bounds

    def _learn(self, slope: Float64[np.ndarray, " K"], live: Bool[np.ndarray, " K"]) -> None:
        """One step of Adam; objectives that sat out keep their logits and moments."""
        assert self._logits is not None
        first, second = DECAYS
        mean = np.zeros(len(slope)) if self._mean is None else self._mean
        square = np.zeros(len(slope)) if self._square is None else self._square
        self._mean = np.where(live, first * mean + (1 - first) * slope, mean)
        self._square = np.where(live, second * square + (1 - second) * slope**2, square)
        self._updates += 1
        length = np.sqrt(self._square / (1 - second**self._updates)) + EPS
        step = self.lr * self._mean / (1 - first**self._updates) / length
        self._logits = np.where(live, self._logits - step, self._logits)


def _log_sum(values: Float64[np.ndarray, " K"]) -> float:
    top = values.max()
    return float(top + np.log(np.exp(values - top).sum()))
