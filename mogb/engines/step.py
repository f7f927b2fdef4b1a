r"""What every engine has in common: from gradients, in whatever form, to one direction in every ``param.grad``.

.. math::  G = J J^\top \;\to\; w \;\to\; d = J^\top w

Everything is computed before the first ``.grad`` is touched: a step that fails leaves them, and the method, as they
were. Under a gradient scaler, J arrives multiplied by the scale: the method sees the unscaled Gramian, the direction
stays scaled, and a step whose gradients overflowed is skipped.

Shapes: K = objectives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from mogb.base import Aggregator, Solution, needs_losses
from mogb.engines.differentiate import Update, add_to_grads, averaged
from mogb.engines.distributed import Ranks, local_part
from mogb.engines.groups import Grouping
from mogb.engines.report import Report, make_report, summed_up
from mogb.engines.rows import Rows
from mogb.engines.scaling import Scaled
from mogb.errors import NonFiniteError
from mogb.jacobian import Jacobian, all_finite


@runtime_checkable
class Source(Protocol):
    """K losses that can be differentiated: what an engine offers.

    Attributes:
        names: Of the objectives, if they have any.
        values: Of the losses, over the whole batch.
        ranks: Those that share the step.
        scale: What gradients are multiplied with, for the sake of half precision.
        engine: Its name, for the report.
        note: For the report.
        streams: Whether :meth:`gramian` is to be used, and the rows are not to be formed.
        targets: Everything that gets a gradient.
    """

    names: tuple[str, ...] | None
    values: Float64[np.ndarray, " K"]
    ranks: Ranks
    scale: float | None

    @property
    def engine(self) -> str: ...

    @property
    def note(self) -> str: ...

    @property
    def streams(self) -> bool: ...

    @property
    def targets(self) -> Sequence[Tensor]: ...

    def rows(self, into: Sequence[tuple[Tensor, Tensor]] = ()) -> Rows:
        """This rank's scaled rows; for some parameters, rows to add to may be given."""

    def joined(self, params: Sequence[Tensor], take: Callable[[], Jacobian], *, whole: bool) -> Jacobian:
        """This rank's rows, as ``take`` hands them out, joined with the others'; ``whole`` if coordinates are read."""

    def land(self, params: Sequence[Tensor], direction: Sequence[Tensor]) -> tuple[list[Update], int]:
        """From a direction in the space of the rows to what goes into ``.grad``, and the passes spent.

        Nobody else may hold the tensors, unless they are the direction itself.
        """

    def gramian(self) -> tuple[Float64[np.ndarray, "K K"], int]:
        """The scaled Gramian over all ranks, and the passes spent; the graph is kept."""

    def weighted(self, weights: Float64[np.ndarray, " K"]) -> tuple[list[Update], int]:
        """The scaled gradient of ``weights @ losses`` over all ranks, and the passes spent."""

    def blame(self, suspect: int | None) -> NonFiniteError:
        """The error for a gradient that is not finite: of one objective, or of a combination, with None."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a step gave.

    Attributes:
        report: For the user.
        solution: For a balancer that reuses it; None where there is no single one.
    """

    report: Report
    solution: Solution | None


def checked_values(values: Float64[np.ndarray, " K"], names: tuple[str, ...] | None) -> Float64[np.ndarray, " K"]:
    """The same.

    Raises:
        NonFiniteError: A loss is NaN or Inf; it names the objective.
    """
    if not np.isfinite(values).all():
        index = int(np.argmin(np.isfinite(values)))
        raise NonFiniteError("loss", index, None if names is None else names[index])
    return values


def balance(source: Source, grouping: Grouping) -> Outcome:
    """Balances in full.

    Raises:
        NonFiniteError: NaN or Inf in a loss or a gradient; it names the objective. Gradients that overflowed under a
            gradient scaler are no error: the step is skipped.
    """
    checked_values(source.values, source.names)
    try:
        if grouping.prototype.reads == "losses":
            return _from_losses(source, grouping.prototype)
        if source.streams:
            return _from_gramian(source, grouping.prototype)
        return from_rows(source, source.rows(), grouping)
    except NonFiniteError as error:
        return skipped_or_raised(source, error)


def reuse(source: Source, solution: Solution) -> Outcome:
    """One weighted backward pass with weights that were solved before."""
    checked_values(source.values, source.names)
    try:
        passes = add_weighted(source, solution)
    except NonFiniteError as error:
        return skipped_or_raised(source, error)
    report = make_report(source.values, source.names, solution, None, passes, engine="weighted", refreshed=False)
    return Outcome(report, solution)


