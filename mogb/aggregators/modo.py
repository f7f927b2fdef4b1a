r"""MoDo: one projected gradient step on the min-norm problem per training step, with double sampling.

.. math::  \lambda \leftarrow \Pi_S\bigl( \lambda - \gamma \, ( A \lambda + \rho \lambda ) \bigr) ,
           \qquad A = J_\xi \, J_{\xi'}^\top

S is the simplex. A product of gradients of *two independent* batches is an unbiased estimate of the Gramian of the
mean gradients, which makes this a stochastic gradient step on the regularized min-norm problem
:math:`\min_{\lambda \in S} \tfrac12 \|\bar J^\top \lambda\|^2 + \tfrac{\rho}{2} \|\lambda\|^2`.

Shapes: K = objectives.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64

from mogb.aggregators._cross import cross_gramian
from mogb.aggregators._state import everyone, live_share, nobody, same_size
from mogb.base import GramianAggregator, Promise, Reference, Solution, state
from mogb.solvers.simplex import project_on_simplex

__all__ = ["MoDo", "cross_gramian"]


@dataclass(kw_only=True)
class MoDo(GramianAggregator, name="modo"):
    """Simplex weights that follow the min-norm problem slowly, one step for every training step.

    The one step is the method, so nothing is solved here. Its length scales with the squared norm of the gradients,
    which the method does not normalize: choose ``gamma`` for the gradients at hand.

    As an aggregator of one batch (``mogb.backward``, or a call on a Jacobian) it is the deterministic form, with
    :math:`A = G`. For the published one, take the cross Gramian of two batches, and step on a third one (or on the
    mean of the two, equation 2.9b of the paper)::

        cross = cross_gramian(jacobian_1, jacobian_2)
        (modo.weights(cross).to(losses_3) @ losses_3).backward()

    Args:
        gamma: The length of the step on the weights. 1e-3 as in LibMTL, which took it over from the official code;
            TorchJD's default is 0.1.
        rho: Of the regularization, which keeps the weights away from the corners of the simplex.

    Examples:
        >>> import torch
        >>> MoDo(gamma=0.1, rho=0.0).weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.4250, 0.5750])
    """

    reference: ClassVar = Reference(
        authors="L. Chen, H. Fernando, Y. Ying and T. Chen",
        title=("Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and Conflict-Avoidance"),
        venue="NeurIPS",
        year=2023,
        arxiv="2305.20057",
        code="heshandevaka/Trade-Off-MOL",
    )
    promises: ClassVar = frozenset({Promise.SIMPLEX_WEIGHTS, Promise.PERMUTATION_EQUIVARIANT})

    gamma: float = 1e-3
    rho: float = 0.1

    _simplex: Float64[np.ndarray, " K"] | None = state()

    def _check(self) -> None:
        if not 0 < self.gamma < np.inf:
            raise ValueError(f"gamma must be positive and finite, but got {self.gamma}.")
        if not 0 <= self.rho < np.inf:
            raise ValueError(f"rho must be at least 0 and finite, but got {self.rho}.")

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
        held = np.full(size, 1 / size) if self._simplex is None else self._simplex.copy()
        same_size(self.name, len(held), size)
        if not live.any():
            return nobody(size)
        simplex, share = live_share(held, live)
        slope = gramian[live][:, live] @ simplex + self.rho * simplex
        simplex = project_on_simplex(simplex - self.gamma * slope)
        held[live] = share * simplex
        self._simplex = held
        return Solution(simplex).among(live)
