r"""DWA: more weight for losses that fall more slowly.

.. math::  w_k(t) = K \, \operatorname{softmax}_k \bigl( r(t) / T \bigr) , \qquad
           r_k(t) = \frac{L_k(t-1)}{L_k(t-2)}

with the mean losses of the last two epochs, or of the last two windows of steps.

Shapes: K = objectives.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64

from mogb.aggregators._losses import check_epoch, softmax
from mogb.aggregators._state import everyone, nobody, same_size
from mogb.base import LossAggregator, Phase, Promise, Reference, Solution, state


@dataclass(kw_only=True)
class DWA(LossAggregator, name="dwa"):
    """Dynamic weight average; the weights sum to K.

    By default it compares epochs: call ``end_epoch()`` after every one. Until two are over the weights are 1, which
    the solution notes, and an epoch of more than ``max_epoch_steps`` steps is an error, for someone must have forgotten
    to call. An epoch without a step does not count. With ``window`` it compares windows of steps, the last of which
    ends with the present step; nobody has to call anything.

    The formula is that of the paper, the official code, LibMTL and TorchJD. The Nash-MTL code, where the window is
    from, averages the weighted losses over the objectives (a factor of K), and starts before its two windows are full,
    with ones in place of losses; this waits. A rate with a mean loss of zero below the line counts as 1.

    Args:
        temperature: The T, positive. 2 as in the paper.
        window: Steps in a window; None compares epochs. The default of the Nash-MTL code is 25.
        max_epoch_steps: No epoch is longer than this.

    Raises:
        ValueError: On a call with a negative loss; it names the objective.
        RuntimeError: On a call when the last ``end_epoch()`` is more than ``max_epoch_steps`` steps ago.

    Examples:
        >>> import torch
        >>> method = DWA()
        >>> for losses in ([2.0, 1.0], [1.0, 0.9]):
        ...     weights = method.weights(losses=torch.tensor(losses))
        ...     method.end_epoch()
        >>> method.weights(losses=torch.tensor([2.0, 0.5]))
        tensor([0.9003, 1.0997])
    """

    reference: ClassVar = Reference(
        authors="S. Liu, E. Johns and A. J. Davison",
        title="End-to-End Multi-Task Learning with Attention",
        venue="CVPR",
        year=2019,
        arxiv="1803.10704",
        code="lorenmt/mtan",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT, Promise.HOMOGENEOUS})

    temperature: float = 2.0
    window: int | None = None
    max_epoch_steps: int = 1000

    _sums: Float64[np.ndarray, " K"] | None = state()  # over the present epoch
    _counts: Float64[np.ndarray, " K"] | None = state()
    _steps: int = state(0, kind="number")
    _older: Float64[np.ndarray, " K"] | None = state()  # means of the last two epochs; NaN where one sat out
    _newer: Float64[np.ndarray, " K"] | None = state()
    _history: Float64[np.ndarray, "T K"] | None = state()  # of the last two windows

    def _check(self) -> None:
        if not 0 < self.temperature < np.inf:
            raise ValueError(f"temperature must be positive and finite, but got {self.temperature!r}.")
        for name, value in (("window", self.window), ("max_epoch_steps", self.max_epoch_steps)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of steps, at least 1, but got {value!r}.")

    @property
    def phases(self) -> frozenset[Phase]:
        return frozenset({"end_epoch"}) if self.window is None else frozenset()

    @property
    def needs_positive_losses(self) -> bool:
        return True

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
        if np.any(negative := live & (losses < 0)):
            index = int(negative.argmax())
            raise ValueError(
                f"'dwa' compares ratios of losses, but the loss of objective {index} is {losses[index]:.6g}. Add a "
                "constant that keeps it positive, or choose a method without ratios of losses."
            )
        if not live.any():
            return nobody(size)
        older, newer = self._epochs(losses, live) if self.window is None else self._windows(losses, live, self.window)
        weights, note = np.where(live, 1.0, 0.0), ""
        if older is None or newer is None:
            note = "uniform until two epochs are over" if self.window is None else "uniform until two windows are full"
        else:
            known = older > 0  # false also for NaN
            rates = np.divide(newer, older, out=np.ones(size), where=known)
            rates = np.where(np.isnan(rates), 1.0, rates)
            weights[live] = live.sum() * softmax(rates[live] / self.temperature)
        return Solution(weights, left_out=tuple(np.flatnonzero(~live).tolist()), note=note)

    def _epochs(
        self, losses: Float64[np.ndarray, " K"], live: Bool[np.ndarray, " K"]
    ) -> tuple[Float64[np.ndarray, " K"] | None, Float64[np.ndarray, " K"] | None]:
        """The means of the last two epochs; takes the losses into the present one."""
        for held in (self._sums, self._newer):
            same_size(self.name, len(losses) if held is None else len(held), len(losses))
        check_epoch(self.name, self._steps, self.max_epoch_steps)
        sums, counts = np.zeros(len(losses)), np.zeros(len(losses))
        if self._sums is not None and self._counts is not None:
            sums, counts = self._sums, self._counts
        self._sums, self._counts = sums + np.where(live, losses, 0.0), counts + live
        self._steps += 1
        return self._older, self._newer

    def _windows(
        self, losses: Float64[np.ndarray, " K"], live: Bool[np.ndarray, " K"], window: int
    ) -> tuple[Float64[np.ndarray, " K"] | None, Float64[np.ndarray, " K"] | None]:
        """The means of the last two windows, once they are full; the present losses belong to the newer one."""
        history = np.zeros((0, len(losses))) if self._history is None else self._history
        same_size(self.name, history.shape[1], len(losses))
        self._history = np.vstack([history, np.where(live, losses, np.nan)])[-2 * window :]
        if len(self._history) < 2 * window:
            return None, None
        return _means(self._history[:window]), _means(self._history[window:])

    def _end_epoch(self) -> None:
        if self._sums is None or self._counts is None:
            return
        mean = np.divide(self._sums, self._counts, out=np.full(len(self._sums), np.nan), where=self._counts > 0)
        self._older, self._newer = self._newer, mean
        self._sums = self._counts = None
        self._steps = 0


def _means(history: Float64[np.ndarray, "T K"]) -> Float64[np.ndarray, " K"]:
    """The mean of every column without its NaNs; NaN where there is nothing else."""
    counts = (~np.isnan(history)).sum(axis=0)
    return np.divide(np.nansum(history, axis=0), counts, out=np.full(history.shape[1], np.nan), where=counts > 0)