def from_rows(source: Source, rows: Rows, grouping: Grouping) -> Outcome:
    """Balances rows that this rank has formed."""
    own = averaged(source.ranks, [update for _, update in rows.own])
    for (k, _), (_, grad) in zip(rows.own, own, strict=True):
        if not all_finite([local_part(grad)]):
            raise NonFiniteError("gradient", k)
    if rows.jacobian is None:
        add_to_grads(own)
        solution = Solution(np.ones(len(source.values)), note="no parameter is shared: every gradient is plain")
        report = make_report(source.values, source.names, solution, None, rows.passes, engine=source.engine)
        return Outcome(report, None)
    if grouping.whole:
        with grouping.undone_on_failure():
            outcome, updates = _direct(source, rows.params, rows.take, grouping.prototype, rows.passes)
        add_to_grads(own)
        add_to_grads(updates, fresh=grouping.prototype.yields_weights)  # other directions may be rows
        return outcome
    groups = grouping.split(rows.params)
    parts, updates, jacobian = [], own, rows.take()
    with grouping.undone_on_failure():
        for group in groups:
            params = [rows.params[index] for index in group.members]
            some = Jacobian(tuple(jacobian.blocks[index] for index in group.members))
            outcome, more = _direct(source, params, partial(_given, some), group.aggregator, rows.passes)
            parts.append(outcome.report)
            updates = updates + more
    add_to_grads(updates)
    return Outcome(summed_up(parts, [group.name for group in groups]), None)


def _direct(
    source: Source, params: Sequence[Tensor], take: Callable[[], Jacobian], aggregator: Aggregator, passes: int
) -> tuple[Outcome, list[Update]]:
    """The direction of parameters that are balanced together."""
    scale, reads_rows = source.scale, not aggregator.yields_weights
    jacobian = source.joined(params, take, whole=reads_rows)
    if scale is not None:
        jacobian = Scaled.undone(jacobian, scale) if reads_rows else Scaled(jacobian, scale)
    direction, gramian, solution = aggregator.direct(jacobian, seen_by(aggregator, source.values))
    report = make_report(
        source.values,
        source.names,
        solution,
        gramian,
        passes,
        engine=source.engine,
        note=source.note,
        jacobian=jacobian,
        direction=direction if reads_rows else None,
    )
    if scale is not None and reads_rows:
        direction = tuple(part * scale for part in direction)
    updates, more = source.land(params, direction)
    return Outcome(replace(report, backward_passes=passes + more), solution), updates


def _from_losses(source: Source, aggregator: Aggregator) -> Outcome:
    with aggregator.undone_on_failure():
        solution = aggregator._checked(None, seen_by(aggregator, source.values))
        passes = add_weighted(source, solution)
    return Outcome(make_report(source.values, source.names, solution, None, passes, engine="weighted"), solution)


def _from_gramian(source: Source, aggregator: Aggregator) -> Outcome:
    gramian, spent = source.gramian()
    gramian = gramian if source.scale is None else gramian / source.scale**2
    if not np.isfinite(gramian).all():
        bad = np.isfinite(gramian.diagonal())
        raise NonFiniteError("gradient", int(np.argmin(bad)) if not bad.all() else None)
    with aggregator.undone_on_failure():
        solution = aggregator._checked(gramian, seen_by(aggregator, source.values))
        passes = add_weighted(source, solution)
    report = make_report(
        source.values, source.names, solution, gramian, spent + passes, engine=source.engine, note=source.note
    )
    return Outcome(report, solution)


def add_weighted(source: Source, solution: Solution) -> int:
    """Adds the gradient of ``weights @ losses`` to every ``.grad``; returns the passes spent.

    Raises:
        NonFiniteError: It holds NaN or Inf. Every ``.grad`` is untouched.
    """
    updates, passes = source.weighted(solution.weights)
    if source.ranks.any(not all_finite([local_part(grad) for _, grad in updates])):
        raise NonFiniteError("gradient", None)
    add_to_grads(updates)
    return passes


def skipped_or_raised(source: Source, error: NonFiniteError) -> Outcome:
    """Under a gradient scaler, a step that overflowed: every ``.grad`` gets Inf, which the scaler looks for."""
    if source.scale is None or error.what == "loss":
        error = source.blame(error.index) if error.what == "gradient" else error
        name = None if source.names is None or error.index is None else source.names[error.index]
        raise NonFiniteError(error.what, error.index, name) from None
    for param in source.targets:
        param.grad = torch.full_like(param, float("inf"))
    note = f"skipped: the gradients overflowed at the scale {source.scale:g}"
    report = make_report(source.values, source.names, None, None, 0, engine=source.engine, note=note, skipped=True)
    return Outcome(report, None)


def _given(jacobian: Jacobian) -> Jacobian:
    return jacobian


def seen_by(aggregator: Aggregator, values: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, " K"]:
    """What a method is told about the losses: their values, or only their number."""
    return values if needs_losses(aggregator) else np.ones(len(values))
