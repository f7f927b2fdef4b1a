"""What a finished run achieved, and what is kept of its way there."""

import math
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from mogb.compare.loop import Path
from mogb.compare.observer import Observer
from mogb.compare.plan import Run
from mogb.compare.store import Record
from mogb.metrics.front import igd_plus
from mogb.metrics.hypervolume import hypervolume
from mogb.metrics.stationarity import stationarity
from mogb.metrics.steps import steps_to_tolerance
from mogb.problems.base import Problem

FRONT_SAMPLES = 1000
KEPT_COORDINATES = 32  # longer end points are left out of the record
KEPT_OBJECTIVES = 16
PATH_POINTS = 100  # of a trajectory in the record


def measure(run: Run, problem: Problem, path: Path) -> Record:
    """Everything that a record says beyond how the run was set up."""
    ends = torch.from_numpy(path.positions[-1])
    losses, rows = problem.jacobian(ends)
    return {
        "ends": _keep(ends, KEPT_COORDINATES), "losses": _plain(losses),
        **_against_the_front(problem, losses), **_arrivals(problem, path), **_stationarity(rows),
        **_observed(run, path.observer), **_held_out(run, path), **_solver(path), **_trajectory(run, problem, path),
    }  # fmt: skip


def _against_the_front(problem: Problem, losses: Tensor) -> Record:
    """How far the reached points are from the front, and how well they cover it together."""
    distance, front = problem.distance_to_front(losses), problem.pareto_front(FRONT_SAMPLES)
    reference, whole = problem.reference_point, problem.true_hypervolume
    volume = ratio = None
    if reference is not None and whole:
        volume = _volume(losses.numpy(), reference.numpy())
        ratio = volume / whole
    return {
        "distance": None if distance is None else _plain(distance),
        "hypervolume": volume, "hypervolume_ratio": ratio,
        "igd_plus": None if front is None else float(igd_plus(losses / problem.units, front / problem.units)),
    }  # fmt: skip


def _volume(points: Float64[np.ndarray, "S K"], reference: Float64[np.ndarray, " K"]) -> float:
    """The exact hypervolume of a handful of points, for any K: beyond three objectives by inclusion and exclusion."""
    if points.shape[1] <= 3:
        return hypervolume(points, reference)
    inside = points[(points < reference).all(1)]
    return sum(
        (-1) ** (size + 1) * float(np.prod(reference - inside[list(subset)].max(0)))
        for size in range(1, len(inside) + 1)
        for subset in combinations(range(len(inside)), size)
    )


def _arrivals(problem: Problem, path: Path) -> Record:
    """The first kept step at which a start is within the tolerance; None for one that never is."""
    distance = problem.distance_to_front(problem.losses(torch.from_numpy(path.positions)))
    if distance is None:
        return {"steps_to_tolerance": None}
    first = steps_to_tolerance(np.array(path.marks), distance, problem.settings.tolerance)
    return {"steps_to_tolerance": [int(step) if math.isfinite(step) else None for step in first]}


def _stationarity(rows: Tensor) -> Record:
    found = [stationarity(jacobian) for jacobian in rows]
    return {
        "stationarity": [float(one.relative) for one in found],
        "stationarity_gap": [float(one.gap) for one in found],
    }


def _observed(run: Run, observer: Observer) -> Record:
    """What was watched on the way; series over time only for the published starts, where they are drawn."""
    found = observer.summary()
    objectives = len(found["cosine_of_objective"])
    for name in ("weights_over_time", "cosine_min_over_time"):
        drawn = run.seed == 0 and objectives <= KEPT_OBJECTIVES and found[name] is not None
        found[name] = _rounded(found[name], 4) if drawn else None
    return found


def _held_out(run: Run, path: Path) -> Record:
    if path.held_out is None:
        return {}
    names = ("conflict_rate", "cosine_mean", "cosine_variance", "cosine_min", "cosine_worst", "cosine_min_histogram",
             "cosine_min_over_time", "cosine_of_objective")  # fmt: skip
    found = _observed(run, path.held_out)
    return {f"held_out_{name}": found[name] for name in names}


def _solver(path: Path) -> Record:
    flags = path.flags
    return {
        "unconverged": flags.unconverged, "max_residual": flags.max_residual,
        "left_out": {str(index): count for index, count in sorted(flags.left_out.items())},
        "notes": dict(sorted(flags.notes.items())),
    }  # fmt: skip


def _trajectory(run: Run, problem: Problem, path: Path) -> Record:
    """The way from the published starts, thinned, where it can be drawn."""
    if run.seed or problem.num_objectives > 3:
        return {"trajectory": None}
    chosen = sorted({*range(0, len(path.marks), math.ceil(len(path.marks) / PATH_POINTS)), len(path.marks) - 1})
    positions = torch.from_numpy(path.positions[chosen])
    return {
        "trajectory": {
            "steps": [path.marks[i] for i in chosen],
            "x": _plain(positions, 5) if problem.dim <= 2 else None,
            "losses": _plain(problem.losses(positions), 5),
        }
    }


def _keep(values: Tensor, limit: int) -> Any:
    return _plain(values) if values.shape[-1] <= limit else None


def _plain(values: Tensor, digits: int = 12) -> Any:
    """Nested lists of rounded floats; what is not finite becomes None."""
    return _rounded(values.detach().tolist(), digits)


def _rounded(value: Any, digits: int) -> Any:
    if value is None:
        return None
    if isinstance(value, list):
        return [_rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
