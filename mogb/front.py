"""Which part of a Pareto front a method reaches: a sweep over preferences, or over starting points.

A method with a preference is run once per preference, all from one starting point: what it reaches shows how far the
preference steers it. One without is run from many starting points. The points that one seed reaches are measured
together: the hypervolume as a share of that of the whole front, and IGD+ in the problem's units.

Shapes: P = points of one seed, K = objectives, N = numbers in x.
"""

import csv
import io
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64

from mogb.aggregators import get
from mogb.base import Aggregator, option_names
from mogb.compare.execute import versions
from mogb.compare.loop import RunFailed, travel
from mogb.compare.plan import InputError, derived_seed
from mogb.metrics.front import igd_plus, non_dominated
from mogb.metrics.hypervolume import estimate_hypervolume, hypervolume
from mogb.problems import make_problem, registered_problems
from mogb.problems.base import Problem
from mogb.specs import Spec, Value, parse_spec
from mogb.wrappers import WRAPPERS

# The option that takes a preference, where it has another name.
RENAMED = {"weighted_sum": "weights", "pareto_mtl": "references"}
# Of a preference, so that methods which ask for positive numbers have them: nothing is quite without weight.
LEAST = 0.01
DEFAULT_POINTS = {1: 1, 2: 11, 3: 15}
FRONT_SAMPLES = 1000
FILES = ("front.json", "front.csv", "front.png")

