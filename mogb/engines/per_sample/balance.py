"""From per-sample terms to one direction in ``param.grad``: the engine, a balancing method, and other ranks.

Shapes: K = objectives.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from mogb.base import Aggregator, JacobianAggregator, Solution, needs_losses
from mogb.engines.distributed import Ranks
from mogb.engines.report import Report, make_report
from mogb.engines.shards import mean_rows
from mogb.errors import NonFiniteError
from mogb.jacobian import Jacobian, all_finite


@dataclass(frozen=True, eq=False)
class Means:
    """What a step can be made of.

    Attributes:
        params: The parameters.
        rows: The gradients of the K losses.
        gramian: Their inner products alone; None where rows are to be kept.
        weighted: The gradient of ``weights @ losses``.
        passes: How many backward passes rows or Gramian took.
    """

    params: tuple[Tensor, ...]
    rows: Callable[[], Jacobian]
    gramian: Callable[[], Float64[np.ndarray, "K K"]] | None
    weighted: Callable[[Float64[np.ndarray, " K"]], Sequence[Tensor | None]]
    passes: Callable[[], int]


def balance(
    means: Means,
    aggregator: Aggregator,
    values: Float64[np.ndarray, " K"],
    names: tuple[str, ...] | None,
    ranks: Ranks,
) -> Report:
    """Balances, and adds the direction to every ``param.grad``; a step that fails changes nothing.

    Raises:
        NonFiniteError: NaN or Inf in a loss or a gradient; it names the objective.
    """
    try:
        if not np.isfinite(values).all():
            raise NonFiniteError("loss", int(np.argmin(np.isfinite(values))))
        seen = values if needs_losses(aggregator) else np.ones(len(values))
        if aggregator.reads != "losses" and (means.gramian is None or not aggregator.yields_weights):
            return _from_rows(means, aggregator, values, seen, names, ranks)
        gramian = None
        if aggregator.reads != "losses":
            assert means.gramian is not None
            gramian = _finite(means.gramian())
        with aggregator.undone_on_failure():
            solution = aggregator._checked(gramian, seen)
            _add(_weighted(means, solution, ranks))
    except NonFiniteError as error:
        name = None if names is None or error.index is None else names[error.index]
        raise NonFiniteError(error.what, error.index, name) from None
    spent = 1 if gramian is None else means.passes() + 1
    return make_report(values, names, solution, gramian, spent)


def add_weighted(means: Means, weights: Float64[np.ndarray, " K"]) -> None:
    """Adds the gradient of ``weights @ losses`` to every ``param.grad``."""
    _add(_weighted(means, Solution(weights), Ranks(None)))


def _from_rows(
    means: Means,
    aggregator: Aggregator,
    values: Float64[np.ndarray, " K"],
    seen: Float64[np.ndarray, " K"],
    names: tuple[str, ...] | None,
    ranks: Ranks,
) -> Report:
    jacobian = means.rows()
    if not ranks.alone:
        jacobian = mean_rows(ranks, means.params, list(jacobian.blocks), whole=not aggregator.yields_weights)
    direction, gramian, solution = aggregator.direct(jacobian, seen)
    _add(zip(means.params, direction, strict=True))
    plain = direction if isinstance(aggregator, JacobianAggregator) else None
    return make_report(values, names, solution, gramian, means.passes(), jacobian=jacobian, direction=plain)


def _weighted(means: Means, solution: Solution, ranks: Ranks) -> list[tuple[Tensor, Tensor]]:
    grads = means.weighted(solution.weights)
    present = [(param, grad) for param, grad in zip(means.params, grads, strict=True) if grad is not None]
    ranks.average([grad for _, grad in present])
    if not all_finite([grad for _, grad in present]):
        raise NonFiniteError("direction", None)
    return present


def _add(updates: Iterable[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for param, grad in updates:
            if param.grad is None:
                param.grad = grad.detach().to(param.dtype).clone()
            else:
                param.grad.add_(grad)


def _finite(gramian: Float64[np.ndarray, "K K"]) -> Float64[np.ndarray, "K K"]:
    if not np.isfinite(gramian).all():
        raise NonFiniteError("gradient", int(np.argmin(np.isfinite(gramian.diagonal()))))
    return gramian
