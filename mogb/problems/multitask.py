r"""Multitask: a small network with K regression heads whose losses differ in scale by four orders of magnitude.

.. math::  f_k(x) = \frac{s_k}{B} \sum_{b=1}^B \bigl( v_k \cdot \tanh(W a_b + c) + d_k - y_{kb} \bigr)^2,
           \qquad s_k = 1, \ldots, 10^4

x holds W, c, the heads v_k and their offsets d_k, flattened. The trunk (W, c) is shared, so the heads compete for it.
Every step sees all B inputs.

What is true: the targets y come from a teacher, a narrower network of the same kind, standardized to variance 1. The
teacher fits inside the student, so loss 0 can be reached in every task at once and the front is the single point 0.
It is not claimed that descent finds it: the losses are not convex, and fits other than the teacher's reach 0 as well.

Shapes: S = starting points, B = inputs, H = hidden units, I = inputs' coordinates.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from mogb.problems.base import PlotWindow, Problem, Settings, seeded


@dataclass(frozen=True, kw_only=True)
class Multitask(Problem, name="multitask"):
    """K regressions on one hidden layer.

    Attributes:
        objectives: K, the number of heads.
        spread: The largest scale over the smallest.
        inputs: I.
        hidden: H.
        teacher: Hidden units of the teacher, at most ``hidden``.
        samples: B.
        seed: Of the data, the teacher and the starting points.
    """

    reference: ClassVar = "ours; scales as in Chen et al., GradNorm, ICML 2018"

    objectives: int = 5
    spread: float = 1e4
    inputs: int = 8
    hidden: int = 16
    teacher: int = 4
    samples: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for option in ("objectives", "inputs", "hidden", "teacher"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} must be at least 1, but got {getattr(self, option)}.")
        if self.samples < 2:
            raise ValueError(f"samples must be at least 2, but got {self.samples}.")
        if self.teacher > self.hidden:
            raise ValueError(f"teacher must be at most hidden={self.hidden}, to fit inside, but got {self.teacher}.")
        if not 1 <= self.spread < math.inf:
            raise ValueError(f"spread must be a finite number of at least 1, but got {self.spread}.")

    @property
    def num_objectives(self) -> int:
        return self.objectives

    @property
    def dim(self) -> int:
        return sum(math.prod(shape) for shape in self._shapes)

    @property
    def settings(self) -> Settings:
        return Settings(optimizer="adam", lr=5e-3, steps=2000, quick_steps=400, quick_lr=1e-2, tolerance=5e-2)

    def starts(self) -> Float64[Tensor, "S N"]:
        """Three initializations with a fixed seed."""
        return self.sample_starts(3, seeded(self.seed + 1))

    def sample_starts(self, count: int, generator: torch.Generator) -> Float64[Tensor, "S N"]:
        """Initializations as ``torch.nn.Linear`` makes them: uniform within one over the root of the fan-in."""
        bounds = [self.inputs, self.inputs, self.hidden, self.hidden]
        draws = [
            (2 * torch.rand(count, math.prod(shape), generator=generator, dtype=torch.float64) - 1) / math.sqrt(bound)
            for shape, bound in zip(self._shapes, bounds, strict=True)
        ]
        return torch.cat(draws, dim=1)

    def losses(self, x: Float64[Tensor, "... N"], generator: torch.Generator | None = None) -> Float64[Tensor, "... K"]:
        inputs, targets, scales = _data(self)
        trunk, bias, heads, offsets = self._split(x)
        return scales * (self._hidden(inputs, trunk, bias) @ heads.mT + offsets[..., None, :] - targets).square().mean(
            -2
        )

    def pareto_set(self, count: int) -> Float64[Tensor, "1 N"]:
        """One of many optimal points: the teacher, with its missing hidden units switched off."""
        return _teacher(self)[None]

    def pareto_front(self, count: int) -> Float64[Tensor, "1 K"]:
        """The point 0."""
        return torch.zeros(1, self.objectives, dtype=torch.float64)

    @property
    def units(self) -> Float64[Tensor, " K"]:
        """The losses of the best constant prediction, s_k: a loss of one unit explains nothing."""
        return _scales(self)

    def distance_to_front(self, losses: Float64[Tensor, "... K"]) -> Float64[Tensor, "..."]:
        """The norm of the unexplained shares of variance, exact."""
        return (losses / self.units).norm(dim=-1)

    @property
    def reference_point(self) -> Float64[Tensor, " K"]:
        """The losses of the best constant prediction."""
        return self.units

    @property
    def true_hypervolume(self) -> float:
        """The whole box, since its corner 0 can be reached."""
        return float(self.units.prod())

    @property
    def plot_window(self) -> PlotWindow | None:
        if self.objectives < 2:
            return None
        return PlotWindow(losses=tuple((1e-4 * unit, 2 * unit) for unit in self.units.tolist()[:2]), log=True)

    def _jacobian(
        self, x: Float64[Tensor, "S N"], generator: torch.Generator | None
    ) -> tuple[Float64[Tensor, "S K"], Float64[Tensor, "S K N"]]:
        inputs, targets, scales = _data(self)
        trunk, bias, heads, offsets = self._split(x)
        hidden = self._hidden(inputs, trunk, bias)  # [S, B, H]
        error = hidden @ heads.mT + offsets[:, None] - targets  # [S, B, K]
        pull = (2 / self.samples) * scales * error
        back = pull.mT[..., None] * (1 - hidden.square())[:, None] * heads[:, :, None]  # [S, K, B, H]
        own = torch.eye(self.objectives, dtype=torch.float64)  # a loss touches its own head alone
        blocks = [
            (back.mT @ inputs).flatten(2),
            back.sum(2),
            (own[:, :, None] * (pull.mT @ hidden)[:, :, None]).flatten(2),
            own * pull.sum(1)[:, :, None],
        ]
        return scales * error.square().mean(1), torch.cat(blocks, dim=2)

    @property
    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the trunk, its bias, the heads and their offsets."""
        return (self.hidden, self.inputs), (self.hidden,), (self.objectives, self.hidden), (self.objectives,)

    def _split(self, x: Tensor) -> list[Tensor]:
        parts = x.split([math.prod(shape) for shape in self._shapes], dim=-1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self._shapes, strict=True)]

    @staticmethod
    def _hidden(inputs: Tensor, trunk: Tensor, bias: Tensor) -> Tensor:
        return torch.tanh(inputs @ trunk.mT + bias[..., None, :])


