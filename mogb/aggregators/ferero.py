r"""FERERO: descent in the order of a cone, on the way to a preference ray.

Let p be the ray that the losses should end on and B a basis of its complement, so that :math:`H = B L` is zero on the
ray; let C be the rows of a cone. The direction is

.. math::  d = J^\top w , \quad w = C^\top \lambda_f + B^\top \lambda_h , \qquad
           \min_{\lambda_f \in S, \; \lambda_h} \tfrac12 \|d\|^2 - c \, \lambda_h^\top H ,

S the simplex; :math:`\lambda_h` is free and makes :math:`(B J) d = c H`, so that every step takes the same share of the
distance to the ray. (The paper's subproblem in its dual form, as in the official code.)

**Exactly**: with :math:`q_k = g_k / p_k`, the span A of all :math:`q_k - q_m` holds the part of d that is fixed, namely
the shortest v with :math:`(q_k - q_m) \cdot v = c (L_k / p_k - L_m / p_m)`. Outside of A all :math:`q_k` are the same
vector r, which leaves

.. math::  \min_{\lambda_f \in S} \tfrac12 \|r\|^2 (p^\top C^\top \lambda_f)^2 + (J v)^\top C^\top \lambda_f ,

a problem in one number and a linear term: at most two entries of :math:`\lambda_f` are non-zero, and the best of all
pairs is the solution.

Shapes: K = objectives, R = K - 1, M = rows of the cone, D = dimensions of the gradients' span.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float64

from mogb.aggregators._options import as_preference, pick, preference_array
from mogb.aggregators._state import positive_numbers
from mogb.base import GramianLossAggregator, Promise, Reference, Solution
from mogb.solvers.scaling import factor, unit_diagonal
from mogb.solvers.simplex import project_on_simplex

# Of the official solver: what ends it, as the change of the weights in one step, and how many steps it has.
STOP = 1e-3
MAX_STEPS = 250
# Differences between gradients that a Gramian in float64 still resolves, relative to the gradients.
RESOLUTION = 1e-7


@dataclass(frozen=True, kw_only=True)
class FERERO(GramianLossAggregator, name="ferero"):
    r"""Weights that bring the losses to the ray of a preference and, on it, down.

    Mind the meaning of the preference: it is the ray of the losses themselves, so that a *larger* number means a
    *larger* loss at the end. Weights can be negative.

    The problem has no natural scale: the shorter the gradients, the longer the step to the ray. By default it is
    therefore solved for gradients in units of the shortest non-zero one and losses in units of their norm, so that H is
    an angle, and d is as long as a min-norm point; in the paper's terms, c is ``pull`` times the first squared over the
    second. ``normalize=False`` takes both as they are, as the official code does. Gradients that nearly depend on each
    other make d long in either case.

    ``solver="exact"`` (the default) solves the problem; ``"official"`` takes the projected gradient steps of the
    official toy code, which writes out K = 2: of length 0.1 from uniform :math:`\lambda_f` and
    :math:`\lambda_h = 1` until the weights move by less than 1e-3, at most 250. They stop a little early, and diverge
    on gradients much longer than 1, for which the step is shortened here to what the matrix bears.

    Args:
        preference: Positive numbers p, one per objective; None means equal losses.
        cone: Rows of the relative preference, each with one non-negative number per objective; None means the
            objectives themselves, the usual order.
        pull: c, the share of the distance to the ray. 1 as in the official toy code.
        normalize: Measure gradients in units of the shortest one, and losses in units of their norm.
        solver: ``"exact"`` or ``"official"``.

    Examples:
        >>> import torch
        >>> FERERO().weights(torch.eye(2), torch.tensor([3.0, 1.0]))
        tensor([0.8162, 0.1838])
    """

    reference: ClassVar = Reference(
        authors="L. Chen, A. F. M. Saif, Y. Shen and T. Chen",
        title="FERERO: A Flexible Framework for Preference-Guided Multi-Objective Learning",
        venue="NeurIPS",
        year=2024,
        arxiv="2412.01773",
        code="lisha-chen/FERERO",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT, Promise.HOMOGENEOUS})

    preference: Sequence[float] | None = None
    cone: Sequence[Sequence[float]] | None = None
    pull: float = 1.0
    normalize: bool = True
    solver: Literal["exact", "official"] = "exact"

    @property
    def keeps(self) -> frozenset[Promise]:
        if self.solver == "official":  # its steps depend on the basis B
            return frozenset()
        kept = self.promises if self.normalize else self.promises - {Promise.HOMOGENEOUS}
        plain = self.preference is None and self.cone is None
        return kept if plain else kept - {Promise.PERMUTATION_EQUIVARIANT}

    def _check(self) -> None:
        if self.preference is not None:
            object.__setattr__(self, "preference", positive_numbers(self.preference, "preference"))
        if self.cone is not None:
            rows = tuple(as_preference(row) for row in self.cone)
            if len({len(row or ()) for row in rows}) != 1:
                raise ValueError(f"cone must hold one or more rows of the same length, but got {self.cone!r}.")
            object.__setattr__(self, "cone", rows)
        if not 0 <= self.pull < np.inf:
            raise ValueError(f"pull must be at least 0 and finite, but got {self.pull}.")
        if self.solver not in ("exact", "official"):
            raise ValueError(f"solver must be 'exact' or 'official', but got {self.solver!r}.")

    def _only(self, live: Bool[np.ndarray, " K"]) -> "FERERO":
        cone = None if self.cone is None else np.array(self.cone)[:, live]
        rows = None if cone is None else tuple(map(tuple, cone[cone.any(axis=1)])) or None
        return replace(self, preference=pick(self.preference, live), cone=rows)

    def _weights(self, gramian: Float64[np.ndarray, "K K"], losses: Float64[np.ndarray, " K"]) -> Solution:
        size = len(losses)
        ray = preference_array(self.preference, size, 1.0)
        ray /= np.linalg.norm(ray)
        cone = np.eye(size) if self.cone is None else np.array(self.cone)
        if cone.shape[1] != size:
            raise ValueError(f"cone must have one number per objective in a row, {size}, but got {cone.shape[1]}.")
        squares = gramian.diagonal()
        if self.normalize:
            gramian = gramian / squares[squares > 0].min(initial=np.inf)
            losses = losses / (np.linalg.norm(losses) or 1.0)
        if self.solver == "official":
            return _descended(gramian, cone, ray, self.pull * losses)
        return _solved(gramian, cone, ray, self.pull * losses)


def _solved(
    gramian: Float64[np.ndarray, "K K"],
    cone: Float64[np.ndarray, "M K"],
    ray: Float64[np.ndarray, " K"],
    losses: Float64[np.ndarray, " K"],
) -> Solution:
    norms, cosines = unit_diagonal(gramian)
    gradients = factor(cosines)[0] * norms  # as columns
    basis = _differences(gradients, norms / ray, ray)
    inside, values, turn = np.linalg.svd(gradients @ basis.T, full_matrices=False)
    if len(values) < len(basis) or not (values > RESOLUTION * len(ray)).all():  # dependent
        basis = _complement(ray)
        inside, values, turn = np.linalg.svd(gradients @ basis.T, full_matrices=False)
        kept = values > RESOLUTION * norms.max()
        inside, values, turn = inside[:, kept], values[kept], turn[kept]
    goals = basis @ losses
    fixed = inside @ (turn @ goals / values)
    rest = gradients[:, (norms / ray).argmin()] / ray[(norms / ray).argmin()]
    rest = rest - inside @ (inside.T @ rest)
    simplex = _best_pair(float(rest @ rest), cone @ ray, cone @ (fixed @ gradients))
    ordered = simplex @ cone
    weights = ordered + (turn.T @ (inside.T @ (fixed - gradients @ ordered) / values)) @ basis
    missed = np.linalg.norm(fixed @ gradients @ basis.T - goals)
    reached = missed <= 1e-6 * np.linalg.norm(goals) + 1e-12 * np.linalg.norm(losses)
    note = "" if reached else "the gradients cannot move the losses straight to the ray"
    return Solution(weights, note=note, details={"simplex": simplex})


def _differences(
    gradients: Float64[np.ndarray, "D K"], lengths: Float64[np.ndarray, " K"], ray: Float64[np.ndarray, " K"]
) -> Float64[np.ndarray, "R K"]:
    """The basis of all :math:`q_k - q_m`, in unit length; q_m is the shortest: subtracting it costs no digits."""
    nearest = int(lengths.argmin())
    rows = np.diag(1 / ray)
    rows[:, nearest] -= 1 / ray[nearest]
    rows = np.delete(rows, nearest, axis=0)
    moved = np.linalg.norm(gradients @ rows.T, axis=0)
    moved[moved <= RESOLUTION * np.delete(lengths, nearest)] = np.inf
    return rows / moved[:, None]


def _best_pair(
    curvature: float, places: Float64[np.ndarray, " M"], slopes: Float64[np.ndarray, " M"]
) -> Float64[np.ndarray, " M"]:
    r"""Minimizes :math:`\tfrac12 \sigma (a \cdot x)^2 + b \cdot x` over the simplex."""
    first, second = np.triu_indices(len(places))
    rise = places[second] - places[first]
    bend = curvature * rise**2
    fall = -(slopes[second] - slopes[first] + curvature * places[first] * rise)
    share = np.clip(np.divide(fall, bend, out=(fall > 0).astype(float), where=bend > 0), 0.0, 1.0)
    heights = slopes[first] + share * (slopes[second] - slopes[first])
    heights += curvature / 2 * (places[first] + share * rise) ** 2
    best = int(heights.argmin())
    simplex = np.zeros(len(places))
    simplex[first[best]] += 1 - share[best]
    simplex[second[best]] += share[best]
    return simplex


def _descended(
    gramian: Float64[np.ndarray, "K K"],
    cone: Float64[np.ndarray, "M K"],
    ray: Float64[np.ndarray, " K"],
    losses: Float64[np.ndarray, " K"],
) -> Solution:
    """The official steps. They are a definition, not a solver: what they leave is no residual, but is noted."""
    basis = _complement(ray)
    both = np.vstack([cone, basis])
    largest = float(np.linalg.eigvalsh(both @ gramian @ both.T)[-1])
    length = min(0.1, 1 / largest) if largest > 0 else 0.1
    simplex = np.full(len(cone), 1 / len(cone))
    free = np.ones(len(basis))
    weights = simplex @ cone + free @ basis
    for _ in range(MAX_STEPS):
        products = gramian @ weights
        simplex = project_on_simplex(simplex - length * (cone @ products))
        free = free - length * (basis @ (products - losses))
        previous, weights = weights, simplex @ cone + free @ basis
        if float(np.abs(weights - previous).sum()) < STOP:
            return Solution(weights, details={"simplex": simplex})
    return Solution(weights, note="the official steps did not settle", details={"simplex": simplex})


def _complement(ray: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, "R K"]:
    """An orthonormal basis of everything orthogonal to the ray; for K = 2 the official one."""
    rows = np.linalg.qr(np.column_stack([ray, np.eye(len(ray))]))[0][:, 1 : len(ray)].T
    return rows * np.where(rows.diagonal() < 0, -1.0, 1.0)[:, None]