Vector = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is to be run.

    Attributes:
        method: As in ``mogb compare``.
        problem: The name of a problem.
        points: Runs per seed; None means 11 for two objectives, 15 for three, and 2 K for more. Preferences for more
            than two objectives form a regular grid, which may have a few less.
        seeds: How many: seed 0 has the published starting points, the others random ones.
        steps: Of a run; None means the problem's published number.
        quick: Whether to take the problem's short number of steps.
    """

    method: str
    problem: str
    points: int | None = None
    seeds: int = 1
    steps: int | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        if self.problem not in registered_problems():
            raise InputError(
                f"problem: unknown problem {self.problem!r}. Known ones: {', '.join(registered_problems())}."
            )
        for name in ("points", "seeds", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, but got {value}.")
        parse_spec(self.method).build()


@dataclass(frozen=True)
class SeedFigures:
    """What the points of one seed add up to; None where the problem does not know its front, or no run succeeded.

    Attributes:
        hypervolume: Of the points.
        hypervolume_error: Its standard error where it is sampled (beyond three objectives), else 0.
        hypervolume_share: Of the whole front's.
        igd_plus: In the problem's units.
        arrived: Share of the points within the problem's tolerance of the front.
        non_dominated: How many points no other one dominates.
        error: Why the runs of this seed failed; empty if they did not.
    """

    hypervolume: float | None = None
    hypervolume_error: float | None = None
    hypervolume_share: float | None = None
    igd_plus: float | None = None
    arrived: float | None = None
    non_dominated: int = 0
    error: str = ""


@dataclass(frozen=True, eq=False)
class Reached:
    """A finished sweep.

    Attributes:
        sweep: What was run.
        preferences: One per point; None if starting points were swept.
        losses: ``[P, K]`` for every seed; NaN where the runs failed.
        figures: One per seed.
    """

    sweep: Sweep
    preferences: tuple[Vector, ...] | None
    losses: tuple[Float64[np.ndarray, "P K"], ...]
    figures: tuple[SeedFigures, ...]

    @property
    def swept(self) -> str:
        """``"preferences"`` or ``"starting points"``."""
        return "starting points" if self.preferences is None else "preferences"

    def spread(self, name: str) -> tuple[float, float, float] | None:
        """Mean, smallest and largest of a figure over the seeds that have it."""
        values = [getattr(one, name) for one in self.figures if getattr(one, name) is not None and not one.error]
        return (float(np.mean(values)), min(values), max(values)) if values else None


def sweep_front(sweep: Sweep, progress: Callable[[float], None] = lambda _: None) -> Reached:
    """Does all the runs of a sweep.

    Raises:
        SpecError: The method refuses a preference for this problem.
    """
    problem, spec = make_problem(sweep.problem), parse_spec(sweep.method)
    count = sweep.points or DEFAULT_POINTS.get(problem.num_objectives, 2 * problem.num_objectives)
    preferences = None
    if takes_preference(spec) and problem.num_objectives > 1:
        preferences = grid(problem.num_objectives, count)
        count = len(preferences)
    losses, figures = [], []
    for seed in range(sweep.seeds):
        made = _aggregators(spec, preferences, count, sweep, seed)
        try:
            with np.errstate(all="ignore"):  # what overflows is found by the checks of every step
                ends = _run(sweep, problem, made, seed, lambda done, seed=seed: progress((seed + done) / sweep.seeds))
            losses.append(ends)
            figures.append(measure(problem, ends))
        except RunFailed as error:
            losses.append(np.full((count, problem.num_objectives), np.nan))
            figures.append(SeedFigures(error=str(error)))
        progress((seed + 1) / sweep.seeds)
    return Reached(sweep, preferences, tuple(losses), tuple(figures))


def takes_preference(spec: Spec) -> bool:
    """Whether the method, or the one that it wears, has a preference that was not given."""
    if spec.inner is not None:
        return takes_preference(spec.inner)
    option = RENAMED.get(spec.name, "preference")
    return spec.name not in WRAPPERS and option in option_names(get(spec.name)) and option not in dict(spec.options)


def preferring(spec: Spec, vectors: tuple[Vector, ...], index: int) -> Spec:
    """The method with one of the preferences; one that cuts the front into sectors gets all of them."""
    if spec.inner is not None:
        return replace(spec, inner=preferring(spec.inner, vectors, index))
    name = RENAMED.get(spec.name, "preference")
    wanted: dict[str, Value] = {name: list(vectors[index])}
    if spec.name == "pareto_mtl":
        wanted = {name: [list(vector) for vector in vectors], "index": index}
    return replace(spec, options=(*spec.options, *wanted.items()))


def grid(objectives: int, count: int) -> tuple[Vector, ...]:
    """At most ``count`` evenly spread preferences, but at least one per objective: positive, with the sum 1.

    Of two objectives exactly as many, from one end to the other; of more, the largest simplex lattice (Das and Dennis,
    SIAM Journal on Optimization 1998).
    """
    if objectives == 2:
        shares = np.linspace(1.0, 0.0, count) if count > 1 else np.array([0.5])
        points = np.column_stack([shares, 1 - shares])
    else:
        points = _lattice(objectives, count)
    moved = LEAST + (1 - objectives * LEAST) * points if objectives * LEAST < 1 else points + 1 / objectives
    moved = moved / moved.sum(1, keepdims=True)
    return tuple(tuple(float(f"{value:.12g}") for value in row) for row in moved)


def measure(problem: Problem, losses: Float64[np.ndarray, "P K"]) -> SeedFigures:
    """The figures of the points of one seed."""
    front, reference, whole = problem.pareto_front(FRONT_SAMPLES), problem.reference_point, problem.true_hypervolume
    distance = problem.distance_to_front(torch.from_numpy(losses))
    volume = error = None
    if reference is not None and whole:
        if problem.num_objectives <= 3:
            volume, error = hypervolume(losses, reference.numpy()), 0.0
        else:
            sampled = estimate_hypervolume(losses, reference.numpy())
            volume, error = sampled.value, sampled.standard_error
    return SeedFigures(
        hypervolume=volume,
        hypervolume_error=error,
        hypervolume_share=volume / whole if volume is not None and whole else None,
        igd_plus=None if front is None else igd_plus(losses / problem.units.numpy(), (front / problem.units).numpy()),
        arrived=None if distance is None else float((distance <= problem.settings.tolerance).double().mean()),
        non_dominated=int(non_dominated(losses).sum()),
    )


def write_front(reached: Reached, folder: Path, *, figures: bool = True) -> list[Path]:
    """Writes ``front.json``, ``front.csv`` and, if wanted, ``front.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "front.json").write_text(json.dumps(_payload(reached), indent=1) + "\n")
    (folder / "front.csv").write_text(_csv(reached))
    written = [folder / "front.json", folder / "front.csv"]
    if figures:
        from mogb.plotting.front import draw_front

        written.append(draw_front(reached, folder).path)
    return written


