r"""Aligned-MTL: gradients made orthogonal and equally long, then added up.

With the eigenvalues :math:`\lambda` and eigenvectors V of the Gramian,

.. math::  w = B \, p , \qquad B = \sqrt{\sigma} \; V \Lambda^{-1/2} V^\top , \qquad
           \sigma = \min_i \lambda_i \text{ by default.}

The aligned gradients, the rows of :math:`B J`, are the closest to the given ones among those whose Gramian is
:math:`\sigma` times a projection: the condition number of the problem becomes 1.

Shapes: K = objectives, R = rank of the Gramian.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float64

from mogb.aggregators._options import as_preference, pick, preference_array
from mogb.base import GramianAggregator, Promise, Reference, Solution
from mogb.solvers.semidefinite import eigensystem

ScaleMode = Literal["min", "median", "rmse"]
Reduction = Literal["sum", "mean"]


@dataclass(frozen=True, kw_only=True)
class AlignedMTL(GramianAggregator, name="aligned_mtl"):
    r"""Sums the aligned gradients, as the official code does; the paper's formula has the mean, K times shorter.

    Args:
        scale_mode: The common squared length :math:`\sigma`: the ``"min"`` or ``"median"`` eigenvalue (the lower one
            of two in the middle), or for ``"rmse"`` their mean. Over eigenvalues above the rank tolerance.
        preference: One non-negative number per objective, the p of the formula. None means 1 each for a sum, and 1/K
            for a mean.
        reduction: ``"sum"`` or ``"mean"`` of the aligned gradients, where there is no preference.
        rank_tolerance: Eigenvalues up to ``rank_tolerance * K * max(eigenvalues)`` count as zero. The default is the
            resolution of float32 numbers, as in the official code.

    Examples:
        >>> import torch
        >>> AlignedMTL()(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        tensor([1., 1.])
    """

    reference: ClassVar = Reference(
        authors="D. Senushkin, N. Patakin, A. Kuznetsov and A. Konushin",
        title="Independent Component Alignment for Multi-Task Learning",
        venue="Conference on Computer Vision and Pattern Recognition",
        year=2023,
        arxiv="2305.19000",
        code="SamsungLabs/MTL",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT, Promise.HOMOGENEOUS})

    scale_mode: ScaleMode = "min"
    preference: Sequence[float] | None = None
    reduction: Reduction = "sum"
    rank_tolerance: float = float(np.finfo(np.float32).eps)

    def _check(self) -> None:
        if self.scale_mode not in get_args(ScaleMode):
            raise ValueError(
                f"scale_mode must be one of {', '.join(get_args(ScaleMode))}, but got {self.scale_mode!r}."
            )
        if self.reduction not in get_args(Reduction):
            raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}, but got {self.reduction!r}.")
        if self.preference is not None and self.reduction != "sum":
            raise ValueError("preference replaces the weights of the mean: leave reduction at 'sum' beside it.")
        if not 0 <= self.rank_tolerance < 1:
            raise ValueError(f"rank_tolerance must be in [0, 1), but got {self.rank_tolerance!r}.")
        object.__setattr__(self, "preference", as_preference(self.preference))

    @property
    def keeps(self) -> frozenset[Promise]:
        return self.promises if self.preference is None else self.promises - {Promise.PERMUTATION_EQUIVARIANT}

    def _only(self, live: Bool[np.ndarray, " K"]) -> "AlignedMTL":
        return self if self.preference is None else replace(self, preference=pick(self.preference, live))

    def _weights(self, gramian: Float64[np.ndarray, "K K"]) -> Solution:
        size = len(gramian)
        target = preference_array(self.preference, size, 1.0 if self.reduction == "sum" else 1 / size)
        values, vectors = eigensystem(gramian)
        first = int(np.searchsorted(values, values[-1] * size * self.rank_tolerance, side="right"))
        if values[-1] <= 0 or first == size:
            return Solution(np.zeros(size), note="all gradients are zero")
        values, vectors = values[first:], vectors[:, first:]
        stretch = np.sqrt(self._scale(values) / values)
        return Solution(vectors.dot(stretch * target.dot(vectors)))

    def _scale(self, values: Float64[np.ndarray, " R"]) -> float:
        if self.scale_mode == "min":
            return float(values[0])
        if self.scale_mode == "median":
            return float(values[(len(values) - 1) // 2])
        return float(values.mean())
