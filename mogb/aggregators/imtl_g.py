r"""IMTL-G: the direction with the same projection onto every gradient.

.. math::  d = \sum_k w_k \, g_k , \quad \sum_k w_k = 1 , \qquad d \cdot \frac{g_1}{\|g_1\|} = \dots = d \cdot
           \frac{g_K}{\|g_K\|} .

With C the cosines between the gradients, the answer is in closed form: :math:`w_k \propto v_k / \|g_k\|` for
:math:`C v = \mathbf{1}`.

Shapes: K = objectives.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float64

from mogb.base import GramianAggregator, Promise, Reference, Solution
from mogb.solvers.scaling import EPS, unit_diagonal
from mogb.solvers.semidefinite import solve_semidefinite


@dataclass(frozen=True, kw_only=True)
class IMTLG(GramianAggregator, name="imtl_g"):
    r"""Treats all objectives alike, by the closed form of equation 3 of the paper.

    The gradients may be dependent: the system is then solved in the least-squares sense, where the official code meets
    a singular matrix. Weights may be negative. For three or more objectives the published formula may even return a
    direction against every gradient, where :math:`\sum_k v_k / \|g_k\|` is negative; the solution's note says so.
    Zero gradients are left out.

    Examples:
        >>> import torch
        >>> IMTLG().weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.3333, 0.6667])
    """

    reference: ClassVar = Reference(
        authors="L. Liu, Y. Li, Z. Kuang, J.-H. Xue, Y. Chen, W. Yang, Q. Liao and W. Zhang",
        title="Towards Impartial Multi-task Learning",
        venue="International Conference on Learning Representations",
        year=2021,
        url="https://openreview.net/forum?id=IMPnRXEWpvr",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT, Promise.HOMOGENEOUS})

    @property
    def leaves_out_zero(self) -> bool:
        return True

    def _weights(self, gramian: Float64[np.ndarray, "K K"]) -> Solution:
        norms, cosines = unit_diagonal(gramian)
        if len(norms) == 2:  # v is the same for both, also in the limit of opposite gradients
            return Solution(norms[::-1] / norms.sum())
        weights = solve_semidefinite(cosines, np.ones(len(norms))) / norms
        total = float(weights.sum())
        if abs(total) <= 8 * len(norms) ** 1.5 * EPS * math.sqrt(weights.dot(weights)):
            return Solution(
                np.zeros(len(norms)), note="Pareto stationary: no direction projects onto all gradients alike"
            )
        note = "this step is against every gradient" if total < 0 else ""
        return Solution(weights / total, note=note)
