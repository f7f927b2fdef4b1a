r"""ConFIG: the direction with the same cosine to every gradient, as long as their projections onto it.

.. math::  x = U^+ p , \qquad \hat x = x / \|x\| , \qquad d = \ell \, \hat x , \qquad
           \ell = \sum_k g_k \cdot \hat x \text{ by default,}

where the rows of U are the unit gradients :math:`u_k` and p the preferences, 1 by default. With their cosines
:math:`C = U U^\top` the pseudo-inverse is :math:`U^+ = U^\top C^+`, so that the Gramian is all it needs.

Shapes: K = objectives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float64

from mogb.aggregators._options import as_preference, pick, preference_array
from mogb.base import GramianAggregator, Promise, Reference, Solution
from mogb.solvers.scaling import EPS, unit_diagonal
from mogb.solvers.semidefinite import solve_semidefinite

Length = Literal[
    "projection_length",
    "track_minimum",
    "track_maximum",
    "track_harmonic_average",
    "track_arithmetic_average",
    "track_geometric_average",
    "track_specific",
]

_COMMON_NORMS: dict[str, Callable[[Float64[np.ndarray, " K"]], float]] = {
    "track_minimum": np.min,
    "track_maximum": np.max,
    "track_harmonic_average": lambda norms: float(1 / np.mean(1 / norms)),
    "track_arithmetic_average": np.mean,
    "track_geometric_average": lambda norms: float(np.exp(np.mean(np.log(norms)))),
}


@dataclass(frozen=True, kw_only=True)
class ConFIG(GramianAggregator, name="config"):
    r"""Conflicts with no gradient as long as they are linearly independent. Zero gradients are left out.

    Exact from the Gramian, where the official code takes the pseudo-inverse of a K by N matrix. Dependent gradients may
    have no such direction; x is then the least-squares answer, as in the official code, and may conflict.

    Args:
        length: The :math:`\ell`. ``"projection_length"`` adds up the projections of the gradients. The others first
            bring all gradients to one norm, and then add up: the norm of the shortest gradient
            (``"track_minimum"``) or the longest (``"track_maximum"``), the ``"track_harmonic_average"``,
            ``"track_arithmetic_average"`` or ``"track_geometric_average"`` of the norms, or that of one objective
            (``"track_specific"``).
        track: The index of that objective, for ``"track_specific"`` alone.
        preference: One non-negative number per objective: the ratio of the cosines. None means equal ones.

    Examples:
        >>> import torch
        >>> ConFIG()(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        tensor([2., 2.])
    """

    reference: ClassVar = Reference(
        authors="Q. Liu, M. Chu and N. Thuerey",
        title="ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks",
        venue="International Conference on Learning Representations",
        year=2025,
        arxiv="2408.11104",
        code="tum-pbs/ConFIG",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT, Promise.HOMOGENEOUS})

    length: Length = "projection_length"
    track: int | None = None
    preference: Sequence[float] | None = None

    def _check(self) -> None:
        if self.length not in get_args(Length):
            raise ValueError(f"length must be one of {', '.join(get_args(Length))}, but got {self.length!r}.")
        if (self.length == "track_specific") != (self.track is not None):
            raise ValueError(
                f"track names the objective of length='track_specific', and of no other, but got track={self.track!r} "
                f"with length={self.length!r}."
            )
        if self.track is not None and self.track < 0:
            raise ValueError(f"track must be the index of an objective, 0 or more, but got {self.track}.")
        object.__setattr__(self, "preference", as_preference(self.preference))

    @property
    def keeps(self) -> frozenset[Promise]:
        alike = self.preference is None and self.track is None
        return self.promises if alike else self.promises - {Promise.PERMUTATION_EQUIVARIANT}

    @property
    def leaves_out_zero(self) -> bool:
        return True

    def _only(self, live: Bool[np.ndarray, " K"]) -> "ConFIG":
        if self.preference is None and self.track is None:
            return self
        if self.track is None:
            return replace(self, preference=pick(self.preference, live))
        if self.track >= len(live) or not live[self.track]:
            raise ValueError(f"track={self.track} must be an objective with a gradient that is not zero.")
        track = int(np.count_nonzero(live[: self.track]))
        return replace(self, preference=pick(self.preference, live), track=track)

    def _weights(self, gramian: Float64[np.ndarray, "K K"]) -> Solution:
        size = len(gramian)
        norms, cosines = unit_diagonal(gramian)
        if self.track is not None and self.track >= size:
            raise ValueError(f"track must be the index of one of {size} objectives, but got {self.track}.")
        target = preference_array(self.preference, size, 1.0)
        x = solve_semidefinite(cosines, target)
        projections = cosines.dot(x)
        squared = float(x.dot(projections))
        if squared <= (8 * size**1.5 * EPS) ** 2 * float(x.dot(x)):
            return Solution(np.zeros(size), note="Pareto stationary: no direction has these cosines")
        length = float(self._norms(norms).dot(projections)) / squared
        note = "this step is against the sum of the gradients" if length < 0 else ""
        return Solution(x * (length / norms), note=note)

    def _norms(self, norms: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, " K"]:
        """The norms that the gradients are given before their projections are added up."""
        if self.length == "projection_length":
            return norms
        if self.track is not None:
            return np.full(len(norms), norms[self.track])
        return np.full(len(norms), _COMMON_NORMS[self.length](norms))
