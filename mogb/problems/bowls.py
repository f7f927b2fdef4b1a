r"""Bowls: K quadratic bowls of one shape in N dimensions, whose Pareto set is the hull of their centres.

.. math::  f_k(x) = \tfrac12 s_k \, \| z - e_k \|^2, \qquad z = \Lambda^{1/2} R \, x

R is a random rotation, :math:`\Lambda` holds curvatures from 1 to the condition number, and the scales s_k run from 1
to ``spread``. In the coordinates z every centre is a unit vector (K <= N), so the Pareto set is the probability
simplex, and

* the nearest Pareto point is a projection onto the simplex, in closed form for any K;
* z is known from the K losses alone, up to a rotation about the centres: with :math:`u_k = 2 f_k / s_k`, the point p of
  the plane :math:`\sum_k p_k = 1` below z and the height of z above it are
  :math:`p_k = (q - u_k) / 2, \; h^2 = q - 1 - \|p\|^2, \; q = (2 + \sum_k u_k) / K`.

Noise is Gaussian and added to every gradient, not to the values (SDMGrad uses 0.2).

Shapes: S = starting points.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from mogb.problems._front import onto_simplex
from mogb.problems.base import PlotWindow, Problem, Settings, seeded

MANY = 8
RADIUS = 3.0  # of the sphere on which the starting points lie, in z
# Hypervolume in units of the scales, seen from (s_1, ..., s_K): an integral, over triangles of three circles for K = 3.
UNIT_HYPERVOLUMES = {1: 1.0, 2: 5 / 6, 3: 77 / 120}


@dataclass(frozen=True, kw_only=True)
class Bowls(
    Problem,
    name="bowls",
    variants={
        "bowls_2d": {"objectives": 2, "size": 2, "spread": 10.0},
        "bowls_noisy": {"noise": 0.2},
        "bowls_64": {"objectives": 64, "size": 100, "condition": 100.0, "spread": 1000.0},
    },
):
    """K bowls of one shape and K sizes.

    Attributes:
        objectives: K, at most ``size``.
        size: N.
        condition: The largest curvature over the smallest.
        spread: The largest scale over the smallest.
        noise: Standard deviation of the noise in every component of every gradient.
        seed: Of the rotation.
    """

    reference: ClassVar = "ours; with the gradient noise of Xiao et al., SDMGrad, NeurIPS 2023"

    objectives: int = 3
    size: int = 10
    condition: float = 10.0
    spread: float = 100.0
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.objectives <= self.size:
            raise ValueError(f"objectives must be between 1 and size={self.size}, but got {self.objectives}.")
        for option in ("condition", "spread"):
            if not 1 <= getattr(self, option) < math.inf:
                raise ValueError(f"{option} must be a finite number of at least 1, but got {getattr(self, option)}.")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must be a finite number of at least 0, but got {self.noise}.")

    @property
    def num_objectives(self) -> int:
        return self.objectives

    @property
    def dim(self) -> int:
        return self.size

    @property
    def settings(self) -> Settings:
        """Long enough to settle, and not much longer: at a constant rate, Adam leaves a minimum again in bursts."""
        if self.objectives > MANY:
            return Settings(optimizer="adam", lr=2e-2, steps=400, quick_steps=200, quick_lr=3e-2, tolerance=5e-2)
        return Settings(optimizer="adam", lr=1e-2, steps=1500, quick_steps=400, quick_lr=3e-2, tolerance=5e-2)

    @property
    def stochastic(self) -> bool:
        return self.noise > 0

    def starts(self) -> Float64[Tensor, "S N"]:
        """Five draws with a fixed seed; two where the objectives are many, and every step is dear."""
        return self.sample_starts(2 if self.objectives > MANY else 5, seeded(self.seed + 1))

    def sample_starts(self, count: int, generator: torch.Generator) -> Float64[Tensor, "S N"]:
        """Uniform on a sphere of radius 3 in the coordinates z, around the middle of the Pareto set."""
        draws = torch.randn(count, self.size, generator=generator, dtype=torch.float64)
        middle = torch.zeros(self.size, dtype=torch.float64)
        middle[: self.objectives] = 1 / self.objectives
        return self._back(middle + RADIUS * draws / draws.norm(dim=1, keepdim=True))

    def losses(self, x: Float64[Tensor, "... N"], generator: torch.Generator | None = None) -> Float64[Tensor, "... K"]:
        forward, scales = _parts(self)
        z = x @ forward.mT
        others = z.square().sum(-1, keepdim=True) + 1
        values = 0.5 * scales * (others - 2 * z[..., : self.objectives])
        if generator is None or not self.stochastic:
            return values
        step = (x - x.detach())[..., None, :]  # zero, but its gradient is the noise
        return values + (self._draw((*x.shape[:-1], self.objectives, self.size), generator) * step).sum(-1)

    def pareto_set(self, count: int) -> Float64[Tensor, "M N"]:
        """Evenly spaced for two objectives, uniform draws from the simplex with a fixed seed for more."""
        if self.objectives == 2:
            first = torch.linspace(0.0, 1.0, count, dtype=torch.float64)
            weights = torch.stack([1 - first, first], dim=1)
        else:
            draws = torch.rand(count, self.objectives, generator=seeded(0), dtype=torch.float64)
            weights = -torch.log1p(-draws)
            weights = weights / weights.sum(1, keepdim=True)
        rest = weights.new_zeros(count, self.size - self.objectives)
        return self._back(torch.cat([weights, rest], dim=1))

    def pareto_front(self, count: int) -> Float64[Tensor, "M K"]:
        return self.losses(self.pareto_set(count))

    @property
    def units(self) -> Float64[Tensor, " K"]:
        """The scales, which are also the ranges of the losses over the front."""
        return _parts(self)[1]

    def distance_to_front(self, losses: Float64[Tensor, "... K"]) -> Float64[Tensor, "..."]:
        """The distance from z to the Pareto set, exact, from the losses alone.

        Half its square is a lower bound of what *every* loss, in units of its scale, would gain at the nearest Pareto
        point. Distances below 1e-8 are rounding.
        """
        squares = 2 * losses / self.units
        level = (2 + squares.sum(-1, keepdim=True)) / self.objectives
        below = 0.5 * (level - squares)
        height = (level[..., 0] - 1 - below.square().sum(-1)).clamp(min=0.0)
        return (height + (below - onto_simplex(below)).square().sum(-1)).sqrt()

    @property
    def reference_point(self) -> Float64[Tensor, " K"] | None:
        """The largest losses on the front, (s_1, ..., s_K)."""
        return self.units if self.objectives in UNIT_HYPERVOLUMES else None

    @property
    def true_hypervolume(self) -> float | None:
        """For K up to 3."""
        unit = UNIT_HYPERVOLUMES.get(self.objectives)
        return None if unit is None else unit * float(self.units.prod())

    @property
    def plot_window(self) -> PlotWindow | None:
        if self.objectives not in (2, 3):
            return None
        plane = None
        if self.size == 2:
            reach = 1.1 * self.starts().abs().amax(0)
            plane = ((-float(reach[0]), float(reach[0])), (-float(reach[1]), float(reach[1])))
        return PlotWindow(x=plane, losses=tuple((-0.05 * unit, 2.0 * unit) for unit in self.units.tolist()))

    def _jacobian(
        self, x: Float64[Tensor, "S N"], generator: torch.Generator | None
    ) -> tuple[Float64[Tensor, "S K"], Float64[Tensor, "S K N"]]:
        forward, scales = _parts(self)
        z = x @ forward.mT
        values = 0.5 * scales * (z.square().sum(1, keepdim=True) + 1 - 2 * z[:, : self.objectives])
        rows = scales[:, None] * ((z @ forward)[:, None] - forward[: self.objectives])
        if generator is not None and self.stochastic:
            rows = rows + self._draw(tuple(rows.shape), generator)
        return values, rows

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return self.noise * torch.randn(shape, generator=generator, dtype=torch.float64)

    def _back(self, z: Tensor) -> Tensor:
        """The x of a z: Rᵀ Λ^(-1/2) z."""
        forward, _ = _parts(self)
        return z @ (forward / forward.square().sum(1, keepdim=True))


@lru_cache(maxsize=16)
def _parts(problem: Bowls) -> tuple[Tensor, Tensor]:
    """Λ^(1/2) R, and the scales."""
    draws = torch.randn(problem.size, problem.size, generator=seeded(problem.seed), dtype=torch.float64)
    rotation, upper = torch.linalg.qr(draws)
    rotation = rotation * upper.diagonal().sign()
    curvatures = torch.logspace(0.0, math.log10(problem.condition), problem.size, dtype=torch.float64)
    scales = torch.logspace(0.0, math.log10(problem.spread), problem.objectives, dtype=torch.float64)
    return curvatures.sqrt()[:, None] * rotation, scales
