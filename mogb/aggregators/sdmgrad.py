r"""SDMGrad: the min-norm point of the gradients, each pulled toward a target direction.

.. math::  w = \arg\min_{w \in S} \tfrac12 \bigl\| J^\top (w + \lambda \tilde w) \bigr\|^2 , \qquad
           d = J^\top \frac{w + \lambda \tilde w}{1 + \lambda}

S is the simplex and :math:`\tilde w` the preference, by default uniform. With
:math:`\lambda = 0` it is MGDA; a large :math:`\lambda` makes it the weighted sum.

Because the weights sum to 1, d is the shortest vector in the hull of the shifted gradients
:math:`g_k + \lambda J^\top \tilde w`, up to the factor :math:`1 / (1 + \lambda)`: an ordinary min-norm problem.

Shapes: K = objectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float64

from mogb.aggregators._cross import cross_gramian
from mogb.aggregators._options import as_preference, pick, preference_array
from mogb.aggregators._state import everyone, live_share, nobody, same_size
from mogb.base import GramianAggregator, Promise, Reference, Solution, state
from mogb.solvers.min_norm import solve_min_norm
from mogb.solvers.simplex import project_on_simplex

__all__ = ["SDMGrad", "cross_gramian"]

# Relative asymmetry beyond rounding, also that of float32 products: such a matrix comes from two batches.
ASYMMETRY = 1e-3


@dataclass(kw_only=True)
class SDMGrad(GramianAggregator, name="sdmgrad"):
    """A compromise between the min-norm point and a preferred weighted sum.

    With ``solver="exact"`` (the default) the problem is solved to rounding and nothing is remembered. The official
    code takes 20 steps of projected SGD instead, warm-started from call to call. On one Gramian these overshoot: with
    gradients (-4, 1, 1) and (6, 1, 1) they end in the corner (0, 1), a direction that conflicts with the first
    gradient, while the exact one conflicts with none. For stochastic gradients the steps *are* the method: each sees
    the cross Gramian of two independent batches, which is neither symmetric nor positive semidefinite, so that there
    is no minimum to solve for. Give it that matrix, and step on a third batch::

        cross = cross_gramian(jacobian_1, jacobian_2)
        (sdmgrad.weights(cross).to(losses_3) @ losses_3).backward()

    Args:
        lam: The pull toward the preferred direction, at least 0. 0.3 as in the official experiments and in LibMTL;
            the default of the official class is 0.6.
        preference: Non-negative numbers, one per objective, scaled to sum 1; None means uniform.
        solver: ``"exact"``, or ``"official"`` for the steps.
        steps: Of the official solver.
        lr: Of the official solver, on a matrix scaled to a mean norm of 1. 10 as in the official code; LibMTL has 5.
        momentum: Of the official solver.

    Raises:
        ValueError: On a call with a matrix of two batches while ``solver="exact"``.

    Examples:
        >>> import torch
        >>> SDMGrad(lam=0.0).weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.2000, 0.8000])
    """

    reference: ClassVar = Reference(
        authors="P. Xiao, H. Ban and K. Ji",
        title="Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms",
        venue="NeurIPS",
        year=2023,
        arxiv="2305.18409",
        code="OptMN-Lab/sdmgrad",
    )
    promises: ClassVar = frozenset({Promise.SIMPLEX_WEIGHTS, Promise.PERMUTATION_EQUIVARIANT, Promise.HOMOGENEOUS})

    lam: float = 0.3
    preference: Sequence[float] | None = None
    solver: Literal["exact", "official"] = "exact"
    steps: int = 20
    lr: float = 10.0
    momentum: float = 0.5

    _simplex: Float64[np.ndarray, " K"] | None = state()

    @property
    def keeps(self) -> frozenset[Promise]:
        if self.solver == "official":  # its steps overshoot, and amplify what rounding leaves
            return frozenset({Promise.SIMPLEX_WEIGHTS})
        return self.promises if self.preference is None else self.promises - {Promise.PERMUTATION_EQUIVARIANT}

    def _check(self) -> None:
        self.preference = as_preference(self.preference)
        if not 0 <= self.lam < np.inf:
            raise ValueError(f"lam must be at least 0 and finite, but got {self.lam}.")
        if self.solver not in ("exact", "official"):
            raise ValueError(f"solver must be 'exact' or 'official', but got {self.solver!r}.")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, but got {self.steps}.")
        if not 0 < self.lr < np.inf:
            raise ValueError(f"lr must be positive and finite, but got {self.lr}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), but got {self.momentum}.")

    def _weights(self, gramian: Float64[np.ndarray, "K K"]) -> Solution:
        if self.solver == "official":
            return self._solve_live(gramian, None, everyone(len(gramian)))
        if _is_cross(gramian):
            raise ValueError(
                "'sdmgrad' with solver='exact' needs the Gramian of one batch, but got a matrix that is not symmetric "
                "positive semidefinite. Use solver='official' for the cross Gramian of two batches."
            )
        target = self._target(len(gramian))
        found = solve_min_norm(_shifted(gramian, self.lam * target))
        return self._mixed(found.weights, target, found.gap, found.converged)

    def _mixed(
        self, simplex: Float64[np.ndarray, " K"], target: Float64[np.ndarray, " K"], gap: float, converged: bool
    ) -> Solution:
        weights = (simplex + self.lam * target) / (1 + self.lam)
        return Solution(weights, gap, converged, details={"simplex": simplex})

    def _solve_live(
        self,
        gramian: Float64[np.ndarray, "K K"] | None,
        losses: Float64[np.ndarray, " K"] | None,
        live: Bool[np.ndarray, " K"],
    ) -> Solution:
        assert gramian is not None
        if self.solver == "exact":
            return super()._solve_live(gramian, losses, live)
        size = len(gramian)
        held = np.full(size, 1 / size) if self._simplex is None else self._simplex.copy()
        same_size(self.name, len(held), size)
        if not live.any():
            return nobody(size)
        simplex, share = live_share(held, live)
        target = self._only(live)._target(len(simplex))
        simplex = self._descended(gramian[live][:, live], simplex, target)
        held[live] = share * simplex
        self._simplex = held
        return self._mixed(simplex, target, 0.0, True).among(live)

    def _only(self, live: Bool[np.ndarray, " K"]) -> "SDMGrad":
        return self if self.preference is None else replace(self, preference=pick(self.preference, live))

    def _target(self, size: int) -> Float64[np.ndarray, " K"]:
        target = preference_array(self.preference, size, 1.0)
        total = target.sum()
        return target / total if total > 0 else np.full(size, 1 / size)

    def _descended(
        self,
        matrix: Float64[np.ndarray, "K K"],
        simplex: Float64[np.ndarray, " K"],
        target: Float64[np.ndarray, " K"],
    ) -> Float64[np.ndarray, " K"]:
        """The official steps, from where the last call ended."""
        scale = np.sqrt(np.maximum(matrix.diagonal(), 0.0)).mean()
        scaled = matrix / scale**2 if scale > 0 else np.zeros_like(matrix)
        scaled = scaled.astype(np.float32).astype(float)  # as officially; where the steps overshoot, digits matter
        velocity = np.zeros(len(matrix))
        for _ in range(self.steps):
            velocity = self.momentum * velocity + scaled @ (simplex + self.lam * target)
            simplex = project_on_simplex(simplex - self.lr * velocity)
        return simplex


def _shifted(gramian: Float64[np.ndarray, "K K"], shift: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, "K K"]:
    """The Gramian of the gradients plus the vector that has the weights ``shift`` on them."""
    products = gramian @ shift
    return gramian + products + products[:, None] + shift @ products


def _is_cross(matrix: Float64[np.ndarray, "K K"]) -> bool:
    squares = matrix.diagonal()
    scale = np.abs(squares).max()
    return bool(squares.min() < -ASYMMETRY * scale or np.abs(matrix - matrix.T).max() > ASYMMETRY * scale)