def _scales(problem: Multitask) -> Tensor:
    return torch.logspace(0.0, math.log10(problem.spread), problem.objectives, dtype=torch.float64)


@lru_cache(maxsize=8)
def _world(problem: Multitask) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets, and the teacher's parameters in the student's coordinates."""
    generator = seeded(problem.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = draw(problem.samples, problem.inputs)
    trunk = draw(problem.teacher, problem.inputs) / math.sqrt(problem.inputs) * 1.5
    bias = 0.5 * draw(problem.teacher)
    heads = draw(problem.objectives, problem.teacher)
    outputs = torch.tanh(inputs @ trunk.mT + bias) @ heads.mT
    spread, mean = outputs.std(0, correction=0), outputs.mean(0)
    missing = problem.hidden - problem.teacher
    pieces = [
        torch.nn.functional.pad(trunk, (0, 0, 0, missing)),
        torch.nn.functional.pad(bias, (0, missing)),
        torch.nn.functional.pad(heads / spread[:, None], (0, missing)),
        -mean / spread,
    ]
    return inputs, (outputs - mean) / spread, torch.cat([piece.reshape(-1) for piece in pieces])


@lru_cache(maxsize=8)
def _data(problem: Multitask) -> tuple[Tensor, Tensor, Tensor]:
    inputs, targets, _ = _world(problem)
    return inputs, targets, _scales(problem)


def _teacher(problem: Multitask) -> Tensor:
    return _world(problem)[2].clone()
