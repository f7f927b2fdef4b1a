r"""Valley: the two objectives on which plain sums get stuck, from CAGrad and Nash-MTL.

.. math::

    f_k(x) = s_k \, (h_k c_1 + q_k c_2), \qquad c_1 = \max(\tanh(x_2 / 2), 0), \quad c_2 = \max(\tanh(-x_2 / 2), 0)

    h_1 = \log \max(|\tfrac12 (-x_1 - 7) - \tanh(-x_2)|, \ell) + 6, \qquad
    h_2 = \log \max(|\tfrac12 (-x_1 + 3) + \tanh(-x_2) + 2|, \ell) + 6

    q_k = \tfrac{1}{10} \bigl( (x_1 \mp 7)^2 + \tfrac{1}{10} (x_2 + 8)^2 \bigr) - 20, \qquad \ell = 5 \cdot 10^{-6}

Above :math:`x_2 = 0` lies a crease, below it a bowl per objective. At :math:`x_2 = 0` exactly, both cut-offs pass their
gradient on (as ``torch.clamp`` does and the published codes rely on): one of the starting points is (0, 0).

The Pareto set lies in the bowls, at :math:`x_1 = t \in [-7, 7]`. There both losses are
:math:`s_k (q_k + \ldots) \tanh(-x_2/2)`, and a weighted sum of the two is stationary in :math:`x_1` for the weights
:math:`\lambda_k \propto (7 \pm t)/14` on :math:`f_k / s_k`. With them, stationarity in :math:`x_2` reads

.. math::  -\tfrac12 \operatorname{sech}^2(\tfrac{x_2}{2}) \bigl(A + 0.01 (x_2 + 8)^2\bigr)
           + 0.02 (x_2 + 8) \tanh(-\tfrac{x_2}{2}) = 0, \qquad A = -15.1 - 0.1 t^2,

one root in (-9.5, -8), found by Newton's method to the last digit. The set does not depend on the scales. Pictures in
the literature draw it as a straight line, which is off by up to 0.08.

Shapes: S = starting points.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from mogb.problems._front import distance_to_curves
from mogb.problems.base import PlotWindow, Problem, Settings, uniform

FLOOR = 5e-6
FEW = 32  # up to this many points, plain floats are several times faster than tensors
CURVE = 2001  # vertices of the front for distances: accurate to 1e-6 of its range


@dataclass(frozen=True, kw_only=True)
class Valley(Problem, name="valley", variants={"valley_scaled": {"scales": (0.1, 1.0)}}):
    """Two objectives over the plane with a crease, two bowls and a curved Pareto set.

    Attributes:
        scales: The factors of the two losses: (1, 1) in CAGrad, (0.1, 1) in Nash-MTL.
    """

    reference: ClassVar = (
        "Liu et al., Conflict-Averse Gradient Descent, NeurIPS 2021; Navon et al., Nash-MTL, ICML 2022"
    )

    scales: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if len(self.scales) != 2 or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"scales must be two positive numbers, but got {self.scales}.")

    @property
    def num_objectives(self) -> int:
        return 2

    @property
    def dim(self) -> int:
        return 2

    @property
    def settings(self) -> Settings:
        """Adam with 1e-3 as everywhere; 50 000 steps as in FAMO and ConFIG (Nash-MTL: 35 000, CAGrad: 100 000)."""
        return Settings(optimizer="adam", lr=1e-3, steps=50_000, quick_steps=6_000, quick_lr=5e-3, tolerance=1e-2)

    def starts(self) -> Float64[Tensor, "S 2"]:
        """The five of Nash-MTL. CAGrad has three: the first and the third of these, and (-8.5, -5)."""
        points = [[-8.5, 7.5], [0.0, 0.0], [9.0, 9.0], [-7.5, -0.5], [9.0, -1.0]]
        return torch.tensor(points, dtype=torch.float64)

    def sample_starts(self, count: int, generator: torch.Generator) -> Float64[Tensor, "S 2"]:
        """Uniform in the square of half width 10 that the literature draws."""
        corner = torch.full((2,), 10.0, dtype=torch.float64)
        return uniform(count, -corner, corner, generator)

    def losses(self, x: Float64[Tensor, "... 2"], generator: torch.Generator | None = None) -> Float64[Tensor, "... 2"]:
        x1, x2 = x[..., 0], x[..., 1]
        bend = torch.tanh(-x2)
        crease_1 = torch.log((0.5 * (-x1 - 7) - bend).abs().clamp(min=FLOOR)) + 6
        crease_2 = torch.log((0.5 * (-x1 + 3) + bend + 2).abs().clamp(min=FLOOR)) + 6
        depth = 0.1 * (x2 + 8) ** 2
        bowl_1, bowl_2 = ((x1 - 7) ** 2 + depth) / 10 - 20, ((x1 + 7) ** 2 + depth) / 10 - 20
        above, below = torch.tanh(0.5 * x2).clamp(min=0), torch.tanh(-0.5 * x2).clamp(min=0)
        both = torch.stack([crease_1 * above + bowl_1 * below, crease_2 * above + bowl_2 * below], dim=-1)
        return both * x.new_tensor(self.scales)

    def pareto_set(self, count: int) -> Float64[Tensor, "M 2"]:
        first = torch.linspace(-7.0, 7.0, count, dtype=torch.float64)
        return torch.stack([first, _second_coordinate(first)], dim=-1)

    @property
    def units(self) -> Float64[Tensor, " 2"]:
        """The range of each loss over the front."""
        ends = self.losses(self.pareto_set(2))
        return (ends[0] - ends[1]).abs()

    def distance_to_front(self, losses: Float64[Tensor, "... 2"]) -> Float64[Tensor, "..."]:
        """To the front as a polyline, accurate to 1e-6."""
        return distance_to_curves(losses / losses.new_tensor(self.scales) / _unit_range(), [_unit_curve()])

    @property
    def reference_point(self) -> Float64[Tensor, " 2"]:
        """The origin: where both losses meet the crease, twenty units above the bowls."""
        return torch.zeros(2, dtype=torch.float64)

    @property
    def true_hypervolume(self) -> float:
        """By numerical integration over the Pareto set, to 1e-10 relative."""
        return math.prod(self.scales) * _unit_hypervolume()

    @property
    def plot_window(self) -> PlotWindow:
        limits = tuple((-22.0 * scale, 10.0 * scale) for scale in self.scales)
        return PlotWindow(x=((-11.0, 11.0), (-11.0, 11.0)), losses=limits)

    def _jacobian(
        self, x: Float64[Tensor, "S 2"], generator: torch.Generator | None
    ) -> tuple[Float64[Tensor, "S K"], Float64[Tensor, "S K 2"]]:
        if len(x) > FEW:
            return super()._jacobian(x, generator)
        flat = [number for point in x.tolist() for number in self._at(*point)]
        both = torch.tensor(flat, dtype=torch.float64).reshape(len(x), 2, 3)
        return both[..., 0], both[..., 1:]

    def _at(self, x1: float, x2: float) -> list[float]:
        """Each loss at one point followed by its gradient, by hand."""
        bend, half = math.tanh(-x2), math.tanh(0.5 * x2)
        above, below = max(half, 0.0), max(-half, 0.0)
        slope, depth = 0.5 * (1 - half * half), x2 + 8
        above_slope, below_slope = (slope if half >= 0 else 0.0), (-slope if half <= 0 else 0.0)
        numbers = []
        for scale, inside, sign, centre in (
            (self.scales[0], 0.5 * (-x1 - 7) - bend, -1.0, 7.0),
            (self.scales[1], 0.5 * (-x1 + 3) + bend + 2, 1.0, -7.0),
        ):
            steep = 1 / inside if abs(inside) >= FLOOR else 0.0
            crease = math.log(max(abs(inside), FLOOR)) + 6
            bowl = ((x1 - centre) ** 2 + 0.1 * depth * depth) / 10 - 20
            first = -0.5 * steep * above + 0.2 * (x1 - centre) * below
            second = sign * (bend * bend - 1) * steep * above + crease * above_slope
            second += 0.02 * depth * below + bowl * below_slope
            numbers += [scale * (crease * above + bowl * below), scale * first, scale * second]
        return numbers


def _second_coordinate(first: Tensor) -> Tensor:
    """The root in the module's formula, by Newton's method from the middle of its interval."""
    level = -15.1 - 0.1 * first**2
    root = torch.full_like(first, -8.4)
    for _ in range(20):
        shift, bend = root + 8, torch.tanh(-root / 2)
        slope = 1 - bend**2  # sech²
        value = -0.5 * slope * (level + 0.01 * shift**2) + 0.02 * shift * bend
        derivative = -0.5 * slope * bend * (level + 0.01 * shift**2) - 0.02 * slope * shift + 0.02 * bend
        root = root - value / derivative
    return root


@lru_cache(maxsize=1)
def _unit_range() -> float:
    ends = Valley().losses(Valley().pareto_set(2))
    return float(ends[0, 0] - ends[1, 0])


@lru_cache(maxsize=1)
def _unit_curve() -> Tensor:
    return Valley().losses(Valley().pareto_set(CURVE)) / _unit_range()


@lru_cache(maxsize=1)
def _unit_hypervolume() -> float:
    """Area between the front and the origin, for scales (1, 1): the trapezoidal rule with Richardson's step."""
    coarse, fine = _area(4_001), _area(8_001)
    return fine + (fine - coarse) / 3


def _area(count: int) -> float:
    f1, f2 = (-Valley().losses(Valley().pareto_set(count))).unbind(dim=-1)  # depths; f1 grows along the front
    return float(f1[0] * f2[0] + torch.trapezoid(f2, f1))
