r"""What is watched while a run goes on: how the direction stands to every gradient, the weights, the solver's flags.

At every step and for every starting point,

.. math::  \cos_k = \frac{d \cdot g_k}{|d| \, |g_k|}

over the objectives whose gradient is not zero. A direction conflicts if one of these cosines is below
:data:`CONFLICT`. Where the gradients cancel so well that d is rounding alone (the point is Pareto stationary), cosines
mean nothing and the step is not counted.

Shapes: S = starting points, K = objectives, B = steps that are buffered and then worked off at once.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float64

from mogb.base import Solution

CONFLICT = -1e-6  # rounding of a direction that counts stays below this
VANISHED = 1e-9  # |d| relative to sum_k |w_k| |g_k| below which a direction is rounding
BUFFER = 256
WINDOWS = 60  # averages over time that are kept for pictures
BINS = 40  # of the histogram of the smallest cosine, from -1 to 1


@dataclass
class Flags:
    """What the solvers said, counted over steps and starting points."""

    unconverged: int = 0
    max_residual: float = 0.0
    left_out: dict[int, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    def add(self, solution: Solution) -> None:
        """Counts one answer; ordinary ones cost two comparisons."""
        if solution.residual > self.max_residual:
            self.max_residual = float(solution.residual)
        if not solution.converged:
            self.unconverged += 1
        for index in solution.left_out:
            self.left_out[index] = self.left_out.get(index, 0) + 1
        if solution.note:
            self.notes[solution.note] = self.notes.get(solution.note, 0) + 1


class Observer:
    """Collects the figures of one run, a buffer of steps at a time."""

    def __init__(self, steps: int, starts: int, objectives: int, *, weights: bool) -> None:
        self.steps, self.filled, self.seen = steps, 0, 0
        shape = (BUFFER, starts, objectives)
        self._norms, self._products, self._weights = np.empty(shape), np.empty(shape), np.empty(shape)
        self._lengths = np.empty(shape[:2])
        self.has_weights = weights
        self.counted = np.zeros(starts)
        self.conflicts = np.zeros(starts)
        self.cosine_sum, self.cosine_variance_sum = np.zeros(starts), np.zeros(starts)
        self.smallest_sum, self.worst = np.zeros(starts), np.full(starts, np.inf)
        self.objective_cosines, self.objective_counts = np.zeros(objectives), np.zeros(objectives)
        self.histogram = np.zeros(BINS, dtype=np.int64)
        self.window_smallest, self.window_counts = np.zeros(WINDOWS), np.zeros(WINDOWS)
        self.window_shares, self.window_steps = np.zeros((WINDOWS, objectives)), np.zeros(WINDOWS)

    def see(
        self,
        norms: Float64[np.ndarray, "S K"],
        products: Float64[np.ndarray, "S K"],
        lengths: Float64[np.ndarray, " S"],
        weights: Float64[np.ndarray, "S K"],
    ) -> None:
        """Takes one step: |g_k|, d . g_k, |d| and the weights (ones for a method that has none)."""
        at = self.filled
        self._norms[at], self._products[at], self._lengths[at], self._weights[at] = norms, products, lengths, weights
        self.filled += 1
        if self.filled == BUFFER:
            self.work_off()

    def work_off(self) -> None:
        """Turns what is buffered into sums."""
        size = self.filled
        if size == 0:
            return
        norms, products, lengths = self._norms[:size], self._products[:size], self._lengths[:size]
        absolute = np.abs(self._weights[:size])
        window = (self.seen + np.arange(size)) * WINDOWS // self.steps
        real = lengths > VANISHED * (absolute * norms).sum(-1)
        present = (norms > 0) & real[..., None]
        cosine = np.where(present, products, np.nan) / np.where(present, norms * lengths[..., None], 1.0)
        counted = present.any(-1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # steps without any cosine: masked out below
            smallest, mean, variance = np.nanmin(cosine, -1), np.nanmean(cosine, -1), np.nanvar(cosine, -1)
        filled = [np.where(counted, values, 0.0) for values in (smallest, mean, variance)]
        self.counted += counted.sum(0)
        self.conflicts += (counted & (filled[0] < CONFLICT)).sum(0)
        self.smallest_sum += filled[0].sum(0)
        self.cosine_sum += filled[1].sum(0)
        self.cosine_variance_sum += filled[2].sum(0)
        self.worst = np.minimum(self.worst, np.where(counted, smallest, np.inf).min(0))
        self.objective_cosines += np.where(present, cosine, 0.0).sum((0, 1))
        self.objective_counts += present.sum((0, 1))
        self.histogram += np.histogram(smallest[counted], bins=BINS, range=(-1 - 1e-9, 1 + 1e-9))[0]
        np.add.at(self.window_smallest, window, filled[0].sum(1))
        np.add.at(self.window_counts, window, counted.sum(1))
        shares = self._weights[:size] / np.maximum(absolute.sum(-1, keepdims=True), np.finfo(float).tiny)
        np.add.at(self.window_shares, window, shares.mean(1))
        np.add.at(self.window_steps, window, 1)
        self.seen, self.filled = self.seen + size, 0

    def summary(self) -> dict[str, Any]:
        """The figures as plain lists: one entry per starting point, None where no step counted."""
        self.work_off()
        used = self.window_steps > 0
        return {
            "counted_steps": self.counted.astype(int).tolist(),
            "conflict_rate": _ratio(self.conflicts, self.counted),
            "cosine_mean": _ratio(self.cosine_sum, self.counted),
            "cosine_variance": _ratio(self.cosine_variance_sum, self.counted),
            "cosine_min": _ratio(self.smallest_sum, self.counted),
            "cosine_worst": [None if np.isinf(value) else float(value) for value in self.worst],
            "cosine_of_objective": _ratio(self.objective_cosines, self.objective_counts),
            "cosine_min_histogram": self.histogram.tolist(),
            "cosine_min_over_time": _ratio(self.window_smallest[used], self.window_counts[used]),
            "weights_over_time": self._shares(used),
        }

    def _shares(self, used: np.ndarray) -> list[list[float]] | None:
        if not self.has_weights:
            return None
        return (self.window_shares[used] / self.window_steps[used][:, None]).tolist()


def _ratio(total: np.ndarray, count: np.ndarray) -> list[float | None]:
    return [float(a / b) if b else None for a, b in zip(total, count, strict=True)]
