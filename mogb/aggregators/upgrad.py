r"""UPGrad: every gradient projected onto the cone that conflicts with none, then added up.

.. math::  d = \sum_k \pi(p_k \, g_k) , \qquad \pi(x) = \arg\min_{d : J d \ge 0} \|d - x\|

with the preferences :math:`p_k = 1/K` by default.

Shapes: K = objectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64

from mogb.aggregators._options import as_preference, check_cone_solver, pick, preference_array
from mogb.base import GramianAggregator, Promise, Reference, Solution
from mogb.solvers.cone import ConeSolver, project_on_dual_cone


@dataclass(frozen=True, kw_only=True)
class UPGrad(GramianAggregator, name="upgrad"):
    """Conflicts with no gradient, and equals the mean where no two gradients conflict.

    The K projections are exact: there is no ridge, and the norms of the gradients may differ by any factor.

    Args:
        preference: One non-negative number per objective. None means 1/K each.
        solver: ``"active-set"``, or ``"quadprog"`` (the package of that name; GPL) for an independent second opinion.

    Examples:
        >>> import torch
        >>> UPGrad()(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([0.2500, 0.7500])
    """

    reference: ClassVar = Reference(
        authors="P. Quinton and V. Rey",
        title="Jacobian Descent for Multi-Objective Optimization",
        year=2024,
        arxiv="2406.16232",
        code="SimplexLab/TorchJD",
    )
    promises: ClassVar = frozenset({Promise.NON_CONFLICTING, Promise.PERMUTATION_EQUIVARIANT, Promise.HOMOGENEOUS})

    preference: Sequence[float] | None = None
    solver: ConeSolver = "active-set"

    def _check(self) -> None:
        check_cone_solver(self.solver)
        object.__setattr__(self, "preference", as_preference(self.preference))

    @property
    def keeps(self) -> frozenset[Promise]:
        return self.promises if self.preference is None else self.promises - {Promise.PERMUTATION_EQUIVARIANT}

    def _only(self, live: Bool[np.ndarray, " K"]) -> "UPGrad":
        return self if self.preference is None else replace(self, preference=pick(self.preference, live))

    def _weights(self, gramian: Float64[np.ndarray, "K K"]) -> Solution:
        size = len(gramian)
        vectors = np.diag(preference_array(self.preference, size, 1 / size))
        found = project_on_dual_cone(gramian, vectors, solver=self.solver)
        return Solution(found.weights.sum(axis=0), found.residual, found.converged)
