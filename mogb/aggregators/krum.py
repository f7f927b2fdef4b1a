r"""Krum and Multi-Krum: keep the gradients that lie closest to the others.

The score of a gradient is its distance to the :math:`K - f - 2` nearest of the others,

.. math::  s_i = \sum_{j \in N_i} \|g_i - g_j\|^2 , \qquad \|g_i - g_j\|^2 = G_{ii} + G_{jj} - 2 G_{ij} ,

where f is the number of gradients that may be arbitrarily wrong. The m gradients of the lowest score are averaged.

Krum looks for outliers, not for a compromise: objectives that merely disagree are outvoted, not balanced.

Shapes: K = objectives.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float64

from mogb.base import GramianAggregator, Promise, Reference, Solution


@dataclass(frozen=True, kw_only=True)
class Krum(GramianAggregator, name="krum"):
    """The mean of the gradients that have the closest neighbours.

    Ties go to the objective that comes first, as in the paper. A zero row is a gradient like any other.

    Args:
        num_byzantine: f, how many gradients may be arbitrarily wrong. There is no neighbour to compare with unless
            K >= f + 3; the paper's guarantee asks for K >= 2f + 3. With f = 0 and K <= 2 all are averaged.
        num_selected: m, how many are averaged: 1 is Krum, more is Multi-Krum.
        distance: ``"squared"`` sums squared distances, as the paper does; ``"euclidean"`` sums distances, as TorchJD
            does.

    Raises:
        ValueError: On a call with fewer than f + 3 or fewer than m gradients.

    Examples:
        >>> import torch
        >>> Krum(num_byzantine=1)(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.9, 0.0], [-50.0, 80.0]]))
        tensor([1., 0.])
    """

    reference: ClassVar = Reference(
        authors="P. Blanchard, E. M. El Mhamdi, R. Guerraoui and J. Stainer",
        title="Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
        venue="NeurIPS",
        year=2017,
        arxiv="1703.02757",
    )
    promises: ClassVar = frozenset({Promise.SIMPLEX_WEIGHTS, Promise.HOMOGENEOUS})

    num_byzantine: int = 0
    num_selected: int = 1
    distance: Literal["squared", "euclidean"] = "squared"

    def _check(self) -> None:
        if self.num_byzantine < 0:
            raise ValueError(f"num_byzantine must be at least 0, but got {self.num_byzantine}.")
        if self.num_selected < 1:
            raise ValueError(f"num_selected must be at least 1, but got {self.num_selected}.")
        if self.distance not in ("squared", "euclidean"):
            raise ValueError(f"distance must be 'squared' or 'euclidean', but got {self.distance!r}.")

    def _weights(self, gramian: Float64[np.ndarray, "K K"]) -> Solution:
        size = len(gramian)
        few = self.num_byzantine == 0 and size <= 2
        if size < self.num_byzantine + 3 and not few:
            raise ValueError(
                f"'krum' with num_byzantine={self.num_byzantine} needs at least {self.num_byzantine + 3} gradients, "
                f"but got {size}."
            )
        if size < self.num_selected:
            raise ValueError(f"'krum' with num_selected={self.num_selected} got only {size} gradients.")
        if few:
            return Solution(np.full(size, 1 / size))
        scores = self._scores(gramian)
        chosen = np.argsort(scores, kind="stable")[: self.num_selected]
        weights = np.zeros(size)
        weights[chosen] = 1 / self.num_selected
        return Solution(weights, left_out=tuple(np.flatnonzero(weights == 0).tolist()), details={"scores": scores})

    def _scores(self, gramian: Float64[np.ndarray, "K K"]) -> Float64[np.ndarray, " K"]:
        squares = gramian.diagonal()
        distances = np.maximum(squares + squares[:, None] - gramian - gramian.T, 0.0)
        if self.distance == "euclidean":
            distances = np.sqrt(distances)
        np.fill_diagonal(distances, np.inf)
        neighbours = len(gramian) - self.num_byzantine - 2
        return np.sort(distances, axis=1)[:, :neighbours].sum(axis=1)
