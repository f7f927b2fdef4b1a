r"""Pareto MTL: min-norm descent within the sector of one reference vector.

Reference vectors :math:`u_1, \dots, u_J` cut the space of losses into sectors; that of :math:`u_i` holds the losses L
with :math:`(u_j - u_i) \cdot L \le 0` for all j, where all vectors have the norm 1. With A the rows
:math:`u_j - u_i` of the constraints that L violates,

.. math::  d = J^\top \Bigl( w + A^\top v \Bigr) , \qquad
           (w, v) = \arg\min_{(w, v) \in S} \bigl\| J^\top ( w + A^\top v ) \bigr\| ,

S the simplex: every objective falls, and the losses come back to the sector. The first phase, which looks for a start
inside of it, leaves the objectives out: w = 0 (``get_d_paretomtl`` and ``get_d_paretomtl_init`` of the official code).

Shapes: K = objectives, J = reference vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64

from mogb.aggregators._options import as_preference
from mogb.aggregators._state import everyone, nobody
from mogb.base import GramianLossAggregator, Promise, Reference, Solution, state
from mogb.solvers.min_norm import solve_min_norm


@dataclass(kw_only=True)
class ParetoMTL(GramianLossAggregator, name="pareto_mtl"):
    """Leads to a Pareto-stationary point in the chosen sector: one run per sector draws the front.

    Follows the official code of the synthetic example, for any number of objectives (that code writes out K = 2), and
    solves the small problem exactly (its solver keeps every weight within [0.001, 0.999]). Weights on the raw
    gradients can be negative: bringing the losses back to the sector may mean that some of them grow.

    Args:
        references: J vectors with one non-negative number per objective, of any length. None means the K axes and the
            diagonal. Points on a quarter circle are usual for K = 2.
        index: Which of them is wanted; None means the last one, which is the diagonal by default.
        init_steps: At most so many first calls only look for the sector; the phase ends with the first call whose
            losses are inside. The official runs give it 20 % of their steps.

    Raises:
        ValueError: On a call with a number of objectives that the references were not given for.

    Examples:
        >>> import torch
        >>> ParetoMTL(references=[[1.0, 0.0], [0.0, 1.0]], index=0).weights(torch.eye(2), torch.tensor([2.0, 1.0]))
        tensor([0.5000, 0.5000])
    """

    reference: ClassVar = Reference(
        authors="X. Lin, H.-L. Zhen, Z. Li, Q. Zhang and S. Kwong",
        title="Pareto Multi-Task Learning",
        venue="NeurIPS",
        year=2019,
        arxiv="1912.12854",
        code="Xi-L/ParetoMTL",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT, Promise.HOMOGENEOUS})

    references: Sequence[Sequence[float]] | None = None
    index: int | None = None
    init_steps: int = 0

    _left: int = state(0, kind="number")

    def _check(self) -> None:
        if self.references is not None:
            if len({len(vector) for vector in self.references}) != 1:
                raise ValueError(
                    f"references must be one or more vectors of the same length, but got {self.references!r}."
                )
            vectors = [as_preference(vector) for vector in self.references]
            self.references = tuple(vector for vector in vectors if vector is not None)
            self._borders(len(self.references[0]))
        if self.init_steps < 0:
            raise ValueError(f"init_steps must be at least 0, but got {self.init_steps}.")

    def _start(self) -> None:
        self._left = self.init_steps

    @property
    def keeps(self) -> frozenset[Promise]:
        return self.promises if self.references is None else self.promises - {Promise.PERMUTATION_EQUIVARIANT}

    def _weights(self, gramian: Float64[np.ndarray, "K K"], losses: Float64[np.ndarray, " K"]) -> Solution:
        return self._solve_live(gramian, losses, everyone(len(losses)))

    def _solve_live(
        self,
        gramian: Float64[np.ndarray, "K K"] | None,
        losses: Float64[np.ndarray, " K"] | None,
        live: Bool[np.ndarray, " K"],
    ) -> Solution:
        """Sectors are those of all losses; an objective that takes no part has no gradient to offer."""
        assert gramian is not None
        assert losses is not None
        borders = self._borders(len(losses))
        if not live.any():
            return nobody(len(losses))
        violated = borders[borders @ losses > 0]
        violated = violated[(violated[:, live] != 0).any(axis=1)]
        searching = self._left > 0 and len(violated) > 0
        self._left = self._left - 1 if searching else 0
        rows = violated if searching else np.vstack([np.eye(len(losses))[live], violated])
        rows = rows[:, live]
        found = solve_min_norm(rows @ gramian[live][:, live] @ rows.T)
        note = "looking for the sector" if searching else "outside of the sector" if len(violated) else ""
        return Solution(found.weights @ rows, found.gap, found.converged, note=note).among(live)

    def _borders(self, size: int) -> Float64[np.ndarray, "J K"]:
        """The rows :math:`u_j - u_i`: their products with the losses are negative inside of the sector."""
        if self.references is None:
            vectors = np.vstack([np.eye(size), np.ones((1, size))])
        else:
            vectors = np.array(self.references)
        if vectors.shape[1] != size:
            raise ValueError(f"references must have one number per objective, {size}, but got {vectors.shape[1]}.")
        units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        index = len(units) - 1 if self.index is None else self.index
        if not -len(units) <= index < len(units):
            raise ValueError(f"index={index} names none of the {len(units)} references.")
        return np.delete(units, index, axis=0) - units[index]
