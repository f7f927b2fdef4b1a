r"""Schaffer: two parabolas on a line, the oldest two-objective problem.

.. math::  f_1(x) = x^2, \qquad f_2(x) = (x - 2)^2

Pareto set: the interval [0, 2]. Front: :math:`\sqrt{f_1} + \sqrt{f_2} = 2`. Hypervolume seen from (4, 4):
:math:`16 - \int_0^4 (2 - \sqrt{u})^2 du = 40/3`.

Shapes: S = starting points.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from mogb.problems._front import distance_to_curves
from mogb.problems.base import PlotWindow, Problem, Settings, uniform

CURVE = 2001


@dataclass(frozen=True, kw_only=True)
class Schaffer(Problem, name="schaffer"):
    """Two parabolas over one number; everything about them is known in closed form."""

    reference: ClassVar = (
        "Schaffer, Multiple objective optimization with vector evaluated genetic algorithms, ICGA 1985"
    )

    @property
    def num_objectives(self) -> int:
        return 2

    @property
    def dim(self) -> int:
        return 1

    @property
    def settings(self) -> Settings:
        return Settings(optimizer="sgd", lr=0.05, steps=200, quick_steps=200, quick_lr=0.05, tolerance=1e-3)

    def starts(self) -> Float64[Tensor, "S 1"]:
        return torch.tensor([[-5.0], [-0.5], [0.5], [3.0], [8.0]], dtype=torch.float64)

    def sample_starts(self, count: int, generator: torch.Generator) -> Float64[Tensor, "S 1"]:
        """Uniform in [-10, 10], the smallest of the intervals in use."""
        corner = torch.full((1,), 10.0, dtype=torch.float64)
        return uniform(count, -corner, corner, generator)

    def losses(self, x: Float64[Tensor, "... 1"], generator: torch.Generator | None = None) -> Float64[Tensor, "... 2"]:
        return (x - x.new_tensor([0.0, 2.0])) ** 2

    def pareto_set(self, count: int) -> Float64[Tensor, "M 1"]:
        return torch.linspace(0.0, 2.0, count, dtype=torch.float64)[:, None]

    @property
    def units(self) -> Float64[Tensor, " 2"]:
        """The range of each loss over the front, 4."""
        return torch.full((2,), 4.0, dtype=torch.float64)

    def distance_to_front(self, losses: Float64[Tensor, "... 2"]) -> Float64[Tensor, "..."]:
        """To the front as a polyline, accurate to 1e-6."""
        return distance_to_curves(losses / self.units, [self.pareto_front(CURVE) / self.units])

    def pareto_front(self, count: int) -> Float64[Tensor, "M 2"]:
        return self.losses(self.pareto_set(count))

    @property
    def reference_point(self) -> Float64[Tensor, " 2"]:
        return torch.full((2,), 4.0, dtype=torch.float64)

    @property
    def true_hypervolume(self) -> float:
        return 40 / 3

    @property
    def plot_window(self) -> PlotWindow:
        return PlotWindow(losses=((-1.0, 12.0), (-1.0, 12.0)))

    def _jacobian(
        self, x: Float64[Tensor, "S 1"], generator: torch.Generator | None
    ) -> tuple[Float64[Tensor, "S K"], Float64[Tensor, "S K 1"]]:
        offset = x - x.new_tensor([0.0, 2.0])
        return offset**2, 2 * offset[..., None]
