r"""DualProj: the mean gradient projected onto the cone that conflicts with no gradient.

.. math::  d = \arg\min_{d : J d \ge 0} \Big\| d - \sum_k p_k \, g_k \Big\|

with the preferences :math:`p_k = 1/K` by default. With the gradient of the newest task as the vector to project, this
is the rule of gradient episodic memory (GEM).

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
class DualProj(GramianAggregator, name="dualproj"):
    """Changes the mean gradient as little as it takes to conflict with no gradient.

    The paper projects the gradient of the newest task, ``preference=[0, ..., 0, 1]``; the default projects the mean, as
    TorchJD does.

    Args:
        preference: One non-negative number per objective. None means 1/K each.
        solver: ``"active-set"``, or ``"quadprog"`` (the package of that name; GPL) for an independent second opinion.

    Examples:
        >>> import torch
        >>> DualProj()(torch.tensor([[1.0, 0.0], [-3.0, 2.0]]))
        tensor([0., 1.])
    """

    reference: ClassVar = Reference(
        authors="D. Lopez-Paz and M. Ranzato",
        title="Gradient Episodic Memory for Continual Learning",
        venue="Advances in Neural Information Processing Systems",
        year=2017,
        arxiv="1706.08840",
        code="facebookresearch/GradientEpisodicMemory",
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

    def _only(self, live: Bool[np.ndarray, " K"]) -> "DualProj":
        return self if self.preference is None else replace(self, preference=pick(self.preference, live))

    def _weights(self, gramian: Float64[np.ndarray, "K K"]) -> Solution:
        size = len(gramian)
        vector = preference_array(self.preference, size, 1 / size)
        found = project_on_dual_cone(gramian, vector[None], solver=self.solver)
        return Solution(found.weights[0], found.residual, found.converged)
