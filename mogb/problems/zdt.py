r"""ZDT1-4 and ZDT6: two objectives over a box, one coordinate along the front and n - 1 towards it.

.. math::  f_1 = f_1(x_1), \qquad f_2 = g \cdot h(f_1, g), \qquad g = g(x_2, \ldots, x_n) \ge 1

=====  ==================================  ==================================  ====================================
name   f_1                                 g                                   h
=====  ==================================  ==================================  ====================================
zdt1   :math:`x_1`                         :math:`1 + 9 \bar x`                :math:`1 - \sqrt{f_1/g}`
zdt2   :math:`x_1`                         :math:`1 + 9 \bar x`                :math:`1 - (f_1/g)^2`
zdt3   :math:`x_1`                         :math:`1 + 9 \bar x`                that, :math:`- (f_1/g) \sin 10 \pi f_1`
zdt4   :math:`x_1`                         Rastrigin's, up to 21^9 minima      as zdt1
zdt6   :math:`1-e^{-4x_1}\sin^6 6\pi x_1`  :math:`1 + 9 \bar x^{1/4}`          as zdt2
=====  ==================================  ==================================  ====================================

with :math:`\bar x` the mean of x_2, ..., x_n. x lies in [0, 1]^n, except that x_2, ... lie in [-5, 5] in ZDT4, where
:math:`g = 1 + 10(n-1) + \sum_i (x_i^2 - 10 \cos 4 \pi x_i)`. The Pareto set has x_2 = ... = 0, so g = 1.

Slopes. The roots in ZDT1, 3, 4 (at f_1 = 0) and ZDT6 (at x_2 = ... = 0, the whole Pareto set) have infinite slopes,
which no optimizer survives. Values are exact; slopes of the roots are taken at 1e-4 where their argument is smaller.

Shapes: S = starting points.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from mogb.problems._front import distance_to_curves
from mogb.problems.base import PlotWindow, Problem, Settings, seeded, uniform

STEEPEST = 1e-4  # slopes of roots are taken no closer to 0
CURVE = 2001  # vertices per piece of the front

# The pieces of ZDT3's front, as intervals of f_1: each begins where f_2 falls below all before, and ends at a minimum.
ZDT3_PIECES = (
    (0.0, 0.0830015349),
    (0.1822287280, 0.2577623634),
    (0.4093136748, 0.4538821041),
    (0.6183967944, 0.6525117038),
    (0.8233317983, 0.8518328654),
)
# The smallest f_1 of ZDT6, where tan(6 pi x_1) = 9 pi.
ZDT6_FIRST = math.atan(9 * math.pi) / (6 * math.pi)
ZDT6_LOWEST = 1 - math.exp(-4 * ZDT6_FIRST) * math.sin(6 * math.pi * ZDT6_FIRST) ** 6


@dataclass(frozen=True, kw_only=True)
class ZDT(Problem, variants={f"zdt{kind}": {"kind": kind} for kind in (1, 2, 3, 4, 6)}):
    """One of the five continuous problems of Zitzler, Deb and Thiele.

    Attributes:
        kind: Which of them.
        size: N; None means 30, and 10 for ZDT4 and ZDT6, as published.
    """

    reference: ClassVar = "Zitzler, Deb and Thiele, Comparison of multiobjective evolutionary algorithms, 2000"

    kind: Literal[1, 2, 3, 4, 6]
    size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in (1, 2, 3, 4, 6):
            raise ValueError(f"kind must be 1, 2, 3, 4 or 6, but got {self.kind}.")
        if self.size is not None and self.size < 2:
            raise ValueError(f"size must be at least 2, but got {self.size}.")
        object.__setattr__(self, "name", f"zdt{self.kind}")

    @property
    def num_objectives(self) -> int:
        return 2

    @property
    def dim(self) -> int:
        return self.size if self.size is not None else 10 if self.kind in (4, 6) else 30

    @property
    def settings(self) -> Settings:
        """Ours: the literature runs evolutionary algorithms, by the number of evaluations."""
        hard = {
            4: "about 21^(n-1) local fronts: descent stops at the one it starts above",
            6: "f_1 is multimodal and flat near 0, and g has an infinite slope on the Pareto set",
        }
        return Settings(
            optimizer="adam",
            lr=5e-3,
            steps=2000,
            quick_steps=500,
            quick_lr=2e-2,
            tolerance=1e-2,
            hard=hard.get(self.kind, ""),
        )

    def starts(self) -> Float64[Tensor, "S N"]:
        """Five draws with a fixed seed."""
        return self.sample_starts(5, seeded(0))

    def sample_starts(self, count: int, generator: torch.Generator) -> Float64[Tensor, "S N"]:
        """Uniform in the box."""
        return uniform(count, *self.box, generator)

    @property
    def box(self) -> tuple[Float64[Tensor, " N"], Float64[Tensor, " N"]]:
        return _box(self)

    def losses(self, x: Float64[Tensor, "... N"], generator: torch.Generator | None = None) -> Float64[Tensor, "... 2"]:
        first, height = self._first(x[..., 0]), self._height(x[..., 1:])
        if self.kind in (2, 6):
            second = height - first**2 / height
        else:
            second = height - _root(first, 0.5) * height.sqrt()
            if self.kind == 3:
                second = second - first * torch.sin(10 * math.pi * first)
        return torch.stack([first, second], dim=-1)

    def pareto_set(self, count: int) -> Float64[Tensor, "M N"]:
        points = torch.zeros(count, self.dim, dtype=torch.float64)
        along = torch.linspace(0.0, 1.0, count, dtype=torch.float64)
        if self.kind == 3:
            lengths = torch.tensor([end - begin for begin, end in ZDT3_PIECES], dtype=torch.float64)
            ends = lengths.cumsum(0)
            piece = torch.searchsorted(ends, along * ends[-1]).clamp(max=len(lengths) - 1)
            begins = torch.tensor([begin for begin, _ in ZDT3_PIECES], dtype=torch.float64)
            along = begins[piece] + (along * ends[-1] - (ends - lengths)[piece])
        elif self.kind == 6:
            along = ZDT6_FIRST * along  # f_1 falls from 1 to its minimum
        elif self.kind != 2:
            along = along**2  # even spacing along the root
        points[:, 0] = along
        return points

    def pareto_front(self, count: int) -> Float64[Tensor, "M 2"]:
        return self.losses(self.pareto_set(count))

    @property
    def units(self) -> Float64[Tensor, " 2"]:
        """The range of each loss over the front."""
        return _units(self.kind)

    def distance_to_front(self, losses: Float64[Tensor, "... 2"]) -> Float64[Tensor, "..."]:
        """To the front as polylines, accurate to 1e-6."""
        return distance_to_curves(losses / self.units, _curves(self.kind))

    @property
    def reference_point(self) -> Float64[Tensor, " 2"]:
        return torch.full((2,), 1.1, dtype=torch.float64)

    @property
    def true_hypervolume(self) -> float:
        """In closed form: the area under the front is an elementary integral."""
        return _hypervolume(self.kind, 1.1)

    @property
    def plot_window(self) -> PlotWindow:
        return PlotWindow(losses=((-0.05, 1.05), (-1.0 if self.kind == 3 else -0.1, 6.0)))

    def _jacobian(
        self, x: Float64[Tensor, "S N"], generator: torch.Generator | None
    ) -> tuple[Float64[Tensor, "S K"], Float64[Tensor, "S K N"]]:
        head, tail = x[:, 0], x[:, 1:]
        first, height = self._first(head), self._height(tail)
        if self.kind in (2, 6):
            ratio = first / height
            second, by_first, by_height = height - first * ratio, -2 * ratio, 1 + ratio * ratio
        else:
            root, wide = first.sqrt(), height.sqrt()
            second, by_height = height - root * wide, 1 - 0.5 * root / wide
            by_first = -0.5 * wide / first.clamp(min=STEEPEST).sqrt()
            if self.kind == 3:
                angle = 10 * math.pi * first
                sine = torch.sin(angle)
                second, by_first = second - first * sine, by_first - sine - angle * torch.cos(angle)
        rows = x.new_zeros(len(x), 2, x.shape[1])
        slope = self._first_slope(head)
        rows[:, 0, 0] = slope
        rows[:, 1, 0] = by_first * slope
        rows[:, 1, 1:] = by_height[:, None] * self._height_slope(tail)
        return torch.stack([first, second], dim=1), rows

    def _first(self, head: Tensor) -> Tensor:
        if self.kind == 6:
            return 1 - torch.exp(-4 * head) * torch.sin(6 * math.pi * head) ** 6
        return head

    def _first_slope(self, head: Tensor) -> Tensor:
        if self.kind == 6:
            angle = 6 * math.pi * head
            sine = torch.sin(angle)
            return torch.exp(-4 * head) * sine**5 * (4 * sine - 36 * math.pi * torch.cos(angle))
        return torch.ones_like(head)

    def _height(self, tail: Tensor) -> Tensor:
        if self.kind == 4:
            return 1 + (10 + tail**2 - 10 * torch.cos(4 * math.pi * tail)).sum(-1)
        mean = tail.mean(-1)
        return 1 + 9 * (_root(mean, 0.25) if self.kind == 6 else mean)

    def _height_slope(self, tail: Tensor) -> Tensor:
        if self.kind == 4:
            return 2 * tail + 40 * math.pi * torch.sin(4 * math.pi * tail)
        share = 9 / tail.shape[1]
        if self.kind == 6:
            return 0.25 * share * tail.mean(-1, keepdim=True).clamp(min=STEEPEST) ** -0.75
        return tail.new_full((1, 1), share)


def _root(value: Tensor, power: float) -> Tensor:
    """A root with its exact value and a slope that is bounded near 0."""
    plain = value.detach()
    return plain.clamp(min=0.0) ** power + power * plain.clamp(min=STEEPEST) ** (power - 1) * (value - plain)


@lru_cache(maxsize=16)
def _box(problem: ZDT) -> tuple[Tensor, Tensor]:
    lower, upper = torch.zeros(problem.dim, dtype=torch.float64), torch.ones(problem.dim, dtype=torch.float64)
    if problem.kind == 4:
        lower[1:], upper[1:] = -5.0, 5.0
    return lower, upper


def _second(kind: int) -> Callable[[Tensor], Tensor]:
    """The front as a function of f_1."""
    if kind in (2, 6):
        return lambda first: 1 - first**2
    if kind == 3:
        return lambda first: 1 - first.sqrt() - first * torch.sin(10 * math.pi * first)
    return lambda first: 1 - first.sqrt()


def _pieces(kind: int) -> tuple[tuple[float, float], ...]:
    return ZDT3_PIECES if kind == 3 else ((ZDT6_LOWEST, 1.0),) if kind == 6 else ((0.0, 1.0),)


@lru_cache(maxsize=8)
def _units(kind: int) -> Tensor:
    pieces = _pieces(kind)
    first = torch.tensor([pieces[0][0], pieces[-1][1]], dtype=torch.float64)
    second = _second(kind)(first)
    return torch.stack([first[1] - first[0], second[0] - second[1]])


@lru_cache(maxsize=8)
def _curves(kind: int) -> tuple[Tensor, ...]:
    along = torch.linspace(0.0, 1.0, CURVE, dtype=torch.float64)
    curves = []
    for begin, end in _pieces(kind):
        first = (math.sqrt(begin) + (math.sqrt(end) - math.sqrt(begin)) * along) ** 2
        curves.append(torch.stack([first, _second(kind)(first)], dim=-1) / _units(kind))
    return tuple(curves)


def _hypervolume(kind: int, corner: float) -> float:
    """Area between the front and (corner, corner): pieces, the steps between them, and the strip beyond the last."""
    area, pieces = 0.0, _pieces(kind)
    following = [begin for begin, _ in pieces[1:]] + [corner]
    for (begin, end), until in zip(pieces, following, strict=True):
        lowest = float(_second(kind)(torch.tensor(end, dtype=torch.float64)))
        area += corner * (end - begin) - (_integral(kind, end) - _integral(kind, begin))
        area += (corner - lowest) * (until - end)
    return area


def _integral(kind: int, first: float) -> float:
    """Antiderivative of the front as a function of f_1."""
    if kind in (2, 6):
        return first - first**3 / 3
    value = first - 2 / 3 * first**1.5
    if kind == 3:
        angle = 10 * math.pi * first
        value -= (math.sin(angle) - angle * math.cos(angle)) / (10 * math.pi) ** 2
    return value
