r"""DTLZ1, DTLZ2 and DTLZ7: any number of objectives over a box.

The first m - 1 coordinates move along the front, the k others (5, 10 and 20 of them) towards it through a function g
that is 0 there (1 in DTLZ7).

.. math::

    \text{DTLZ1:}\quad & f_j = \tfrac12 (1 + g) \, \textstyle\prod_{i < m-j} x_i \, (1 - x_{m-j}), &
        g &= 100 \bigl(k + \textstyle\sum (x_i - \tfrac12)^2 - \cos 20 \pi (x_i - \tfrac12)\bigr) \\
    \text{DTLZ2:}\quad & f_j = (1 + g) \, \textstyle\prod_{i < m-j} \cos \tfrac{\pi x_i}{2} \,
        \sin \tfrac{\pi x_{m-j}}{2}, & g &= \textstyle\sum (x_i - \tfrac12)^2 \\
    \text{DTLZ7:}\quad & f_j = x_j, \quad f_m = (1 + g) m - \textstyle\sum_j f_j (1 + \sin 3 \pi f_j), &
        g &= 1 + 9 \bar x

(counting j from 0; the last factor is missing for j = 0.) Fronts: the simplex :math:`\sum f = 1/2`, the positive part
of the unit sphere, and :math:`2^{m-1}` separate patches. In DTLZ7 write :math:`\varphi(t) = t (1 + \sin 3 \pi t)`: a
point of the front has every :math:`f_j` where :math:`\varphi` exceeds all its values before, which are two intervals.

Shapes: S = starting points, m = K.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from mogb.problems._front import onto_simplex
from mogb.problems.base import PlotWindow, Problem, Settings, seeded, uniform

TAIL = {1: 5, 2: 10, 7: 20}  # k, the number of coordinates that lead to the front
REFERENCE = {1: 1.0, 2: 1.1}
SAMPLES = 10_000  # of the front of DTLZ7
NEWTON_STEPS = 12


@dataclass(frozen=True, kw_only=True)
class DTLZ(Problem, variants={f"dtlz{kind}": {"kind": kind} for kind in (1, 2, 7)}):
    """One of three problems of Deb, Thiele, Laumanns and Zitzler.

    Attributes:
        kind: Which of them.
        objectives: K, at least 2.
    """

    reference: ClassVar = "Deb, Thiele, Laumanns and Zitzler, Scalable test problems, 2005"

    kind: Literal[1, 2, 7]
    objectives: int = 3

    def __post_init__(self) -> None:
        if self.kind not in TAIL:
            raise ValueError(f"kind must be 1, 2 or 7, but got {self.kind}.")
        if self.objectives < 2:
            raise ValueError(f"objectives must be at least 2, but got {self.objectives}.")
        object.__setattr__(self, "name", f"dtlz{self.kind}")

    @property
    def num_objectives(self) -> int:
        return self.objectives

    @property
    def dim(self) -> int:
        return self.objectives - 1 + TAIL[self.kind]

    @property
    def settings(self) -> Settings:
        """Ours: the literature runs evolutionary algorithms, by the number of evaluations."""
        hard = "11^5 - 1 local fronts: descent stops at the one it starts above" if self.kind == 1 else ""
        return Settings(
            optimizer="adam", lr=5e-3, steps=1000, quick_steps=300, quick_lr=2e-2, tolerance=1e-2, hard=hard
        )

    def starts(self) -> Float64[Tensor, "S N"]:
        """Five draws with a fixed seed."""
        return self.sample_starts(5, seeded(0))

    def sample_starts(self, count: int, generator: torch.Generator) -> Float64[Tensor, "S N"]:
        """Uniform in the box."""
        return uniform(count, *self.box, generator)

    @property
    def box(self) -> tuple[Float64[Tensor, " N"], Float64[Tensor, " N"]]:
        return _box(self.dim)

    def losses(self, x: Float64[Tensor, "... N"], generator: torch.Generator | None = None) -> Float64[Tensor, "... K"]:
        head, tail = x[..., : self.objectives - 1], x[..., self.objectives - 1 :]
        height, _ = self._height(tail)
        if self.kind == 7:
            last = (1 + height) * self.objectives - _gain(head).sum(-1)
            return torch.cat([head, last[..., None]], dim=-1)
        factors, _ = self._factors(head)
        return (1 + height)[..., None] * factors.prod(-1) * (0.5 if self.kind == 1 else 1.0)

    def pareto_set(self, count: int) -> Float64[Tensor, "M N"]:
        """A regular grid over the first coordinates, of about ``count`` points."""
        side = max(2, round(count ** (1 / (self.objectives - 1))))
        axis = torch.linspace(0.0, 1.0, side, dtype=torch.float64)
        if self.kind == 7:
            (_, first), (second, third) = record_intervals()
            axis = axis * (first + third - second)
            axis = torch.where(axis <= first, axis, axis - first + second)
        head = torch.cartesian_prod(*[axis] * (self.objectives - 1)).reshape(-1, self.objectives - 1)
        tail = head.new_full((len(head), TAIL[self.kind]), 0.0 if self.kind == 7 else 0.5)
        return torch.cat([head, tail], dim=1)

    def pareto_front(self, count: int) -> Float64[Tensor, "M K"]:
        return self.losses(self.pareto_set(count))

    @property
    def units(self) -> Float64[Tensor, " K"]:
        """The range of each loss over the front."""
        if self.kind != 7:
            return torch.full((self.objectives,), 0.5 if self.kind == 1 else 1.0, dtype=torch.float64)
        top = record_intervals()[1][1]
        last = (self.objectives - 1) * float(_gain(torch.tensor(top, dtype=torch.float64)))
        return torch.tensor([top] * (self.objectives - 1) + [last], dtype=torch.float64)

    def distance_to_front(self, losses: Float64[Tensor, "... K"]) -> Float64[Tensor, "..."]:
        """In closed form for DTLZ1 (projection onto a simplex) and DTLZ2, by a search for DTLZ7.

        The search takes Newton steps from the nearest of many samples: to rounding near the front, to the spacing of
        the samples far away.
        """
        scaled = losses / self.units
        if self.kind == 1:
            return (scaled - onto_simplex(scaled)).norm(dim=-1)
        if self.kind == 2:
            kept = scaled.clamp(min=0.0)  # the nearest point of the positive orthant lies on the same ray
            inside = kept.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
            return (scaled - kept / inside).norm(dim=-1)
        return _distance_to_patches(self, losses)

    @property
    def reference_point(self) -> Float64[Tensor, " K"]:
        """(1, ..., 1), (1.1, ..., 1.1), and (1, ..., 1, 2 K) for DTLZ7."""
        if self.kind == 7:
            return torch.tensor([1.0] * (self.objectives - 1) + [2.0 * self.objectives], dtype=torch.float64)
        return torch.full((self.objectives,), REFERENCE[self.kind], dtype=torch.float64)

    @property
    def true_hypervolume(self) -> float:
        r"""In closed form.

        DTLZ1: :math:`1 - 1/(2^m m!)`, DTLZ2: :math:`1.1^m - \pi^{m/2} / (2^m \Gamma(m/2 + 1))`, and for DTLZ7, whose
        last loss is separable, m - 1 times the integral of the running maximum of :math:`\varphi` over [0, 1].
        """
        m = self.objectives
        if self.kind == 1:
            return 1 - 1 / (2**m * math.factorial(m))
        if self.kind == 2:
            return REFERENCE[2] ** m - math.pi ** (m / 2) / (2**m * math.gamma(m / 2 + 1))
        return (m - 1) * _record_integral()

    @property
    def plot_window(self) -> PlotWindow | None:
        if self.objectives > 3:
            return None
        top = {1: 1.0, 2: 1.8, 7: 1.0}[self.kind]
        last = (-0.05, 6.0 * self.objectives if self.kind == 7 else top)
        return PlotWindow(losses=((-0.05, top),) * (self.objectives - 1) + (last,))

    def _jacobian(
        self, x: Float64[Tensor, "S N"], generator: torch.Generator | None
    ) -> tuple[Float64[Tensor, "S K"], Float64[Tensor, "S K N"]]:
        m = self.objectives
        head, tail = x[:, : m - 1], x[:, m - 1 :]
        height, slope = self._height(tail)
        rows = x.new_zeros(len(x), m, x.shape[1])
        if self.kind == 7:
            last = (1 + height) * m - _gain(head).sum(-1)
            rows[:, range(m - 1), range(m - 1)] = 1.0
            rows[:, -1, : m - 1] = -_gain_slope(head)
            rows[:, -1, m - 1 :] = m * slope
            return torch.cat([head, last[:, None]], dim=1), rows
        factors, slopes = self._factors(head)
        size = (1 + height) * (0.5 if self.kind == 1 else 1.0)
        shape = factors.prod(-1)
        for i in range(m - 1):
            others = torch.cat([factors[..., :i], slopes[..., i : i + 1], factors[..., i + 1 :]], dim=-1)
            rows[:, :, i] = size[:, None] * others.prod(-1)
        rows[:, :, m - 1 :] = shape[..., None] * slope[:, None] * (0.5 if self.kind == 1 else 1.0)
        return size[:, None] * shape, rows

    def _height(self, tail: Tensor) -> tuple[Tensor, Tensor]:
        """g, and its slope in every one of its coordinates."""
        if self.kind == 7:
            return 1 + 9 * tail.mean(-1), tail.new_full((1, tail.shape[-1]), 9 / tail.shape[-1])
        offset = tail - 0.5
        if self.kind == 2:
            return offset.square().sum(-1), 2 * offset
        angle = 20 * math.pi * offset
        return 100 * (1 + offset.square() - torch.cos(angle)).sum(-1), 200 * (offset + 10 * math.pi * torch.sin(angle))

    def _factors(self, head: Tensor) -> tuple[Tensor, Tensor]:
        """For every objective the factor that each of the m - 1 coordinates contributes, and the slopes of these."""
        if self.kind == 1:
            before, last = (head, torch.ones_like(head)), (1 - head, -torch.ones_like(head))
        else:
            angle = 0.5 * math.pi * head
            cosine, sine = torch.cos(angle), torch.sin(angle)
            before, last = (cosine, -0.5 * math.pi * sine), (sine, 0.5 * math.pi * cosine)
        earlier, own = _masks(self.objectives)
        factors = torch.where(earlier, before[0][..., None, :], torch.where(own, last[0][..., None, :], 1.0))
        slopes = torch.where(earlier, before[1][..., None, :], torch.where(own, last[1][..., None, :], 0.0))
        return factors, slopes


@lru_cache(maxsize=16)
def _box(dim: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(dim, dtype=torch.float64), torch.ones(dim, dtype=torch.float64)


@lru_cache(maxsize=16)
def _masks(objectives: int) -> tuple[Tensor, Tensor]:
    """Which coordinates come before the last one of objective j, and which one is its last: ``[m, m - 1]`` each."""
    coordinate, last = torch.arange(objectives - 1), objectives - 1 - torch.arange(objectives)[:, None]
    return coordinate < last, coordinate == last


def _gain(t: Tensor) -> Tensor:
    return t * (1 + torch.sin(3 * math.pi * t))


def _gain_slope(t: Tensor) -> Tensor:
    angle = 3 * math.pi * t
    return 1 + torch.sin(angle) + angle * torch.cos(angle)


@lru_cache(maxsize=1)
def record_intervals() -> tuple[tuple[float, float], tuple[float, float]]:
    r"""The two intervals of [0, 1] on which :math:`\varphi` exceeds all its values before, to the last digit."""

    def gain(t: float) -> float:
        return t * (1 + math.sin(3 * math.pi * t))

    def slope(t: float) -> float:
        return 1 + math.sin(3 * math.pi * t) + 3 * math.pi * t * math.cos(3 * math.pi * t)

    first, third = _bisect(slope, 0.2, 0.3), _bisect(slope, 0.8, 0.9)
    return (0.0, first), (_bisect(lambda t: gain(first) - gain(t), 0.55, 0.8), third)


def _bisect(function: Callable[[float], float], begin: float, end: float) -> float:
    """A root of a function that falls from positive to negative."""
    for _ in range(80):
        middle = 0.5 * (begin + end)
        begin, end = (middle, end) if function(middle) > 0 else (begin, middle)
    return 0.5 * (begin + end)


@lru_cache(maxsize=1)
def _record_integral() -> float:
    r"""Integral over [0, 1] of the running maximum of :math:`\varphi`."""

    def antiderivative(t: float) -> float:
        angle = 3 * math.pi * t
        return t**2 / 2 + (math.sin(angle) - angle * math.cos(angle)) / (3 * math.pi) ** 2

    def gain(t: float) -> float:
        return t * (1 + math.sin(3 * math.pi * t))

    (_, first), (second, third) = record_intervals()
    rising = antiderivative(first) + antiderivative(third) - antiderivative(second)
    return rising + (second - first) * gain(first) + (1 - third) * gain(third)


@lru_cache(maxsize=8)
def _samples(problem: DTLZ) -> Tensor:
    return problem.pareto_front(SAMPLES) / problem.units


def _distance_to_patches(problem: DTLZ, losses: Tensor) -> Tensor:
    """Distance to the front of DTLZ7, in units.

    A point of the front is given by its first m - 1 losses t, each in one of two intervals. From the nearest sample,
    Gauss-Newton steps shorten the difference; coordinates that a step would take out of their interval stay behind.
    """
    units, samples = problem.units, _samples(problem)
    target = (losses / units).reshape(-1, problem.objectives)
    nearest = torch.cat([torch.cdist(part, samples).argmin(1) for part in target.detach().split(256)])
    nearest_losses = samples[nearest]
    t = nearest_losses[:, :-1] * units[:-1]
    (low, first), (second, third) = record_intervals()
    lower = torch.where(t <= first, low, second)
    upper = torch.where(t <= first, first, third)
    best = (target - nearest_losses).norm(dim=1)
    for _ in range(NEWTON_STEPS):
        last = (2 * problem.objectives - _gain(t).sum(1)) / units[-1]
        gap = torch.cat([t / units[:-1], last[:, None]], dim=1) - target
        best = torch.minimum(best, gap.norm(dim=1))
        slope = _gain_slope(t) / units[-1]
        gradient = gap[:, :-1] / units[:-1] - slope * gap[:, -1:]
        free = ~(((t <= lower) & (gradient > 0)) | ((t >= upper) & (gradient < 0)))
        # (D + s sᵀ) step = gradient on the free coordinates, D = 1 / units², by Sherman and Morrison.
        scaled, along = gradient * units[:-1] ** 2 * free, slope * units[:-1] ** 2 * free
        correction = (slope * scaled).sum(1, keepdim=True) / (1 + (slope * along).sum(1, keepdim=True))
        t = torch.clamp(t - (scaled - along * correction), lower, upper)
    return best.reshape(losses.shape[:-1])
