"""What a balanced step tells about itself.

Shapes: K = objectives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from mogb.base import Solution
from mogb.jacobian import Jacobian


@dataclass(frozen=True, eq=False)
class Report:
    """Diagnostics of one backward call. All tensors are float64 on the CPU.

    Attributes:
        weights: On the raw gradients, ``[K]``; None for a method that yields no weights.
        gramian: Inner products of the K gradients, ``[K, K]``; None where they were not formed.
        cosines: Between the direction and each gradient, ``[K]``; None where there is no Gramian. 0 for zero vectors.
        min_cosine: The smallest of them over the non-zero gradients; NaN where there is no Gramian.
        conflicts: Pairs of gradients with a negative inner product, beyond rounding; None where there is no Gramian.
        losses: The K loss values.
        names: Of the objectives, where the losses came as a mapping.
        left_out: Objectives that took no part, such as zero gradients.
        residual: How far the optimality conditions of the small problem are from holding, relative.
        converged: False when a solver gave up and returned its best point.
        note: What else to know, such as "Pareto stationary"; empty for an ordinary step.
        backward_passes: How many were spent.
        refreshed: Whether the weights were solved at this step.
        engine: Which one ran: ``"weighted"`` (one pass of ``weights @ losses``), ``"sequential"``, ``"batched"``,
            ``"streaming"`` or ``"per_sample"``.
        skipped: Whether gradients overflowed under a gradient scaler: ``.grad`` holds Inf then, which the scaler's
            ``step`` looks for, and the method has not seen the step.
        groups: Reports of the groups that were balanced apart, by name; empty otherwise. The Gramian and the cosines
            of the whole are then those of all groups together, and the weights None.
    """

    weights: Tensor | None
    gramian: Tensor | None
    cosines: Tensor | None
    min_cosine: float
    conflicts: int | None
    losses: Tensor
    names: tuple[str, ...] | None
    left_out: tuple[int, ...]
    residual: float
    converged: bool
    note: str
    backward_passes: int
    refreshed: bool = True
    engine: str = "sequential"
    skipped: bool = False
    groups: Mapping[str, "Report"] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line for a terminal."""
        size = len(self.losses)
        names = self.names or tuple(str(index) for index in range(size))
        weights = self.weights.tolist() if self.weights is not None else [float("nan")] * size
        parts = [
            f"{name} {loss:.4g} (w {weight:.3g})"
            for name, loss, weight in zip(names, self.losses.tolist(), weights, strict=True)
        ]
        tail = "" if self.gramian is None else f" | min cos {self.min_cosine:+.3f}, {self.conflicts} conflicts"
        flags = [] if self.converged else ["NOT CONVERGED"]
        flags += [f"left out: {', '.join(names[index] for index in self.left_out)}"] if self.left_out else []
        flags += [self.note] if self.note else []
        return " ".join(parts) + tail + (f" | {'; '.join(flags)}" if flags else "")


def make_report(
    losses: Float64[np.ndarray, " K"],
    names: tuple[str, ...] | None,
    solution: Solution | None,
    gramian: Float64[np.ndarray, "K K"] | None,
    backward_passes: int,
    *,
    jacobian: Jacobian | None = None,
    direction: Sequence[Tensor] | None = None,
    refreshed: bool = True,
    engine: str = "sequential",
    note: str = "",
    skipped: bool = False,
) -> Report:
    """Fills a report from what an engine has at hand."""
    if gramian is None and jacobian is not None:
        gramian = jacobian.gramian()
    cosines = None
    if gramian is not None and solution is not None:
        products = gramian @ solution.weights
        cosines = _cosines(products, gramian, max(float(solution.weights @ products), 0.0))
    elif gramian is not None and jacobian is not None and direction is not None:
        squared = sum(float(part.double().square().sum()) for part in direction)
        cosines = _cosines(jacobian.products(direction), gramian, squared)
    alive = None if gramian is None else gramian.diagonal() > 0
    minimum = float("nan")
    if cosines is not None and alive is not None:
        minimum = float(cosines[alive].min()) if alive.any() else 0.0
    return Report(
        weights=None if solution is None else torch.from_numpy(solution.weights.copy()),
        gramian=None if gramian is None else torch.from_numpy(gramian.copy()),
        cosines=None if cosines is None else torch.from_numpy(cosines),
        min_cosine=minimum,
        conflicts=None if gramian is None else _conflicting_pairs(gramian),
        losses=torch.from_numpy(losses.copy()),
        names=names,
        left_out=() if solution is None else solution.left_out,
        residual=0.0 if solution is None else solution.residual,
        converged=True if solution is None else solution.converged,
        note="; ".join(text for text in ("" if solution is None else solution.note, note) if text),
        backward_passes=backward_passes,
        refreshed=refreshed,
        engine=engine,
        skipped=skipped,
    )


def summed_up(parts: Sequence[Report], names: Sequence[str]) -> Report:
    """One report of groups that were balanced apart, from theirs."""
    gramian = cosines = conflicts = None
    minimum = float("nan")
    if all(part.gramian is not None for part in parts):
        arrays = [part.gramian.numpy() for part in parts if part.gramian is not None]
        total = np.sum(arrays, axis=0)
        gramian, conflicts = torch.from_numpy(total), _conflicting_pairs(total)
        weights = [part.weights.numpy() for part in parts if part.weights is not None]
        if len(weights) == len(parts):
            products = [array @ weight for array, weight in zip(arrays, weights, strict=True)]
            squared = sum(float(w @ product) for w, product in zip(weights, products, strict=True))
            found = _cosines(np.sum(products, axis=0), total, max(squared, 0.0))
            alive = total.diagonal() > 0
            cosines, minimum = torch.from_numpy(found), float(found[alive].min()) if alive.any() else 0.0
    first = parts[0]
    return Report(
        weights=None,
        gramian=gramian,
        cosines=cosines,
        min_cosine=minimum,
        conflicts=conflicts,
        losses=first.losses,
        names=first.names,
        left_out=tuple(sorted(set.intersection(*(set(part.left_out) for part in parts)))),
        residual=max(part.residual for part in parts),
        converged=all(part.converged for part in parts),
        note="; ".join(f"{name}: {part.note}" for name, part in zip(names, parts, strict=True) if part.note),
        backward_passes=first.backward_passes,
        refreshed=first.refreshed,
        engine=first.engine,
        groups=dict(zip(names, parts, strict=True)),
    )


def _cosines(
    products: Float64[np.ndarray, " K"], gramian: Float64[np.ndarray, "K K"], squared_norm: float
) -> Float64[np.ndarray, " K"]:
    lengths = np.sqrt(gramian.diagonal() * squared_norm)
    return np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)


def _conflicting_pairs(gramian: Float64[np.ndarray, "K K"]) -> int:
    norms = np.sqrt(gramian.diagonal())
    return int(np.count_nonzero(np.triu(gramian < -1e-12 * np.outer(norms, norms), k=1)))
