r"""Rescaled: give the direction another length.

.. math::  d \leftarrow \frac{\ell}{\|d\|} \, d , \qquad \ell \in \Big\{ \|\bar g\| , \; \overline{\|g\|} , \;
           \|d\| \, \overline{\|g\|} , \; \min(\|d\|, \ell_{\max}) \Big\}

with the mean gradient :math:`\bar g` and the mean norm :math:`\overline{\|g\|}` of the gradients that take part.

Shapes: K = objectives.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float64

from mogb.base import Aggregator, Promise, Solution, Wrapper

EPS = float(np.finfo(np.float64).eps)

Length = Literal["mean_gradient", "mean_norm", "times_mean_norm", "cap"]


@dataclass(frozen=True)
class Rescaled(Wrapper):
    r"""Changes the length of the direction, and nothing else. One that is zero up to rounding stays as it is.

    Args:
        inner: The method.
        length: ``"mean_gradient"``: the norm of the mean gradient. ``"mean_norm"``: the mean norm of the gradients.
            ``"times_mean_norm"``: the present length times the mean norm, which gives balanced unit gradients the
            scale of the raw ones. ``"cap"``: at most ``max_norm``.
        max_norm: The longest direction, for ``"cap"`` alone.

    Examples:
        >>> import torch
        >>> from mogb.aggregators.mgda import MGDA
        >>> Rescaled(MGDA(), length="cap", max_norm=0.5)(torch.eye(2) * 10)
        tensor([0.3536, 0.3536])
    """

    needs_gramian = True

    inner: Aggregator
    length: Length = "mean_gradient"
    max_norm: float | None = None

    def _check(self) -> None:
        super()._check()
        if self.length not in get_args(Length):
            raise ValueError(f"length must be one of {', '.join(get_args(Length))}, but got {self.length!r}.")
        if (self.length == "cap") != (self.max_norm is not None):
            raise ValueError(
                f"max_norm belongs to length='cap', and to no other, but got max_norm={self.max_norm!r} with "
                f"length={self.length!r}."
            )
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"max_norm must be positive, but got {self.max_norm!r}.")

    @property
    def promises(self) -> frozenset[Promise]:  # type: ignore[override]
        kept = self.inner.keeps - {Promise.SIMPLEX_WEIGHTS, Promise.HOMOGENEOUS}
        if self.length == "cap":
            return kept
        blind = self.inner.keeps & {Promise.HOMOGENEOUS, Promise.SCALE_FREE}
        follows = self.length == "times_mean_norm" and Promise.HOMOGENEOUS in self.inner.keeps
        return kept | {Promise.HOMOGENEOUS} if blind and not follows else kept

    def _solve_live(
        self,
        gramian: Float64[np.ndarray, "K K"] | None,
        losses: Float64[np.ndarray, " K"] | None,
        live: Bool[np.ndarray, " K"],
    ) -> Solution:
        assert gramian is not None
        solution = self.inner._solve_live(gramian, losses, live)
        return replace(solution, weights=solution.weights * self._factor(gramian, solution, live))

    def _factor(self, gramian: Float64[np.ndarray, "K K"], solution: Solution, live: Bool[np.ndarray, " K"]) -> float:
        part = live.copy()
        part[list(solution.left_out)] = False
        count = np.count_nonzero(part)
        if count == 0:
            return 1.0
        if self.length == "times_mean_norm":
            return _mean_norm(gramian, part)
        squared = float(solution.weights @ gramian @ solution.weights)
        if squared <= _resolution(gramian, solution):
            return 1.0
        norm = math.sqrt(squared)
        if self.length == "cap":
            assert self.max_norm is not None
            return min(1.0, self.max_norm / norm)
        if self.length == "mean_norm":
            return _mean_norm(gramian, part) / norm
        return math.sqrt(max(float(part @ gramian @ part), 0.0)) / count / norm


def _resolution(gramian: Float64[np.ndarray, "K K"], solution: Solution) -> float:
    """What rounding may leave of the squared norm of a direction that is zero."""
    mass = float(np.abs(solution.weights) @ np.sqrt(np.maximum(gramian.diagonal(), 0.0)))
    return 8 * len(gramian) * EPS * mass * mass


def _mean_norm(gramian: Float64[np.ndarray, "K K"], part: Bool[np.ndarray, " K"]) -> float:
    return float(np.sqrt(np.maximum(gramian.diagonal()[part], 0.0)).mean())
