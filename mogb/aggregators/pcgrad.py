r"""PCGrad: project each gradient off the gradients that it conflicts with, then add the results up.

For objective i, start from :math:`u = e_i` and visit the other objectives j in random order,

.. math::  u \leftarrow u - \frac{\min(0, (G u)_j)}{G_{jj}} \, e_j .

The weights are the sum of the K results. Every step of the published algorithm is a step on these coefficients, so that
the Gramian is all it needs, and all K gradients are projected at once.

Shapes: K = objectives, V = visits of each objective, C = K where each has its own order, 1 where they share it.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float64, Int64

from mogb.base import GramianAggregator, Promise, Reference, Solution, state

Order = Literal["per-task", "shared", "index"]
Reduction = Literal["sum", "mean"]


@dataclass(kw_only=True)
class PCGrad(GramianAggregator, name="pcgrad"):
    """Removes from each gradient the part that points against another one, and sums the projected gradients.

    Two objectives end without a conflict; more of them may not, since a later projection can undo an earlier one.
    The paper draws an order for every objective, as this does by default; the official TensorFlow code discards its
    shuffle, which is the order of the index. No gradient is projected off itself, as in the paper; some codes do that,
    which makes a difference for three or more objectives.

    Args:
        order: ``"per-task"`` draws an order for every objective, ``"shared"`` one for all of them at every step, and
            ``"index"`` visits 0, 1, ..., K - 1.
        reduction: ``"sum"`` of the projected gradients, or their ``"mean"``.
        seed: Of the orders.

    Examples:
        >>> import torch
        >>> PCGrad()(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([0.5000, 1.5000])
    """

    reference: ClassVar = Reference(
        authors="T. Yu, S. Kumar, A. Gupta, S. Levine, K. Hausman and C. Finn",
        title="Gradient Surgery for Multi-Task Learning",
        venue="Advances in Neural Information Processing Systems",
        year=2020,
        arxiv="2001.06782",
        code="tianheyu927/PCGrad",
    )
    promises: ClassVar = frozenset({Promise.HOMOGENEOUS})

    order: Order = "per-task"
    reduction: Reduction = "sum"
    seed: int = 0
    _generator: torch.Generator = state(kind="generator")

    def _check(self) -> None:
        if self.order not in get_args(Order):
            raise ValueError(f"order must be one of {', '.join(get_args(Order))}, but got {self.order!r}.")
        if self.reduction not in get_args(Reduction):
            raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}, but got {self.reduction!r}.")

    def _start(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def _weights(self, gramian: Float64[np.ndarray, "K K"]) -> Solution:
        size = len(gramian)
        weights = _project_two(gramian) if size == 2 else project(gramian, self._visits(size))
        return Solution(weights if self.reduction == "sum" else weights / size)

    def _visits(self, size: int) -> Int64[np.ndarray, "V C"]:
        if self.order == "index":
            return np.arange(size)[:, None]
        columns = size if self.order == "per-task" else 1
        return torch.rand(size, columns, generator=self._generator, dtype=torch.float64).numpy().argsort(axis=0)


def project(gramian: Float64[np.ndarray, "K K"], visits: Int64[np.ndarray, "V C"]) -> Float64[np.ndarray, " K"]:
    """The sum of the projected gradients, as weights.

    Args:
        gramian: Of the gradients.
        visits: Whom to visit at each time, one column for every objective or one for all of them. Nobody visits itself.
    """
    size = len(gramian)
    squares = gramian.diagonal()
    inverse = np.divide(1.0, squares, out=np.zeros(size), where=squares > 0)
    rows = np.arange(size)
    coefficients = np.eye(size)
    shared = visits.shape[1] == 1
    for visit in visits:
        if shared:
            products = coefficients.dot(gramian[visit[0]])
        else:
            products = np.einsum("ik,ik->i", coefficients, gramian[visit])
        products[visit == rows] = 0.0
        coefficients[rows, visit] -= np.minimum(products, 0.0) * inverse[visit]
    return coefficients.sum(axis=0)


def _project_two(gramian: Float64[np.ndarray, "2 2"]) -> Float64[np.ndarray, " 2"]:
    (first, product), (_, second) = gramian.tolist()
    if product >= 0 or first <= 0 or second <= 0:
        return np.ones(2)
    return np.array([1 - product / first, 1 - product / second])
