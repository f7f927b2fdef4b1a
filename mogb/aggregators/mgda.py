r"""MGDA: the shortest vector in the convex hull of the gradients.

.. math::  d = \sum_k w_k \, g_k , \qquad  w = \arg\min_{w \in \Delta} \Big\| \sum_k w_k \, \frac{g_k}{n_k} \Big\|^2

with :math:`n_k = 1` by default. Where d is zero, the point is Pareto stationary; otherwise d improves every objective,
:math:`d \cdot g_k \ge \|d\|^2`, and all those of positive weight at the same rate.

Shapes: K = objectives; :math:`\Delta` = the simplex.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from jaxtyping import Float64

from mogb.base import GramianLossAggregator, Promise, Reads, Reference, Solution
from mogb.solvers.min_norm import solve_min_norm

Normalization = Literal["none", "l2", "loss", "loss+"]
ApplyTo = Literal["normalized", "raw"]


@dataclass(frozen=True, kw_only=True)
class MGDA(GramianLossAggregator, name="mgda"):
    r"""Returns the min-norm point itself, solved exactly for any K, with its optimality gap as the residual.

    With a normalization there are two conventions. ``apply_to="normalized"`` returns the min-norm point of the
    normalized gradients :math:`g_k / n_k` (as LibMTL does), which conflicts with no gradient. ``apply_to="raw"`` uses
    the same simplex weights on the gradients as they are (as the code of Sener and Koltun does), and may conflict.

    Args:
        normalization: The :math:`n_k`: ``"none"`` is 1, ``"l2"`` the norm of the gradient, ``"loss"`` the loss value,
            and ``"loss+"`` their product. Losses must be positive then.
        apply_to: What the simplex weights weight, ``"normalized"`` or ``"raw"`` gradients.
        ignore_zero: Leave zero gradients out. Otherwise one of them makes the point Pareto stationary, and d is 0.

    Examples:
        >>> import torch
        >>> MGDA().weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.2000, 0.8000])
    """

    reference: ClassVar = Reference(
        authors="O. Sener and V. Koltun",
        title="Multi-Task Learning as Multi-Objective Optimization",
        venue="Advances in Neural Information Processing Systems",
        year=2018,
        arxiv="1810.04650",
        code="isl-org/MultiObjectiveOptimization",
    )
    promises: ClassVar = frozenset(
        {
            Promise.NON_CONFLICTING,
            Promise.SIMPLEX_WEIGHTS,
            Promise.PERMUTATION_EQUIVARIANT,
            Promise.HOMOGENEOUS,
        }
    )

    normalization: Normalization = "none"
    apply_to: ApplyTo = "normalized"
    ignore_zero: bool = False

    def _check(self) -> None:
        if self.normalization not in get_args(Normalization):
            known = ", ".join(get_args(Normalization))
            raise ValueError(f"normalization must be one of {known}, but got {self.normalization!r}.")
        if self.apply_to not in get_args(ApplyTo):
            raise ValueError(f"apply_to must be one of {', '.join(get_args(ApplyTo))}, but got {self.apply_to!r}.")

    @property
    def reads(self) -> Reads:
        return "gramian+losses" if self.normalization in ("loss", "loss+") else "gramian"

    @property
    def needs_positive_losses(self) -> bool:
        return self.normalization in ("loss", "loss+")

    @property
    def leaves_out_zero(self) -> bool:
        return self.ignore_zero

    @property
    def keeps(self) -> frozenset[Promise]:
        if self.normalization == "none":
            return self.promises
        if self.apply_to == "raw":
            return self.promises - {Promise.NON_CONFLICTING}
        kept = self.promises - {Promise.SIMPLEX_WEIGHTS, Promise.HOMOGENEOUS}  # the direction has a scale of its own
        return kept if self.normalization == "loss+" else kept | {Promise.SCALE_FREE}

    def _weights(self, gramian: Float64[np.ndarray, "K K"], losses: Float64[np.ndarray, " K"]) -> Solution:
        if self.normalization == "none":
            return _solution(gramian)
        scales = self._inverse_scales(gramian, losses)
        solution = _solution(gramian * scales * scales[:, None])
        weights = solution.weights if self.apply_to == "raw" else solution.weights * scales
        return Solution(weights, solution.residual, solution.converged, note=solution.note)

    def _inverse_scales(
        self, gramian: Float64[np.ndarray, "K K"], losses: Float64[np.ndarray, " K"]
    ) -> Float64[np.ndarray, " K"]:
        scales = np.ones(len(gramian))
        if self.normalization != "l2":
            if losses.min() <= 0:
                index = int(losses.argmin())
                raise ValueError(
                    f"normalization={self.normalization!r} divides by the losses, which must be positive, but "
                    f"losses[{index}] = {losses[index]:g}. Shift the loss, or use normalization='l2'."
                )
            scales /= losses
        if self.normalization != "loss":
            norms = np.sqrt(np.maximum(gramian.diagonal(), 0.0))
            scales = np.divide(scales, norms, out=np.zeros_like(scales), where=norms > 0)
        return scales


def _solution(gramian: Float64[np.ndarray, "K K"]) -> Solution:
    found = solve_min_norm(gramian)
    note = "Pareto stationary: a gradient is zero" if gramian.diagonal().min() <= 0 else ""
    return Solution(found.weights, found.gap, found.converged, note=note)
