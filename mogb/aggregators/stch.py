r"""STCH: the smooth form of Tchebycheff.

.. math::  f(L) = \mu \log \sum_k \exp \frac{\lambda_k (L_k - z_k)}{\mu} , \qquad
           w_k = \lambda_k \operatorname{softmax}_k \frac{\lambda (L - z)}{\mu}

For multi-task learning, on log losses relative to the nadir n, with :math:`\lambda_k = 1` by default:

.. math::  f(L) = K \mu \log \sum_k \exp \frac{\lambda_k \log (L_k / n_k)}{\mu} , \qquad
           w_k = \frac{K \lambda_k}{L_k} \operatorname{softmax}_k \frac{\lambda \log (L / n)}{\mu}

Shapes: K = objectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64

from mogb.aggregators._losses import as_point, check_epoch, point_array, require_above, shares, softmax
from mogb.aggregators._options import as_preference, pick
from mogb.aggregators._state import everyone, nobody, positive_numbers, same_size
from mogb.base import LossAggregator, Phase, Promise, Reference, Solution, state


@dataclass(kw_only=True)
class STCH(LossAggregator, name="stch"):
    r"""Follows the objectives that are worst off, the more strictly the smaller :math:`\mu` is.

    The plain form is the paper's. The form on log losses is that of the official code for multi-task learning, and
    needs positive losses. Its nadir is given, or measured: ``warmup_epochs`` epochs, and one more over
    which the mean losses are taken, minimize :math:`\sum_k \log L_k`; call ``end_epoch()`` after every one. An epoch
    without a step does not count.

    Args:
        mu: The smoothing, positive. 1 as in LibMTL; the paper tries 0.01, 0.1, 0.5 and 1.
        preference: The :math:`\lambda`, one non-negative number per objective, scaled to sum 1 (on log losses to sum
            K). None means uniform.
        ideal: The point z of the plain form. None means the origin.
        nadir: The n, positive, one number per objective: asks for the form on log losses.
        warmup_epochs: Epochs before the one that measures n: asks for the form on log losses. 4 in LibMTL.
        max_epoch_steps: No epoch of the warm-up is longer than this.

    Raises:
        ValueError: On a call with a loss that is not positive, for the form on log losses; it names the objective.
        RuntimeError: On a call of the warm-up when the last ``end_epoch()`` is more than ``max_epoch_steps`` steps ago.

    Examples:
        >>> import torch
        >>> STCH(mu=0.5).weights(losses=torch.tensor([1.0, 1.0]))
        tensor([0.2500, 0.2500])
    """

    reference: ClassVar = Reference(
        authors="X. Lin, X. Zhang, Z. Yang, F. Liu, Z. Wang and Q. Zhang",
        title="Smooth Tchebycheff Scalarization for Multi-Objective Optimization",
        venue="ICML",
        year=2024,
        arxiv="2402.19078",
        code="Xi-L/STCH",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT})

    mu: float = 1.0
    preference: Sequence[float] | None = None
    ideal: Sequence[float] | None = None
    nadir: Sequence[float] | None = None
    warmup_epochs: int | None = None
    max_epoch_steps: int = 1000

    _epochs: int = state(0, kind="number")
    _steps: int = state(0, kind="number")
    _sums: Float64[np.ndarray, " K"] | None = state()  # over the epoch that measures
    _counts: Float64[np.ndarray, " K"] | None = state()
    _measured: Float64[np.ndarray, " K"] | None = state()

    def _check(self) -> None:
        if not 0 < self.mu < np.inf:
            raise ValueError(f"mu must be positive and finite, but got {self.mu!r}.")
        self.preference = as_preference(self.preference)
        self.ideal = as_point(self.ideal, "ideal")
        if self.nadir is not None:
            self.nadir = positive_numbers(self.nadir, "nadir")
        for name, value, least in (
            ("warmup_epochs", self.warmup_epochs, 0),
            ("max_epoch_steps", self.max_epoch_steps, 1),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name} must be a whole number, at least {least}, but got {value!r}.")
        given = [name for name in ("ideal", "nadir", "warmup_epochs") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} exclude each other: ideal belongs to the plain form, nadir or warmup_epochs to "
                "the form on log losses. Give one of them."
            )

    @property
    def phases(self) -> frozenset[Phase]:
        return frozenset() if self.warmup_epochs is None else frozenset({"end_epoch"})

    @property
    def needs_positive_losses(self) -> bool:
        return self.nadir is not None or self.warmup_epochs is not None

    @property
    def keeps(self) -> frozenset[Promise]:
        alike = self.preference is None and self.ideal is None and self.nadir is None
        return self.promises if alike else frozenset()

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
        if not live.any():
            return nobody(size)
        preference, count = np.zeros(size), int(live.sum())
        preference[live] = shares(pick(self.preference, live), count)
        if self.needs_positive_losses:
            require_above(self.name, losses, live)
            nadir = self._measured if self.nadir is None else point_array(self.nadir, size, "nadir")
            if nadir is None:
                return self._warm_up(losses, live)
            same_size(self.name, len(nadir), size)
            scale = preference * count
            heights, slopes, factor = (
                scale * np.log(np.where(live, losses, 1.0) / nadir),
                scale / np.where(live, losses, 1.0),
                count,
            )
        else:
            heights = preference * (losses - point_array(self.ideal, size, "ideal"))
            slopes, factor = preference, 1
        weights = np.zeros(size)
        weights[live] = factor * slopes[live] * softmax(heights[live] / self.mu)
        top = heights[live].max()
        value = factor * (top + self.mu * np.log(np.exp((heights[live] - top) / self.mu).sum()))
        return Solution(weights, left_out=tuple(np.flatnonzero(~live).tolist()), value=float(value))

    def _warm_up(self, losses: Float64[np.ndarray, " K"], live: Bool[np.ndarray, " K"]) -> Solution:
        """The sum of the log losses, which is also what the official code does until the nadir is known."""
        check_epoch(self.name, self._steps, self.max_epoch_steps)
        sums, counts = np.zeros(len(losses)), np.zeros(len(losses))
        if self._sums is not None and self._counts is not None:
            sums, counts = self._sums, self._counts
        same_size(self.name, len(sums), len(losses))
        if self._epochs == self.warmup_epochs:
            self._sums, self._counts = sums + np.where(live, losses, 0.0), counts + live
        self._steps += 1
        weights = np.zeros(len(losses))
        weights[live] = 1 / losses[live]
        return Solution(
            weights,
            left_out=tuple(np.flatnonzero(~live).tolist()),
            note="warm-up: the sum of the log losses",
            value=float(np.log(losses[live]).sum()),
        )

    def _end_epoch(self) -> None:
        if self._steps == 0 or self._measured is not None:
            return
        if self._epochs < (self.warmup_epochs or 0):
            self._epochs += 1
        elif self._sums is not None and self._counts is not None and self._counts.all():
            self._measured = self._sums / self._counts
            self._sums = self._counts = None
        self._steps = 0
