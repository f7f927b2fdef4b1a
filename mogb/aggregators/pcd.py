r"""PCD: follow one primary gradient, and grant every other objective a fraction of its own progress.

With :math:`\tilde g_i = s_i g_i` and :math:`s_i = 1 / \sqrt{\hat v_i + \epsilon}`, where :math:`\hat v_i` is the
bias-corrected moving average of :math:`\|g_i\|^2`,

.. math::  \tilde d = \arg\min_d \tfrac12 \|d - \tilde g_p\|^2 \quad \text{s.t.} \quad
           \tilde g_j \cdot d \ge \tau_j \|\tilde g_j\|^2 \;\text{ for every secondary } j ,
           \qquad d = \tilde d \; \frac{\|g_p\|}{\|\tilde d\|}

(definitions 4.1 and 4.5 and algorithm 1 of the paper). The shortest correction :math:`\tilde d - \tilde g_p` that meets
linear inequalities is a least-distance problem: one non-negative least-squares solve, whose residual vanishes exactly
when the inequalities contradict each other.

Shapes: K = objectives, S = secondary objectives, D = dimensions of the gradients' span.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64
from scipy.optimize import nnls

from mogb.aggregators._state import everyone, same_size
from mogb.base import GramianAggregator, Promise, Reference, Solution, state
from mogb.solvers.scaling import factor, unit_diagonal

# A correction this many times longer than the constraints ask for counts as impossible.
LONGEST = 1e6
# A direction this much shorter than its parts is zero, up to the rounding of the Gramian.
SHORTEST = 1e-7


@dataclass(kw_only=True)
class PCD(GramianAggregator, name="pcd"):
    """The direction closest to the primary gradient that leaves no other objective behind.

    The order of priority is the point: permuting the objectives changes the answer. A zero primary gradient gives the
    direction 0. Constraints that contradict each other are dropped together, as in algorithm 1, and flagged: the
    direction is then the primary gradient.

    Args:
        primary: Which objective comes first; negative numbers count from the end.
        tau: Fraction of a secondary objective's own normalized progress that it is granted, in [0, 1]: one number for
            all, or one for every secondary objective in their order. 0.02 as in the official code.
        beta: Decay of the moving average of the squared norms, in [0, 1).
        eps: Added to the average. It ends the indifference to scale once gradients are shorter than its square root.

    Raises:
        ValueError: On a call for which ``primary`` or the length of ``tau`` does not fit.

    Examples:
        >>> import torch
        >>> PCD(tau=0.0)(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([0.7071, 0.7071])
    """

    reference: ClassVar = Reference(
        authors="D. Varam and M. I. AlHajri",
        title=(
            "Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical Multi-Objective "
            "Optimization"
        ),
        venue="Transactions on Machine Learning Research",
        year=2026,
        arxiv="2606.29521",
        code="DaraVaram/priority-constrained-descent",
    )
    promises: ClassVar = frozenset[Promise]()

    primary: int = 0
    tau: float | Sequence[float] = 0.02
    beta: float = 0.999
    eps: float = 1e-8

    _squares: Float64[np.ndarray, " K"] | None = state()
    _calls: Float64[np.ndarray, " K"] | None = state()

    def _check(self) -> None:
        if isinstance(self.tau, Sequence):
            self.tau = tuple(float(value) for value in self.tau)
        values = np.atleast_1d(self.tau)
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"tau must be in [0, 1], but got {self.tau}.")
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must be in [0, 1), but got {self.beta}.")
        if not 0 <= self.eps < np.inf:
            raise ValueError(f"eps must be at least 0 and finite, but got {self.eps}.")

    def _weights(self, gramian: Float64[np.ndarray, "K K"]) -> Solution:
        return self._solve_live(gramian, None, everyone(len(gramian)))

    def _solve_live(
        self,
        gramian: Float64[np.ndarray, "K K"] | None,
        losses: Float64[np.ndarray, " K"] | None,
        live: Bool[np.ndarray, " K"],
    ) -> Solution:
        assert gramian is not None
        size = len(gramian)
        if not -size <= self.primary < size:
            raise ValueError(f"primary={self.primary} names none of the {size} objectives.")
        primary = self.primary % size
        secondary = np.delete(np.arange(size), primary)
        fractions = self._fractions(len(secondary))
        scales = self._scales(gramian.diagonal(), live)
        norms, cosines = unit_diagonal(np.where(np.outer(live, live), gramian, 0.0))
        left_out = tuple(np.flatnonzero(norms == 0).tolist())
        weights = np.zeros(size)
        if norms[primary] == 0:
            return Solution(weights, left_out=left_out, note="the primary gradient is zero")
        lengths = scales * norms
        rows = factor(cosines)[0]
        asked = fractions * lengths[secondary] - lengths[primary] * cosines[primary, secondary]
        asked[norms[secondary] == 0] = 0.0
        found = _shortest_correction(rows[:, secondary], asked)
        if found is None:
            weights[primary] = 1.0
            return Solution(weights, left_out=left_out, note="the constraints contradict each other and were dropped")
        parts = np.zeros(size)  # coefficients on the unit gradients
        parts[primary] = lengths[primary]
        parts[secondary] = found
        length = float(np.linalg.norm(rows @ parts))
        if length <= SHORTEST * parts.sum():
            return Solution(weights, left_out=left_out, note="the constraints leave nothing of the primary gradient")
        alive = norms > 0
        weights[alive] = parts[alive] / norms[alive] * (norms[primary] / length)
        return Solution(weights, left_out=left_out, details={"multipliers": np.where(lengths > 0, parts, 0.0)})

    def _fractions(self, size: int) -> Float64[np.ndarray, " S"]:
        if isinstance(self.tau, Sequence):
            if len(self.tau) != size:
                raise ValueError(
                    f"tau must have one number per secondary objective, {size}, but got {len(self.tau)}: "
                    f"{list(self.tau)}."
                )
            return np.array(self.tau)
        return np.full(size, float(self.tau))

    def _scales(self, squares: Float64[np.ndarray, " K"], live: Bool[np.ndarray, " K"]) -> Float64[np.ndarray, " K"]:
        """One over the usual norm of every gradient, this one included."""
        size = len(squares)
        held = np.zeros(size) if self._squares is None else self._squares
        calls = np.zeros(size) if self._calls is None else self._calls
        same_size(self.name, len(held), size)
        self._calls = calls = calls + live
        self._squares = np.where(live, self.beta * held + (1 - self.beta) * np.maximum(squares, 0.0), held)
        corrections = np.where(calls > 0, 1 - self.beta**calls, 1.0)
        usual = np.sqrt(self._squares / corrections + self.eps)
        return np.divide(1.0, usual, out=np.zeros_like(usual), where=usual > 0)


def _shortest_correction(
    rows: Float64[np.ndarray, "D S"], asked: Float64[np.ndarray, " S"]
) -> Float64[np.ndarray, " S"] | None:
    r"""The multipliers m >= 0 of :math:`\min \|y\|` s.t. :math:`R^\top y \ge a`, where y = R m; None if impossible.

    (Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23.4.)
    """
    largest = asked.max(initial=0.0)
    if largest <= 0:
        return np.zeros(len(asked))
    bounds = asked / largest
    target = np.zeros(len(rows) + 1)
    target[-1] = 1.0
    found, _ = nnls(np.vstack([rows, bounds]), target, maxiter=30 * len(asked) + 30)
    slack = 1 - float(bounds @ found)
    if slack <= LONGEST**-2:
        return None
    return found * (largest / slack)
