r"""GradVac: pull every pair of gradients up to the cosine that the pair usually has.

For objective i, start from :math:`u = g_i` and visit the others j. Where the cosine :math:`\varphi` between u and
:math:`g_j` is below its moving average :math:`\hat\varphi_{ij}`, add just enough of :math:`g_j` to reach it,

.. math::  u \leftarrow u + \|u\| \, \frac{\hat\varphi \sqrt{1 - \varphi^2} - \varphi \sqrt{1 - \hat\varphi^2}}
                                          {\|g_j\| \sqrt{1 - \hat\varphi^2}} \; g_j ,
           \qquad \hat\varphi_{ij} \leftarrow (1 - \beta) \, \hat\varphi_{ij} + \beta \, \varphi .

The direction is the sum of the K results (algorithm 1 of the paper). The averages start at 0, so that the first step
is PCGrad's.

Shapes: K = objectives, P = parameter blocks that are treated apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from mogb.aggregators._state import same_size
from mogb.base import JacobianAggregator, Promise, Reads, Reference, Solution, state
from mogb.jacobian import Jacobian
from mogb.solvers.scaling import EPS, unit_diagonal

# A target cosine of exactly 1 could only be reached by an infinite multiple of the other gradient.
LARGEST_TARGET = 1 - 1e-8


@dataclass(kw_only=True)
class GradVac(JacobianAggregator, name="gradvac"):
    """Raises the cosine of every pair of gradients to its usual value, not only to 0 as PCGrad does.

    Norms and cosines of the changed gradients follow from the Gramian, so that nothing N-sized is kept. Averages are
    updated at every visit, corrected or not (the paper's algorithm 1; some ports update only where they correct). Zero
    gradients are neither changed nor used, and leave their averages alone.

    There is no official code. This follows the paper, but for ``beta``.

    Args:
        beta: How fast the averages follow, in [0, 1]. 0.5 as in LibMTL and TorchJD; the paper recommends 0.01.
        order: How the others are visited: a new random permutation for every objective (``"per-task"``, the paper),
            one permutation for all (``"shared"``), or by index (``"index"``).
        groups: ``"whole"`` treats the gradients as one vector each. ``"block"`` treats every parameter tensor apart,
            as the paper does: exact too, but it takes the K gradients themselves, yields no weights, and is thus only
            for calls on Jacobians and for engines. On a plain matrix ``[K, N]``, which is one block, both are the same.
        seed: Of the random orders.

    Examples:
        >>> import torch
        >>> GradVac()(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([0.5000, 1.5000])
    """

    reference: ClassVar = Reference(
        authors="Z. Wang, Y. Tsvetkov, O. Firat and Y. Cao",
        title=(
            "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual Models"
        ),
        venue="ICLR",
        year=2021,
        arxiv="2010.05874",
    )
    promises: ClassVar = frozenset({Promise.HOMOGENEOUS})

    beta: float = 0.5
    order: Literal["per-task", "shared", "index"] = "per-task"
    groups: Literal["whole", "block"] = "whole"
    seed: int = 0

    _targets: Float64[np.ndarray, "P K K"] | None = state()
    _generator: torch.Generator | None = state(kind="generator")

    @property
    def reads(self) -> Reads:
        """The Gramian, or the Jacobian where blocks are treated apart."""
        return "jacobian" if self.groups == "block" else "gramian"

    def _direction(self, jacobian: Jacobian, losses: Float64[np.ndarray, " K"] | None) -> tuple[Tensor, ...]:
        parts = [Jacobian((block,)) for block in jacobian.blocks]
        gramians = [self._gramian(part) for part in parts]
        if jacobian.across is not None:
            gramians = [jacobian.across.agree(gramian) for gramian in gramians]
        rows = self._vaccinated(gramians)
        return tuple(part.combine(weights)[0] for part, weights in zip(parts, rows, strict=True))

    def _check(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be in [0, 1], but got {self.beta}.")
        if self.order not in ("per-task", "shared", "index"):
            raise ValueError(f"order must be 'per-task', 'shared' or 'index', but got {self.order!r}.")
        if self.groups not in ("whole", "block"):
            raise ValueError(f"groups must be 'whole' or 'block', but got {self.groups!r}.")

    def _start(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def _solve(self, gramian: Float64[np.ndarray, "K K"] | None, losses: Float64[np.ndarray, " K"] | None) -> Solution:
        assert gramian is not None
        (weights,) = self._vaccinated([gramian])
        return Solution(weights)

    def _solve_live(
        self,
        gramian: Float64[np.ndarray, "K K"] | None,
        losses: Float64[np.ndarray, " K"] | None,
        live: Bool[np.ndarray, " K"],
    ) -> Solution:
        assert gramian is not None
        solution = self._solve(np.where(np.outer(live, live), gramian, 0.0), None)  # zero gradients take no part
        left_out = tuple(np.flatnonzero(~live).tolist())
        return replace(solution, weights=np.where(live, solution.weights, 0.0), left_out=left_out)

    def _vaccinated(self, gramians: Sequence[Float64[np.ndarray, "K K"]]) -> list[Float64[np.ndarray, " K"]]:
        """The weights for every group; all groups visit in the same orders."""
        size = len(gramians[0])
        targets = np.zeros((len(gramians), size, size)) if self._targets is None else self._targets.copy()
        same_size(self.name, targets.shape[1], size)
        if len(targets) != len(gramians):
            raise ValueError(
                f"'gradvac' holds the state of {len(targets)} parameter blocks, but got {len(gramians)}. Call reset() "
                "when the parameters change."
            )
        orders = self._orders(size)
        rows = [_vaccinate(gramian, held, orders, self.beta) for gramian, held in zip(gramians, targets, strict=True)]
        self._targets = targets
        return rows

    def _orders(self, size: int) -> list[list[int]]:
        everyone = list(range(size))
        if self.order == "shared":
            everyone = torch.randperm(size, generator=self._generator).tolist()
        orders = [[j for j in everyone if j != i] for i in range(size)]
        if self.order == "per-task":
            orders = [[row[k] for k in torch.randperm(size - 1, generator=self._generator).tolist()] for row in orders]
        return orders


def _vaccinate(
    gramian: Float64[np.ndarray, "K K"],
    targets: Float64[np.ndarray, "K K"],
    orders: Sequence[Sequence[int]],
    beta: float,
) -> Float64[np.ndarray, " K"]:
    """The weights on the raw gradients; updates the targets in place."""
    norms, cosines = unit_diagonal(gramian)
    alive = norms > 0
    total = np.zeros(len(norms))  # of coefficients on the unit gradients
    for i, order in enumerate(orders):
        if not alive[i]:
            continue
        row = np.zeros(len(norms))
        row[i] = 1.0
        for j in order:
            products = cosines @ row
            squared = row @ products
            if not alive[j] or squared <= 8 * len(norms) * EPS * np.abs(row).sum() ** 2:
                continue  # no direction, or nothing left but rounding
            length = sqrt(squared)
            cosine = min(max(float(products[j]) / length, -1.0), 1.0)
            target = min(float(targets[i, j]), LARGEST_TARGET)
            if cosine < target:
                base = sqrt(1 - target * target)
                row[j] += length * (target * sqrt(1 - cosine * cosine) - cosine * base) / base
            targets[i, j] = (1 - beta) * targets[i, j] + beta * cosine
        total += norms[i] * row
    return np.divide(total, norms, out=np.ones_like(total), where=alive)
