r"""DB-MTL: the sum of the averaged gradients of the log losses, all brought to the length of the longest.

.. math::  u_k \leftarrow \beta_t \, u_k + (1 - \beta_t) \, \frac{g_k}{L_k} , \qquad
           d = \max_j \|u_j\| \, \sum_k \frac{u_k}{\|u_k\|} , \qquad \beta_t = \beta / t^\sigma

at step t = 1, 2 ...

Shapes: K = objectives.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from mogb.aggregators._ema import blended, like
from mogb.aggregators._losses import require_above
from mogb.aggregators._state import everyone
from mogb.base import JacobianAggregator, Promise, Reads, Reference, Solution, state
from mogb.jacobian import Jacobian


@dataclass(kw_only=True)
class DBMTL(JacobianAggregator, name="db_mtl"):
    r"""Dual balancing: logarithms for the losses, equal lengths for the gradients. Losses must be positive.

    It keeps one averaged gradient per objective (K times the size of the model). The averages start at 0, without a
    correction, so that the first step is the share :math:`1 - \beta` of a full one, as in LibMTL. With ``beta=0``
    nothing is kept, and the Gramian and the losses are all it reads.

    Follows LibMTL but for its constants of 1e-8 inside the logarithms and in the norms: a loss of zero is refused
    instead, a zero gradient is left out, and the scale of the losses does not matter at all.

    Args:
        beta: The share of the past in the averages, in [0, 1).
        beta_sigma: How fast that share falls with the steps; 0 as in LibMTL.

    Raises:
        ValueError: On a call with a loss that is not positive, or with gradients of another shape than before.

    Examples:
        >>> import torch
        >>> DBMTL(beta=0.0)(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), losses=torch.tensor([3.0, 0.5]))
        tensor([2., 2.])
    """

    reference: ClassVar = Reference(
        authors="B. Lin, W. Jiang, F. Ye, Y. Zhang, P. Chen, Y.-C. Chen, S. Liu and J. T. Kwok",
        title="Dual-Balancing for Multi-Task Learning",
        year=2023,
        arxiv="2308.12029",
        code="median-research-group/LibMTL",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT, Promise.SCALE_FREE})

    beta: float = 0.9
    beta_sigma: float = 0.0

    _tracked: tuple[Tensor, ...] | None = state(kind="tensors")
    _steps: int = state(0, kind="number")

    def _check(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must be in [0, 1), but got {self.beta!r}.")
        if not 0 <= self.beta_sigma < np.inf:
            raise ValueError(f"beta_sigma must be at least 0 and finite, but got {self.beta_sigma!r}.")

    @property
    def reads(self) -> Reads:
        """The Jacobian, or the Gramian and the losses where nothing is averaged."""
        return "gramian+losses" if self.beta == 0 else "jacobian"

    @property
    def needs_losses(self) -> bool:
        return True

    @property
    def needs_positive_losses(self) -> bool:
        return True

    def _solve(self, gramian: Float64[np.ndarray, "K K"] | None, losses: Float64[np.ndarray, " K"] | None) -> Solution:
        if self.beta != 0:
            return super()._solve(gramian, losses)
        assert gramian is not None
        assert losses is not None
        require_above(self.name, losses, everyone(len(losses)))
        lengths = _lengths(np.sqrt(np.maximum(gramian.diagonal(), 0.0)) / losses)
        return Solution(lengths / losses, left_out=tuple(np.flatnonzero(lengths == 0).tolist()))

    def _direction(self, jacobian: Jacobian, losses: Float64[np.ndarray, " K"] | None) -> tuple[Tensor, ...]:
        assert losses is not None
        require_above(self.name, losses, everyone(len(losses)))
        self._gramian(jacobian)  # refuses NaN and Inf by the name of the objective
        step = self._steps + 1
        rate = 1 - self.beta / step**self.beta_sigma
        tracked = Jacobian(blended(self.name, self._tracked, jacobian.blocks, 1 / losses, rate), jacobian.across)
        direction = tracked.combine(_lengths(np.sqrt(self._gramian(tracked).diagonal())))
        self._tracked, self._steps = tracked.blocks, step
        return like(direction, jacobian.blocks)


def _lengths(norms: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, " K"]:
    """What brings every norm to the largest one; 0 for zero."""
    return np.divide(norms.max(), norms, out=np.zeros(len(norms)), where=norms > 0)
