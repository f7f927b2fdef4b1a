"""One run: a method on a problem with a seed, from all starting points at once.

All points share one call for losses and gradients; each has an aggregator of its own, since methods hold state. The
loop forms the Gramians itself and asks a method's inner function, so that thousands of cheap steps are not spent on
checking what was just computed; NaN and Inf still end a run, with the step and the starting point.

Shapes: S = starting points, K = objectives, N = numbers in x, T = steps at which positions are kept.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from mogb.base import Aggregator, Solution
from mogb.compare.observer import Flags, Observer
from mogb.compare.optimizers import make_optimizer
from mogb.compare.phases import Phases
from mogb.compare.plan import Plan, Run, derived_seed
from mogb.errors import NonFiniteError
from mogb.jacobian import Jacobian
from mogb.problems.base import Problem
from mogb.specs import parse_spec

# What methods raise when they are given something they cannot work with.
REFUSALS = (ValueError, TypeError, RuntimeError, ArithmeticError)
MARKS = 240  # positions kept over a run: half of them evenly spaced, half geometrically


class RunFailed(Exception):
    """A run that cannot go on; the message says at which step, from which start, and why."""


@dataclass(frozen=True)
class Path:
    """Where a run went.

    Attributes:
        marks: The steps at which positions were kept: 0 first, the last step last.
        positions: At these steps.
        observer: The figures collected at every step, of directions against the gradients that they were made from.
        held_out: The same against the exact gradients, where the problem is stochastic, until a start arrives: what a
            direction that was made from one mini-batch does to the losses themselves. Close to the front the exact
            gradients, or what they leave of each other, drown in the noise.
        flags: What the solvers said.
    """

    marks: list[int]
    positions: Float64[np.ndarray, "T S N"]
    observer: Observer
    held_out: Observer | None
    flags: Flags


def starts_of(problem: Problem, seed: int) -> Float64[np.ndarray, "S N"]:
    """The published starting points for seed 0, as many random ones for any other seed; the same for every method."""
    fixed = problem.starts()
    if seed:
        fixed = problem.sample_starts(len(fixed), _generator("starts", problem.name, seed))
    return np.ascontiguousarray(fixed.to(torch.float64).numpy())


def follow(run: Run, plan: Plan, problem: Problem, progress: Callable[[float], None] = lambda _: None) -> Path:
    """Takes all the steps of a run.

    Raises:
        RunFailed: A loss, gradient, direction or position became NaN or Inf, or the method refused its input.
    """
    settings, x = problem.settings, starts_of(problem, run.seed)
    noise = _generator("noise", problem.name, run.seed) if problem.stochastic else None
    lr = settings.quick_lr if plan.quick else settings.lr
    return travel(problem, x, _aggregators(run, len(x)), plan.steps_of(problem), lr, noise, progress)


def travel(
    problem: Problem,
    starts: Float64[np.ndarray, "S N"],
    aggregators: Sequence[Aggregator],
    steps: int,
    lr: float,
    noise: torch.Generator | None,
    progress: Callable[[float], None] = lambda _: None,
) -> Path:
    """Takes steps from every start with an aggregator of its own; all of them read the same.

    Raises:
        RunFailed: As :func:`follow`.
    """
    x = starts.copy()
    optimizer = make_optimizer(problem.settings.optimizer, lr, x.shape)
    weighted, phases = aggregators[0].yields_weights, Phases(aggregators)
    observer = Observer(steps, len(x), problem.num_objectives, weights=weighted)
    held_out = Observer(steps, len(x), problem.num_objectives, weights=False) if problem.stochastic else None
    flags, marks = Flags(), marks_of(steps)
    positions = np.empty((len(marks), *x.shape))
    positions[0], mark = x, 1
    combine = _by_weights if weighted else _by_direction
    for step in range(1, steps + 1):
        drawn = phases.before(noise)
        direction, seen = combine(aggregators, *_evaluate(problem, x, noise, step), flags, step)
        observer.see(*seen)
        if held_out is not None:
            held_out.see(*_against_exact(problem, x, direction, step))
        moved = problem.project(torch.from_numpy(x - optimizer(direction)))
        x = moved.numpy()
        if not math.isfinite(x.sum()):
            _refuse_position(x, step)
        if phases.kinds:
            _finish_step(phases, problem, moved, drawn, step)
        if step == marks[mark]:
            positions[mark] = x
            mark += mark + 1 < len(marks)
        if step % 256 == 0:
            progress(step / steps)
    return Path(marks, positions, observer, held_out, flags)


def _finish_step(phases: Phases, problem: Problem, x: Float64[Tensor, "S N"], drawn: Tensor | None, step: int) -> None:
    try:
        phases.after(problem, x, drawn, step)
    except REFUSALS as error:
        raise RunFailed(f"step {step}, after the step: {error}") from error


def marks_of(steps: int) -> list[int]:
    """The steps at which positions are kept: dense at the beginning, even later; all of them in a short run."""
    even = np.linspace(0, steps, MARKS // 2 + 1)
    early = np.geomspace(1, steps, MARKS // 2)
    return sorted({0, *np.rint(np.concatenate([even, early])).astype(int).tolist()})


def _aggregators(run: Run, count: int) -> list[Aggregator]:
    spec = parse_spec(run.method)
    return [spec.build(seed=derived_seed("method", run.key, start)) for start in range(count)]


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(*parts))


def _evaluate(
    problem: Problem, x: Float64[np.ndarray, "S N"], noise: torch.Generator | None, step: int
) -> tuple[Float64[np.ndarray, "S K"], Float64[np.ndarray, "S K N"], Float64[np.ndarray, "S K K"]]:
    values, rows = problem.jacobian(torch.from_numpy(x), noise)
    losses, jacobian = values.numpy(), rows.numpy()
    gramian = jacobian @ jacobian.transpose(0, 2, 1)
    if not (math.isfinite(gramian.sum()) and math.isfinite(losses.sum())):
        _refuse(losses, jacobian, step)
    return losses, jacobian, gramian


Seen = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _by_weights(
    aggregators: Sequence[Aggregator],
    losses: np.ndarray,
    jacobian: np.ndarray,
    gramian: np.ndarray,
    flags: Flags,
    step: int,
) -> tuple[Float64[np.ndarray, "S N"], Seen]:
    weights = np.empty(losses.shape)
    for start, aggregator in enumerate(aggregators):
        solution = _solve(aggregator, gramian[start], losses[start], start, step)
        weights[start] = solution.weights
        flags.add(solution)
    if not math.isfinite(weights.sum()):
        start = int(np.argmin(np.isfinite(weights).all(-1)))
        raise RunFailed(f"step {step}, start {start}: the method's weights are NaN or Inf.")
    direction = (weights[:, None] @ jacobian)[:, 0]
    products = (gramian @ weights[..., None])[..., 0]
    return direction, _seen(gramian, products, direction, weights)


def _by_direction(
    aggregators: Sequence[Aggregator],
    losses: np.ndarray,
    jacobian: np.ndarray,
    gramian: np.ndarray,
    flags: Flags,
    step: int,
) -> tuple[Float64[np.ndarray, "S N"], Seen]:
    direction = np.empty((len(losses), jacobian.shape[2]))
    for start, aggregator in enumerate(aggregators):
        blocks = Jacobian((torch.from_numpy(jacobian[start]),))
        try:
            direction[start] = aggregator.direct(blocks, losses[start])[0][0].numpy()
        except REFUSALS as error:
            raise RunFailed(f"step {step}, start {start}: {error}") from error
    products = (jacobian @ direction[..., None])[..., 0]
    return direction, _seen(gramian, products, direction, np.ones(losses.shape))


def _against_exact(problem: Problem, x: np.ndarray, direction: np.ndarray, step: int) -> Seen:
    losses, jacobian, gramian = _evaluate(problem, x, None, step)
    distance = problem.distance_to_front(torch.from_numpy(losses))
    if distance is not None:  # a direction of length 0 is not counted
        direction = direction * (distance.numpy() > problem.settings.tolerance)[:, None]
    return _seen(gramian, (jacobian @ direction[..., None])[..., 0], direction, np.zeros(losses.shape))


def _solve(aggregator: Aggregator, gramian: np.ndarray, losses: np.ndarray, start: int, step: int) -> Solution:
    try:
        return aggregator._solve(gramian, losses)
    except REFUSALS as error:
        raise RunFailed(f"step {step}, start {start}: {error}") from error


def _seen(gramian: np.ndarray, products: np.ndarray, direction: np.ndarray, weights: np.ndarray) -> Seen:
    norms = np.sqrt(np.diagonal(gramian, axis1=1, axis2=2))
    return norms, products, np.sqrt((direction * direction).sum(-1)), weights


def _refuse(losses: np.ndarray, jacobian: np.ndarray, step: int) -> None:
    """Says what is not finite, if anything is: a sum may overflow although its terms do not."""
    for what, values in (("loss", losses), ("gradient", np.abs(jacobian).max(-1))):
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            start, index = (int(number) for number in bad[0])
            raise RunFailed(f"step {step}, start {start}: {NonFiniteError(what, index)}")
    raise RunFailed(f"step {step}: the squares of the gradients overflow float64.")


def _refuse_position(x: np.ndarray, step: int) -> None:
    start = int(np.argmin(np.isfinite(x).all(-1)))
    raise RunFailed(f"step {step}, start {start}: the position is NaN or Inf: the run has diverged.")