def _run(
    sweep: Sweep, problem: Problem, made: list[Aggregator], seed: int, progress: Callable[[float], None]
) -> Float64[np.ndarray, "P K"]:
    settings = problem.settings
    steps = sweep.steps or (settings.quick_steps if sweep.quick else settings.steps)
    lr = settings.quick_lr if sweep.quick else settings.lr
    noise = _generator("front noise", sweep, seed) if problem.stochastic else None
    path = travel(problem, _starts(problem, sweep, len(made), seed), made, steps, lr, noise, progress)
    losses: Float64[np.ndarray, "P K"] = problem.losses(torch.from_numpy(path.positions[-1])).numpy()
    if not np.isfinite(losses).all():
        raise RunFailed("the losses at the end are NaN or Inf.")
    return losses


def _aggregators(
    spec: Spec, preferences: tuple[Vector, ...] | None, count: int, sweep: Sweep, seed: int
) -> list[Aggregator]:
    specs = [spec if preferences is None else preferring(spec, preferences, index) for index in range(count)]
    return [one.build(seed=derived_seed("front method", sweep.problem, seed, index)) for index, one in enumerate(specs)]


def _starts(problem: Problem, sweep: Sweep, count: int, seed: int) -> Float64[np.ndarray, "P N"]:
    """One for all preferences; otherwise the published ones (of seed 0) and random ones after them."""
    swept = takes_preference(parse_spec(sweep.method)) and problem.num_objectives > 1
    needed = 1 if swept else count
    found = problem.starts()[:needed] if seed == 0 else problem.starts()[:0]
    if len(found) < needed:
        drawn = problem.sample_starts(needed - len(found), _generator("front starts", sweep, seed))
        found = torch.cat([found, drawn])
    return np.ascontiguousarray(found.expand(count, -1).to(torch.float64).numpy())


def _generator(what: str, sweep: Sweep, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(what, sweep.problem, seed))


def _lattice(objectives: int, count: int) -> Float64[np.ndarray, "P K"]:
    """All points of the simplex whose coordinates are multiples of 1 / H, for the largest H that fits."""
    parts = 1
    while math.comb(objectives + parts, parts + 1) <= count:
        parts += 1
    bars = itertools.combinations(range(parts + objectives - 1), objectives - 1)
    rows = [np.diff([-1, *cut, parts + objectives - 1]) - 1 for cut in bars]
    return np.array(rows[::-1]) / parts


def _payload(reached: Reached) -> dict[str, Any]:
    sweep, problem = reached.sweep, make_problem(reached.sweep.problem)
    return {
        "method": sweep.method, "problem": sweep.problem, "swept": reached.swept, "seeds": sweep.seeds,
        "steps": sweep.steps or (problem.settings.quick_steps if sweep.quick else problem.settings.steps),
        "quick": sweep.quick, "true_hypervolume": problem.true_hypervolume,
        "reference_point": None if problem.reference_point is None else problem.reference_point.tolist(),
        "preferences": reached.preferences, "figures": [vars(one) for one in reached.figures],
        "losses": [[[_number(value) for value in row] for row in rows.tolist()] for rows in reached.losses],
        "versions": versions(),
    }  # fmt: skip


def _csv(reached: Reached) -> str:
    size = reached.losses[0].shape[1]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    preferred = [f"preference_{k}" for k in range(size)] if reached.preferences else []
    writer.writerow(["seed", "point", *preferred, *(f"loss_{k}" for k in range(size))])
    for seed, rows in enumerate(reached.losses):
        for index, row in enumerate(rows.tolist()):
            wanted = list(reached.preferences[index]) if reached.preferences else []
            writer.writerow([seed, index, *wanted, *(_number(value) for value in row)])
    return buffer.getvalue()


def _number(value: float) -> float | None:
    return float(f"{value:.12g}") if math.isfinite(value) else None
