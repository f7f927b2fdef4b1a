r"""M-ConFIG: ConFIG on averaged gradients, so that one new gradient per step is enough.

.. math::  m_k \leftarrow \beta_1 m_k + (1 - \beta_1) g_k , \qquad
           c = \operatorname{ConFIG} \Bigl( \frac{m_k}{1 - \beta_1^{t_k}} \Bigr) ,

where only the objectives that bring a gradient are updated, :math:`t_k` times so far. The second moment is that of
the gradients s whose averages would be the directions c, with :math:`\bar c_t = (1 - \beta_1^t) \, c_t`:

.. math::  s = \frac{\bar c_t - \beta_1 \bar c_{t-1}}{1 - \beta_1} , \qquad
           v \leftarrow \beta_2 v + (1 - \beta_2) s^2 , \qquad
           d = \frac{c}{\sqrt{v / (1 - \beta_2^t)} + 10^{-8}} .

Shapes: K = objectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from mogb.aggregators._ema import blended, check_blocks, like, wide
from mogb.aggregators._state import everyone, same_size
from mogb.aggregators.config import ConFIG
from mogb.base import JacobianAggregator, Promise, Reference, state
from mogb.errors import NonFiniteError
from mogb.jacobian import Jacobian, all_finite

# Below the line, as in Adam.
EPS = 1e-8


@dataclass(kw_only=True)
class MomentumConFIG(JacobianAggregator, name="momentum_config"):
    r"""Directions of ConFIG for the price of one backward pass a step, already scaled as Adam's are: use plain SGD.

    Called like any other method, all K gradients are new. For one new gradient a step, take turns::

        method = MomentumConFIG(num_objectives=K)
        for step, batch in enumerate(batches):
            index = step % K
            optimizer.zero_grad()
            losses_of[index](batch).backward()
            direction = method.direct_one(index, [param.grad for param in params])
            for param, part in zip(params, direction, strict=True):
                param.grad = part
            optimizer.step()

    The direction is 0 until every objective has had its turn. It keeps one averaged gradient per objective, and two
    more vectors (K + 2 times the size of the model).

    Follows ``PseudoMomentumOperator`` of the official code, the form of the paper. The other operator there, with a
    second moment for every objective, cannot run as published, and its documentation advises against it.

    Args:
        beta_1: Decay of the averaged gradients, in [0, 1).
        beta_2: Decay of the second moment, in [0, 1).
        num_objectives: K, for :meth:`direct_one`, which sees only one objective at a time.

    Raises:
        ValueError: On a call with gradients of another shape than before.

    Examples:
        >>> import torch
        >>> MomentumConFIG()(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        tensor([1., 1.])
    """

    reference: ClassVar = Reference(
        authors="Q. Liu, M. Chu and N. Thuerey",
        title="ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks",
        venue="International Conference on Learning Representations",
        year=2025,
        arxiv="2408.11104",
        code="tum-pbs/ConFIG",
    )
    promises: ClassVar = frozenset[Promise]()

    beta_1: float = 0.9
    beta_2: float = 0.999
    num_objectives: int | None = None

    _moments: tuple[Tensor, ...] | None = state(kind="tensors")  # [K, *shape] a block
    _turns: Float64[np.ndarray, " K"] | None = state()  # gradients seen of every objective
    _steps: int = state(0, kind="number")
    _averaged: tuple[Tensor, ...] | None = state(kind="tensors")  # the last (1 - beta_1 ** t) c
    _variance: tuple[Tensor, ...] | None = state(kind="tensors")

    def _check(self) -> None:
        for name, value in (("beta_1", self.beta_1), ("beta_2", self.beta_2)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), but got {value!r}.")
        size = self.num_objectives
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"num_objectives must be a whole number, at least 1, but got {size!r}.")

    @property
    def scales_coordinates(self) -> bool:
        return True

    def direct_one(self, index: int, gradient: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The direction after one new gradient, of one objective; 0 until all have had a turn.

        Args:
            index: Of the objective.
            gradient: One tensor per parameter, always of the same parameters in the same order.

        Raises:
            ValueError: ``num_objectives`` is not set, ``index`` is none of them, or the shapes changed.
            NonFiniteError: NaN or Inf in the gradient; nothing is changed.
        """
        if self.num_objectives is None:
            raise ValueError("direct_one() needs MomentumConFIG(num_objectives=...): it sees one objective at a time.")
        if not 0 <= index < self.num_objectives:
            raise ValueError(f"index must be in [0, {self.num_objectives - 1}], but got {index}.")
        rows = [wide(part) for part in gradient]
        if not all_finite(rows):
            raise NonFiniteError("gradient", index)
        held = self._moments or tuple(row.new_zeros((self.num_objectives, *row.shape)) for row in rows)
        check_blocks(self.name, [moment[0] for moment in held], rows)
        moments = tuple(moment.clone() for moment in held)
        for moment, row in zip(moments, rows, strict=True):
            moment[index].lerp_(row, 1 - self.beta_1)
        seen = np.arange(self.num_objectives) == index
        with self.undone_on_failure():
            direction = self._advance(Jacobian(moments), seen)
            if not all_finite(direction):
                raise NonFiniteError("direction", None)
        return like(direction, gradient)

    def _direction(self, jacobian: Jacobian, losses: Float64[np.ndarray, " K"] | None) -> tuple[Tensor, ...]:
        size = len(jacobian)
        if self.num_objectives is not None:
            same_size(self.name, self.num_objectives, size)
        self._gramian(jacobian)  # refuses NaN and Inf by the name of the objective
        moments = blended(self.name, self._moments, jacobian.blocks, np.ones(size), 1 - self.beta_1)
        return like(self._advance(Jacobian(moments, jacobian.across), everyone(size)), jacobian.blocks)

    def _advance(self, moments: Jacobian, fresh: Bool[np.ndarray, " K"]) -> tuple[Tensor, ...]:
        """Takes over the averaged gradients, some of which are fresh, and gives the scaled direction."""
        turns = fresh + (np.zeros(len(fresh)) if self._turns is None else self._turns)
        if turns.min() == 0:
            self._moments, self._turns = moments.blocks, turns
            return tuple(torch.zeros_like(block[0]) for block in moments.blocks)
        corrections = 1 - self.beta_1**turns
        gramian = self._gramian(moments) / np.outer(corrections, corrections)
        center = moments.combine(ConFIG()._solve(gramian, None).weights / corrections)
        step = self._steps + 1
        averaged = tuple(part * (1 - self.beta_1**step) for part in center)
        variance, direction = [], []
        for index, (part, average) in enumerate(zip(center, averaged, strict=True)):
            sample = average if self._averaged is None else average - self.beta_1 * self._averaged[index]
            square = (sample / (1 - self.beta_1)).square_().mul_(1 - self.beta_2)
            if self._variance is not None:
                square.add_(self._variance[index], alpha=self.beta_2)
            variance.append(square)
            direction.append(part / ((square / (1 - self.beta_2**step)).sqrt_() + EPS))
        self._moments, self._turns, self._steps = moments.blocks, turns, step
        self._averaged, self._variance = averaged, tuple(variance)
        return tuple(direction)
