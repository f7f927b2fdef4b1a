r"""Fonseca–Fleming (VLMOP2): two Gaussian wells whose front is concave, so that no weighted sum reaches its middle.

.. math::  f_{1,2}(x) = 1 - \exp\Bigl(-\sum_{i=1}^n (x_i \mp 1/\sqrt n)^2\Bigr)

Pareto set: :math:`x = t \cdot (1, \ldots, 1)` with :math:`|t| \le 1/\sqrt n`. Front, for
:math:`0 \le f_1 \le 1 - e^{-4}` and every n: :math:`f_2 = 1 - \exp(-(2 - \sqrt{-\ln(1 - f_1)})^2)`. Hypervolume seen
from (1, 1): :math:`2 e^{-2} \sqrt{\pi/2} \operatorname{erf}(\sqrt 2) + e^{-4} = 0.3421155931`.

Plain sums end at one of the two ends; a min-norm step ends somewhere on the front.

Shapes: S = starting points, n = N.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from mogb.problems._front import distance_to_curves
from mogb.problems.base import PlotWindow, Problem, Settings, seeded, uniform

CURVE = 2001


@dataclass(frozen=True, kw_only=True)
class Fonseca(Problem, name="fonseca", variants={"fonseca_2d": {"size": 2}}):
    """Two Gaussian wells with a concave front.

    Attributes:
        size: N; 20 in Pareto-MTL and EPO.
    """

    reference: ClassVar = "Fonseca and Fleming, Multiobjective optimization and multiple constraint handling, 1998"

    size: int = 20

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, but got {self.size}.")

    @property
    def num_objectives(self) -> int:
        return 2

    @property
    def dim(self) -> int:
        return self.size

    @property
    def settings(self) -> Settings:
        """Four times the steps of Pareto-MTL at a quarter of their length, which lets every method settle."""
        return Settings(optimizer="sgd", lr=0.25, steps=400, quick_steps=200, quick_lr=0.25, tolerance=1e-2)

    def starts(self) -> Float64[Tensor, "S N"]:
        """Five draws as in Pareto-MTL, with a fixed seed."""
        return self.sample_starts(5, seeded(0))

    def sample_starts(self, count: int, generator: torch.Generator) -> Float64[Tensor, "S N"]:
        """Uniform in [-1/2, 1/2] for N = 20 as in Pareto-MTL; wider for fewer coordinates, at the same mean norm."""
        corner = torch.full((self.size,), 0.5 * math.sqrt(20 / self.size), dtype=torch.float64)
        return uniform(count, -corner, corner, generator)

    def losses(self, x: Float64[Tensor, "... N"], generator: torch.Generator | None = None) -> Float64[Tensor, "... 2"]:
        return -torch.expm1(-self._offset(x).square().sum(-1))

    def pareto_set(self, count: int) -> Float64[Tensor, "M N"]:
        end = 1 / math.sqrt(self.size)
        return torch.linspace(end, -end, count, dtype=torch.float64)[:, None].expand(-1, self.size).contiguous()

    @property
    def units(self) -> Float64[Tensor, " 2"]:
        """The range of each loss over the front."""
        return torch.full((2,), -math.expm1(-4.0), dtype=torch.float64)

    def distance_to_front(self, losses: Float64[Tensor, "... 2"]) -> Float64[Tensor, "..."]:
        """To the front as a polyline, accurate to 1e-6."""
        return distance_to_curves(losses / self.units, [_curve()])

    @property
    def reference_point(self) -> Float64[Tensor, " 2"]:
        return torch.ones(2, dtype=torch.float64)

    @property
    def true_hypervolume(self) -> float:
        return 2 * math.exp(-2) * math.sqrt(math.pi / 2) * math.erf(math.sqrt(2)) + math.exp(-4)

    @property
    def plot_window(self) -> PlotWindow:
        plane = ((-2.0, 2.0), (-2.0, 2.0)) if self.size == 2 else None
        return PlotWindow(x=plane, losses=((-0.05, 1.05), (-0.05, 1.05)))

    def _jacobian(
        self, x: Float64[Tensor, "S N"], generator: torch.Generator | None
    ) -> tuple[Float64[Tensor, "S K"], Float64[Tensor, "S K N"]]:
        offset = self._offset(x)
        height = torch.exp(-offset.square().sum(-1))
        return 1 - height, 2 * height[..., None] * offset

    def _offset(self, x: Tensor) -> Tensor:
        centre = 1 / math.sqrt(self.size)
        return x[..., None, :] - x.new_tensor([[centre], [-centre]])


@lru_cache(maxsize=1)
def _curve() -> Tensor:
    line = Fonseca(size=1)
    return line.losses(line.pareto_set(CURVE)) / line.units
