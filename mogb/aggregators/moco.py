r"""MoCo: the weights of a slowly moving min-norm problem on tracked gradients.

.. math::  y_k \leftarrow y_k - \beta_t (y_k - \tilde g_k) , \qquad
           \lambda \leftarrow \Pi \bigl( \lambda - \gamma_t (Y Y^\top + \rho I) \lambda \bigr) , \qquad
           d = Y^\top \lambda

with :math:`\tilde g_k = L_k \, g_k / \|g_k\|`, :math:`\beta_t = \beta / t^{\sigma_\beta}` and
:math:`\gamma_t = \gamma / t^{\sigma_\gamma}` at step t = 1, 2 ... :math:`\Pi` leads back onto the simplex.

Shapes: K = objectives.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from mogb.aggregators._ema import blended, like
from mogb.aggregators._losses import softmax
from mogb.aggregators._state import same_size
from mogb.base import JacobianAggregator, Promise, Reference, state
from mogb.jacobian import Jacobian
from mogb.solvers.simplex import project_on_simplex


@dataclass(kw_only=True)
class MoCo(JacobianAggregator, name="moco"):
    r"""Corrects the bias that the noise of mini-batches brings into multi-gradient directions.

    It keeps one averaged gradient per objective (K times the size of the model). The averages start at 0, without a
    correction, so that the first steps are shorter.

    The defaults are those of LibMTL, which the authors' own code went into. The paper's algorithm 1 has
    ``projection="simplex"`` and ``normalized=False``.

    Args:
        beta: The rate of the averages, in (0, 1].
        beta_sigma: How fast that rate falls with the steps.
        gamma: The rate of the weights, at least 0.
        gamma_sigma: How fast that rate falls with the steps.
        rho: The pull of the weights toward uniform ones, at least 0.
        projection: ``"softmax"`` as in the code, or ``"simplex"``, the Euclidean projection.
        normalized: Whether each gradient is brought to the length of its loss first. Losses must not be negative then.

    Raises:
        ValueError: On a call with a negative loss, if ``normalized``, or with gradients of another shape than before.

    Examples:
        >>> import torch
        >>> MoCo(beta=1.0)(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), losses=torch.tensor([1.0, 1.0]))
        tensor([0.5000, 0.5000])
    """

    reference: ClassVar = Reference(
        authors="H. Fernando, H. Shen, M. Liu, S. Chaudhury, K. Murugesan and T. Chen",
        title="Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Approach",
        venue="ICLR",
        year=2023,
        arxiv="2210.12624",
        code="median-research-group/LibMTL",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT})

    beta: float = 0.5
    beta_sigma: float = 0.5
    gamma: float = 0.1
    gamma_sigma: float = 0.5
    rho: float = 0.0
    projection: Literal["softmax", "simplex"] = "softmax"
    normalized: bool = True

    _tracked: tuple[Tensor, ...] | None = state(kind="tensors")
    _simplex: Float64[np.ndarray, " K"] | None = state()
    _steps: int = state(0, kind="number")

    def _check(self) -> None:
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta must be in (0, 1], but got {self.beta!r}.")
        for name in ("beta_sigma", "gamma", "gamma_sigma", "rho"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be at least 0 and finite, but got {getattr(self, name)!r}.")
        if self.projection not in ("softmax", "simplex"):
            raise ValueError(f"projection must be 'softmax' or 'simplex', but got {self.projection!r}.")

    @property
    def needs_losses(self) -> bool:
        return self.normalized

    @property
    def needs_positive_losses(self) -> bool:
        return self.normalized

    def _direction(self, jacobian: Jacobian, losses: Float64[np.ndarray, " K"] | None) -> tuple[Tensor, ...]:
        size, step = len(jacobian), self._steps + 1
        simplex = np.full(size, 1 / size) if self._simplex is None else self._simplex
        same_size(self.name, len(simplex), size)
        scale = self._scale(np.sqrt(self._gramian(jacobian).diagonal()), losses)
        rate = self.beta / step**self.beta_sigma
        tracked = Jacobian(blended(self.name, self._tracked, jacobian.blocks, scale, rate), jacobian.across)
        slope = self._gramian(tracked) @ simplex + self.rho * simplex
        moved = simplex - self.gamma / step**self.gamma_sigma * slope
        simplex = softmax(moved) if self.projection == "softmax" else project_on_simplex(moved)
        self._tracked, self._simplex, self._steps = tracked.blocks, simplex, step
        return like(tracked.combine(simplex), jacobian.blocks)

    def _scale(
        self, norms: Float64[np.ndarray, " K"], losses: Float64[np.ndarray, " K"] | None
    ) -> Float64[np.ndarray, " K"]:
        if not self.normalized:
            return np.ones(len(norms))
        assert losses is not None
        if losses.min() < 0:
            index = int(losses.argmin())
            raise ValueError(
                f"'moco' gives every gradient the length of its loss, but the loss of objective {index} is "
                f"{losses[index]:.6g}. Add a constant that keeps it positive, or set normalized=False."
            )
        return np.divide(losses, norms, out=np.zeros(len(norms)), where=norms > 0)
