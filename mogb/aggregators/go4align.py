r"""GO4Align: objectives in groups, one weight per group.

With the momentum :math:`p_k \propto p_k \, e^{-\eta L_k}` (starting uniform, on the simplex), every objective has the
indicator

.. math::  \gamma_k = p_k \, \frac{\sum_j L_j}{L_k} .

The indicators are clustered by k-means, and the weight of an objective is the mean indicator of its group.

Shapes: K = objectives.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64

from mogb.aggregators._losses import require_above, softmax
from mogb.aggregators._state import everyone, nobody, same_size
from mogb.base import LossAggregator, Promise, Reference, Solution, state


@dataclass(kw_only=True)
class GO4Align(LossAggregator, name="go4align"):
    r"""Brings losses to one scale, group by group; losses must be positive.

    Without the momentum and with as many groups as objectives, all :math:`w_k L_k` are equal; fewer groups make the
    weights of similar objectives equal instead.

    Follows the official code (its class ``GO4ALIGN``), which does not run as published, since the k-means routine it
    calls is not imported. That routine starts at random centres; here the clusters of numbers on a line are found
    exactly, by dynamic programming, so that there is no seed. It was compared with the code, not with the paper's text.

    Args:
        num_groups: At most so many groups. The official class leaves it open and its script has 1, one weight for all;
            2 is the smallest number that groups.
        step_size: The :math:`\eta`, at least 0. 1e-4 as in the official code.

    Raises:
        ValueError: On a call with a loss that is not positive; it names the objective.

    Examples:
        >>> import torch
        >>> GO4Align(num_groups=2, step_size=0.0).weights(losses=torch.tensor([1.0, 1.25, 5.0]))
        tensor([2.1750, 2.1750, 0.4833])
    """

    reference: ClassVar = Reference(
        authors="J. Shen, Q. Wang, Z. Xiao, N. van Noord and M. Worring",
        title="GO4Align: Group Optimization for Multi-Task Alignment",
        venue="NeurIPS",
        year=2024,
        arxiv="2404.06486",
        code="autumn9999/GO4Align",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT})

    num_groups: int = 2
    step_size: float = 1e-4

    _logits: Float64[np.ndarray, " K"] | None = state()

    def _check(self) -> None:
        if isinstance(self.num_groups, bool) or not isinstance(self.num_groups, int) or self.num_groups < 1:
            raise ValueError(f"num_groups must be a whole number, at least 1, but got {self.num_groups!r}.")
        if not 0 <= self.step_size < np.inf:
            raise ValueError(f"step_size must be at least 0 and finite, but got {self.step_size!r}.")

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
        require_above(self.name, losses, live)
        if not live.any():
            return nobody(size)
        logits = np.zeros(size) if self._logits is None else self._logits
        same_size(self.name, len(logits), size)
        logits = logits - np.where(live, self.step_size * losses, 0.0)
        indicators = softmax(logits[live]) * losses[live].sum() / losses[live]
        weights, groups = np.zeros(size), np.full(size, np.nan)
        weights[live], groups[live] = _cluster(indicators, self.num_groups)
        self._logits = logits - logits.max()
        return Solution(weights, left_out=tuple(np.flatnonzero(~live).tolist()), details={"groups": groups})


def _cluster(
    values: Float64[np.ndarray, " K"], num_groups: int
) -> tuple[Float64[np.ndarray, " K"], Float64[np.ndarray, " K"]]:
    """The mean of every number's group, and the number of that group, for the best k-means clustering.

    On a line the groups are intervals, so that the best division of the first numbers into g groups consists of a best
    division of fewer numbers into g - 1 groups and one interval.
    """
    size = len(values)
    order = np.argsort(values, kind="stable")
    ordered = values[order] - values.mean()
    sums, squares = np.append(0.0, np.cumsum(ordered)), np.append(0.0, np.cumsum(ordered**2))
    begin, end = np.meshgrid(np.arange(size), np.arange(1, size + 1), indexing="ij")
    counts = np.maximum(end - begin, 1)
    spread = squares[end] - squares[begin] - (sums[end] - sums[begin]) ** 2 / counts
    cost = np.where(end > begin, np.maximum(spread, 0.0), np.inf)  # of one interval, [begin, end - 1]
    best, cuts = cost[0], []
    for _ in range(1, min(num_groups, size)):
        totals = np.append(np.inf, best[:-1])[:, None] + cost
        cuts.append(totals.argmin(axis=0))
        best = totals.min(axis=0)
    means, groups, last = np.empty(size), np.empty(size), size
    for group in range(len(cuts), -1, -1):
        first = int(cuts[group - 1][last - 1]) if group else 0
        inside = order[first:last]
        means[inside], groups[inside] = values[inside].mean(), group
        last = first
    return means, groups
