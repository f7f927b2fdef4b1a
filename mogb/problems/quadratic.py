r"""Two quadratics: the element-wise, convex and scaled pairs of TorchJD's trajectories.

.. math::  f_i(x) = s_i \, (x - u_i)^\top A_i (x - u_i), \qquad i = 1, 2

=========================  ==========================================================================================
name                       what is hard about it
=========================  ==========================================================================================
``quadratic_elementwise``  :math:`A_1 = e_1 e_1^\top, A_2 = e_2 e_2^\top, u = 0`: the losses agree at 0, the only Pareto
                           point. On each axis one gradient vanishes, so the point is stationary (weakly Pareto) and
                           a min-norm step stays there.
``quadratic_convex``       different, ill-conditioned curvatures: a strongly bent Pareto set.
``quadratic_scaled``       one curvature, scales 1 and 10: the Pareto set is the segment between the centres.
=========================  ==========================================================================================

A weighted sum with weights :math:`(1 - t, t)` has its minimum at
:math:`x(t) = (\sum_i w_i s_i A_i)^{-1} \sum_i w_i s_i A_i u_i`, and for convex losses these are all Pareto points. The
published runs multiply the learning rate by a factor of the method (2 for MGDA, 4 for Aligned-MTL, ...); here every
method has the same one.

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

CURVE = 4001

Pair = tuple[float, float]
Matrix = tuple[Pair, Pair]

CONVEX = {
    "matrices": (((1.0, 0.2), (0.2, 0.05)), ((3.0, -0.6), (-0.6, 0.2))),
    "centres": ((1.0, 0.0), (-1.0, 0.0)),
    "initial": ((0.5, 0.5), (-0.3, 7.0), (0.0, 0.0)),
    "reference_losses": (4.0, 12.0),
    "lr": 0.125,
    "steps": 200,
}
SCALED = {
    "matrices": (((2.0, -1.0), (-1.0, 2.0)), ((2.0, -1.0), (-1.0, 2.0))),
    "centres": ((1.0, 0.0), (-10.0, 0.0)),
    "scales": (1.0, 10.0),
    "initial": ((-6.0, 4.0), (-3.0, -1.5), (1.5, 2.0), (2.5, 5.5)),
    "reference_losses": (242.0, 2420.0),
    "lr": 0.005,
    "steps": 100,
}


@dataclass(frozen=True, kw_only=True)
class QuadraticPair(
    Problem, name="quadratic_elementwise", variants={"quadratic_convex": CONVEX, "quadratic_scaled": SCALED}
):
    """Two convex quadratics over the plane; the element-wise pair unless told otherwise.

    Attributes:
        matrices: Curvatures, symmetric and positive semidefinite, with a definite sum.
        centres: Where each loss is 0.
        scales: The factors of the losses.
        initial: Starting points.
        reference_losses: Where the hypervolume is measured from; at least the largest losses on the front.
        lr: Learning rate of plain gradient descent.
        steps: Its number of steps.
    """

    reference: ClassVar = "Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024 (TorchJD)"

    matrices: tuple[Matrix, Matrix] = (((1.0, 0.0), (0.0, 0.0)), ((0.0, 0.0), (0.0, 1.0)))
    centres: tuple[Pair, Pair] = ((0.0, 0.0), (0.0, 0.0))
    scales: Pair = (1.0, 1.0)
    initial: tuple[Pair, ...] = ((3.0, -2.0), (0.0, -3.0), (-4.0, 4.0), (-3.0, 4.0), (-3.5, -0.75))
    reference_losses: Pair = (16.0, 16.0)
    lr: float = 0.075
    steps: int = 50

    def __post_init__(self) -> None:
        forms = torch.tensor(self.matrices, dtype=torch.float64)
        if not forms.equal(forms.mT) or not bool((torch.linalg.eigvalsh(forms) > -1e-12).all()):
            raise ValueError(f"matrices must be symmetric and positive semidefinite, but got {self.matrices}.")
        if float(torch.linalg.eigvalsh(forms.sum(0))[0]) <= 1e-9:
            raise ValueError(f"matrices must have a positive definite sum, but got {self.matrices}.")
        if not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"scales must be two positive numbers, but got {self.scales}.")

    @property
    def num_objectives(self) -> int:
        return 2

    @property
    def dim(self) -> int:
        return 2

    @property
    def settings(self) -> Settings:
        return Settings(
            optimizer="sgd", lr=self.lr, steps=self.steps, quick_steps=self.steps, quick_lr=self.lr, tolerance=1e-2
        )

    def starts(self) -> Float64[Tensor, "S 2"]:
        return torch.tensor(self.initial, dtype=torch.float64)

    def sample_starts(self, count: int, generator: torch.Generator) -> Float64[Tensor, "S 2"]:
        """Uniform in the smallest rectangle that holds the published starting points."""
        points = self.starts()
        return uniform(count, points.amin(0), points.amax(0), generator)

    def losses(self, x: Float64[Tensor, "... 2"], generator: torch.Generator | None = None) -> Float64[Tensor, "... 2"]:
        forms, centres, _ = _parts(self)
        offset = x[..., None, :] - centres
        return (offset * (forms @ offset[..., None])[..., 0]).sum(-1)

    def pareto_set(self, count: int) -> Float64[Tensor, "M 2"]:
        forms, _, pulls = _parts(self)
        if not bool((pulls[0] != 0).any() or (pulls[1] != 0).any()):
            return torch.zeros(1, 2, dtype=torch.float64)
        # Weights that crowd at the ends, where the losses change fastest with them.
        second = torch.sin(torch.linspace(0.0, math.pi / 2, count, dtype=torch.float64)) ** 2
        weights = torch.stack([1 - second, second], dim=-1)
        return torch.linalg.solve(torch.tensordot(weights, forms, 1), weights @ pulls)

    def pareto_front(self, count: int) -> Float64[Tensor, "M 2"]:
        return self.losses(self.pareto_set(count))

    @property
    def units(self) -> Float64[Tensor, " 2"]:
        """The range of each loss over the front; 1 where the front is a point."""
        ends = self.pareto_front(2)
        return (ends[0] - ends[-1]).abs() if len(ends) > 1 else torch.ones(2, dtype=torch.float64)

    def distance_to_front(self, losses: Float64[Tensor, "... 2"]) -> Float64[Tensor, "..."]:
        """To the front as a polyline, accurate to 1e-6."""
        units, curve = _curve(self)
        return distance_to_curves(losses / units, [curve])

    @property
    def reference_point(self) -> Float64[Tensor, " 2"]:
        return torch.tensor(self.reference_losses, dtype=torch.float64)

    @property
    def true_hypervolume(self) -> float:
        """By numerical integration over the Pareto set, to 1e-8 relative."""
        return _hypervolume(self)

    @property
    def plot_window(self) -> PlotWindow:
        both = torch.cat([self.starts(), self.pareto_set(50)])
        low, high = both.amin(0), both.amax(0)
        margin = 0.15 * (high - low)
        sides = torch.stack([low - margin, high + margin], dim=1).tolist()
        top = (1.1 * torch.cat([self.losses(self.starts()), self.pareto_front(50)]).amax(0)).tolist()
        return PlotWindow(
            x=((sides[0][0], sides[0][1]), (sides[1][0], sides[1][1])),
            losses=((-0.05 * top[0], top[0]), (-0.05 * top[1], top[1])),
        )

    def _jacobian(
        self, x: Float64[Tensor, "S 2"], generator: torch.Generator | None
    ) -> tuple[Float64[Tensor, "S K"], Float64[Tensor, "S K 2"]]:
        forms, centres, _ = _parts(self)
        offset = x[:, None] - centres
        half = (forms @ offset[..., None])[..., 0]
        return (offset * half).sum(-1), 2 * half


@lru_cache(maxsize=16)
def _parts(problem: QuadraticPair) -> tuple[Tensor, Tensor, Tensor]:
    """The scaled matrices, the centres, and the matrices times the centres."""
    scales = torch.tensor(problem.scales, dtype=torch.float64)[:, None, None]
    forms = scales * torch.tensor(problem.matrices, dtype=torch.float64)
    centres = torch.tensor(problem.centres, dtype=torch.float64)
    return forms, centres, (forms @ centres[..., None])[..., 0]


@lru_cache(maxsize=16)
def _curve(problem: QuadraticPair) -> tuple[Tensor, Tensor]:
    return problem.units, problem.pareto_front(CURVE) / problem.units


@lru_cache(maxsize=16)
def _hypervolume(problem: QuadraticPair) -> float:
    """Area between the front and the reference point: the trapezoidal rule with Richardson's step."""
    coarse, fine = (_area(problem, count) for count in (20_001, 40_001))
    return fine + (fine - coarse) / 3


def _area(problem: QuadraticPair, count: int) -> float:
    f1, f2 = (problem.reference_point - problem.pareto_front(count)).unbind(dim=-1)  # f1 falls along the front
    return float(f1[-1] * f2[-1] + torch.trapezoid(f2, -f1))
