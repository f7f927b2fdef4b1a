r"""One call in place of ``loss.backward()``: K losses in, one direction in every ``param.grad`` out.

.. math::  J_k = \nabla_\theta L_k, \qquad \texttt{param.grad} \mathrel{+}= d(J)

Everything is computed before the first ``.grad`` is touched: a step that fails leaves them as they were.

Shapes: K = objectives.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from mogb.base import Aggregator, JacobianAggregator, Solution, needs_losses
from mogb.engines.distributed import (
    Exchange,
    GroupChoice,
    Ranks,
    describe_step,
    find_ranks,
    is_sharded,
    local_part,
    sharded_like,
)
from mogb.engines.graph import reached_leaves, reaches
from mogb.engines.losses import Losses, as_losses, as_parameters
from mogb.engines.report import Report, make_report
from mogb.engines.shards import mean_rows
from mogb.errors import NonFiniteError
from mogb.jacobian import Jacobian, all_finite


@dataclass(frozen=True, eq=False)
class Plan:
    """Which parameters are balanced, and which belong to one objective alone.

    Attributes:
        shared: Get the balanced direction.
        own: For every objective, the parameters that only it reaches: they get its plain gradient.
    """

    shared: tuple[Tensor, ...]
    own: tuple[tuple[Tensor, ...], ...]


def backward(
    losses: Losses | Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    params: nn.Module | Iterable[Tensor] | None,
    aggregator: Aggregator,
    *,
    num_samples: int | float | None = None,
    process_group: GroupChoice = "default",
    exchange: Exchange = "auto",
    retain_graph: bool = False,
) -> Report:
    """Differentiates K losses, combines the gradients, and adds the direction to every ``param.grad``.

    Methods that read only losses cost one backward pass, the others K. Clipping, the optimizer and its schedule come
    after, unchanged.

    Args:
        losses: A tensor ``[K]``, a sequence of scalars, or a mapping from names to scalars (names then appear in the
            report). They may share one graph or not.
        params: The parameters to balance (a module stands for its parameters; frozen ones are skipped). None: those
            that two or more losses reach are balanced, and the others, such as the heads of a multi-task model, get
            the plain gradient of the one loss that reaches them.
        aggregator: A method, from :func:`mogb.make`.
        num_samples: This rank's number of samples, where the ranks' batches differ: its share of the mean gradient.
        process_group: The ranks whose gradients are averaged before the Gramian: those of ``torch.distributed`` if it
            is initialised, another group, or None to balance this process alone. Models may be plain, wrapped in
            ``DistributedDataParallel``, or sharded by ``fully_shard`` (pass the module or its parameters then: the
            graph does not show them). Every rank gets the same weights, to the bit.
        exchange: How ranks average rows that all of them hold: ``"rows"`` (one bucketed all-reduce), ``"shards"``
            (each rank keeps some columns of all rows, and the direction is gathered: (K+1) / 2K of the bytes, 1/W of
            the memory), or ``"auto"``: shards from 2^20 numbers in the rows on, unless the method reads whole rows.
        retain_graph: Keep the graph for another backward pass.

    Raises:
        TypeError: Inputs of the wrong kind, or complex or sparse gradients.
        ValueError: Losses without a graph or that reach none of the parameters, or parameters that need no gradient.
        NonFiniteError: NaN or Inf in a loss or a gradient; it names the objective. Every ``.grad`` is untouched.
        DistributedError: Another rank died, or did not answer in time.
        RuntimeError: The graph was already freed.

    Examples:
        >>> import mogb
        >>> weight = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> losses = torch.stack([(weight - 2).square().sum(), weight.square().sum()])
        >>> report = mogb.backward(losses, [weight], mogb.make("mgda"))
        >>> weight.grad
        tensor([0., 0.])
    """
    if not isinstance(aggregator, Aggregator):
        raise TypeError(f"aggregator must be a method, such as mogb.make('mgda'), but got {aggregator!r}.")
    found = as_losses(losses)
    plan = make_plan(found, params)
    ranks = find_ranks(process_group, num_samples, exchange, step=describe_step(len(found), plan.shared, aggregator))
    if ranks.alone and any(is_sharded(param) for param in plan.shared):
        raise ValueError(
            "process_group=None balances this process alone, but the parameters are sharded over several: leave "
            "process_group out, or pass the group that they are sharded over."
        )
    values = checked_values(found, ranks)
    if aggregator.reads == "losses":
        with aggregator.undone_on_failure():
            solution = aggregator._checked(None, values if needs_losses(aggregator) else np.ones(len(found)))
            passes = weighted_backward(found, plan, solution, ranks, retain_graph=retain_graph)
        return make_report(values, found.names, solution, None, passes)
    return _balanced_backward(found, plan, aggregator, values, ranks, retain_graph)


def checked_values(losses: Losses, ranks: Ranks) -> Float64[np.ndarray, " K"]:
    """The loss values of the whole batch.

    Raises:
        NonFiniteError: A loss is NaN or Inf, on any rank; it names the objective.
    """
    values = ranks.mean_losses(losses.values())
    if not np.isfinite(values).all():
        index = int(np.argmin(np.isfinite(values)))
        raise NonFiniteError("loss", index, losses.label(index))
    return values


def make_plan(losses: Losses, params: nn.Module | Iterable[Tensor] | None) -> Plan:
    """Tells shared parameters from those of one objective.

    Raises:
        ValueError: A loss that reaches none of the parameters.
    """
    if params is not None:
        shared = as_parameters(params)
        if any(is_sharded(param) for param in shared):  # their graph holds the gathered parameters, not the shards
            return Plan(shared, ((),) * len(losses))
        wanted = frozenset(id(param) for param in shared)
        for index, root in enumerate(losses.roots):
            if not reaches(root, wanted):
                raise ValueError(
                    f"{losses.describe(index)} does not depend on any of the {len(shared)} parameters in params: leave "
                    "it out, or pass the parameters that it depends on."
                )
        return Plan(shared, ((),) * len(losses))
    leaves, reached = reached_leaves(losses.roots)
    counts = {id(leaf): sum(id(leaf) in mine for mine in reached) for leaf in leaves}
    for leaf in leaves:
        if leaf.is_complex():
            raise TypeError(f"A parameter of shape {list(leaf.shape)} is complex, which balancing does not define.")
    own = tuple(tuple(leaf for leaf in leaves if counts[id(leaf)] == 1 and id(leaf) in mine) for mine in reached)
    return Plan(tuple(leaf for leaf in leaves if counts[id(leaf)] >= 2), own)


def weighted_backward(losses: Losses, plan: Plan, solution: Solution, ranks: Ranks, *, retain_graph: bool) -> int:
    """Adds the gradient of ``weights @ losses`` to the shared parameters, in one backward pass.

    The parameters of one objective alone get its plain gradient, which is the weighted one over its weight; only an
    objective of weight zero that has such parameters costs a pass of its own. Returns the number of passes.
    """
    weights = solution.weights
    muted = [k for k, mine in enumerate(plan.own) if any(_loses_digits(weights[k], param.dtype) for param in mine)]
    targets = plan.shared + tuple(param for k, mine in enumerate(plan.own) if k not in muted for param in mine)
    total = losses.scalars[0].new_zeros(())
    for loss, weight in zip(losses.scalars, weights, strict=True):
        total = total + loss * float(weight)
    updates: list[tuple[Tensor, Tensor]] = []
    if targets:
        seed = torch.full_like(total, ranks.share)
        grads = _differentiate(total, seed, targets, retain_graph or bool(muted))
        updates += list(zip(plan.shared, _filled(plan.shared, grads), strict=True))
        rest = iter(grads[len(plan.shared) :])
        for k, mine in enumerate(plan.own):
            if k not in muted:
                updates += [
                    (param, grad / float(weights[k])) for param, grad in _present(mine, [next(rest) for _ in mine])
                ]
    for position, k in enumerate(muted):
        keep = retain_graph or position < len(muted) - 1
        updates += _present(plan.own[k], _gradient(losses, k, plan.own[k], keep, ranks.share))
    updates = _averaged(ranks, updates)
    if ranks.any(not all_finite([local_part(grad) for _, grad in updates])):
        guilty = _guilty(losses, plan)
        raise NonFiniteError("gradient", guilty, losses.label(guilty))
    _add(updates)
    return bool(targets) + len(muted)


def _balanced_backward(
    losses: Losses,
    plan: Plan,
    aggregator: Aggregator,
    values: Float64[np.ndarray, " K"],
    ranks: Ranks,
    retain_graph: bool,
) -> Report:
    if not aggregator.yields_weights and any(is_sharded(param) for param in plan.shared):
        raise ValueError(
            f"{aggregator.name!r} reads whole rows of the Jacobian, but the parameters are sharded: no rank has whole "
            "rows. Use a method that yields weights, or DistributedDataParallel."
        )
    jacobian, own = _rows(losses, plan, ranks, retain_graph, whole=not aggregator.yields_weights)
    if not all_finite([grad for _, grad in own]):
        guilty = _first_bad(own, plan)
        raise NonFiniteError("gradient", guilty, losses.label(guilty))
    if not plan.shared:
        _add(own)
        solution = Solution(np.ones(len(losses)), note="no parameter is shared: every gradient is plain")
        return make_report(values, losses.names, solution, None, len(losses))
    try:
        direction, gramian, solution_or_none = aggregator.direct(
            jacobian, values if needs_losses(aggregator) else np.ones(len(losses))
        )
    except NonFiniteError as error:
        raise NonFiniteError(error.what, error.index, losses.label(error.index)) from None
    _add(own + list(zip(plan.shared, direction, strict=True)))
    return make_report(
        values,
        losses.names,
        solution_or_none,
        gramian,
        len(losses),
        jacobian=jacobian,
        direction=direction if isinstance(aggregator, JacobianAggregator) else None,
    )


def _rows(
    losses: Losses, plan: Plan, ranks: Ranks, retain_graph: bool, *, whole: bool
) -> tuple[Jacobian, list[tuple[Tensor, Tensor]]]:
    """K backward passes: the rows of the shared parameters, and the plain gradients of the others."""
    size = len(losses)
    blocks = [local_part(param.detach()).new_zeros((size, *local_part(param.detach()).shape)) for param in plan.shared]
    own: list[tuple[Tensor, Tensor]] = []
    for k in range(size):
        mine = plan.own[k]
        grads = _gradient(losses, k, plan.shared + mine, retain_graph or k < size - 1, ranks.share)
        for block, grad in zip(blocks, grads, strict=False):
            if grad is not None:
                block[k] = local_part(grad)
        own += _present(mine, grads[len(plan.shared) :])
    return mean_rows(ranks, plan.shared, blocks, whole=whole), _averaged(ranks, own)


def _gradient(
    losses: Losses, index: int, targets: Sequence[Tensor], retain_graph: bool, share: float = 1.0
) -> tuple[Tensor | None, ...]:
    seed = losses.seeds[index]
    return _differentiate(losses.roots[index], seed if share == 1.0 else seed * share, targets, retain_graph)


def _differentiate(
    root: Tensor | GradientEdge, seed: Tensor, targets: Sequence[Tensor], retain_graph: bool
) -> tuple[Tensor | None, ...]:
    if any(is_sharded(target) for target in targets):
        return _differentiate_sharded(root, seed, targets, retain_graph)
    grads = torch.autograd.grad(root, targets, seed, retain_graph=retain_graph, allow_unused=True)
    for target, grad in zip(targets, grads, strict=True):
        if grad is not None and grad.layout != torch.strided:
            raise TypeError(
                f"The gradient of a parameter of shape {list(target.shape)} is sparse ({grad.layout}), which balancing "
                "does not support: use Embedding(..., sparse=False)."
            )
    return grads


def _differentiate_sharded(
    root: Tensor | GradientEdge, seed: Tensor, targets: Sequence[Tensor], retain_graph: bool
) -> tuple[Tensor | None, ...]:
    """Through ``.grad``: only there does ``fully_shard`` leave its reduced shards. What was there is put back."""
    others, _ = reached_leaves([root])
    kept = [target.grad for target in targets]
    kept_others = [None if other.grad is None else other.grad.clone() for other in others]
    try:
        for target in targets:
            target.grad = None
        torch.autograd.backward(root, seed, retain_graph=retain_graph)
        return tuple(target.grad for target in targets)
    finally:
        for target, grad in zip((*others, *targets), (*kept_others, *kept), strict=True):
            target.grad = grad


def _averaged(ranks: Ranks, updates: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The updates averaged over the ranks; what is sharded arrives averaged."""
    plain = iter(ranks.average([grad for param, grad in updates if not is_sharded(param)]))
    return [(param, grad if is_sharded(param) else next(plain)) for param, grad in updates]


def _filled(targets: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients of the first parameters, zero where no loss reaches one."""
    return [torch.zeros_like(t) if g is None else g for t, g in zip(targets, grads, strict=False)]


def _loses_digits(weight: float, dtype: torch.dtype) -> bool:
    """Whether a gradient times this weight, divided by it again, may not be what it was."""
    small, large = (1e-2, 1e2) if dtype == torch.float16 else (1e-12, 1e12)
    return not small < abs(weight) < large


def _present(targets: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    return [(target, grad) for target, grad in zip(targets, grads, strict=True) if grad is not None]


def _add(updates: Iterable[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for param, grad in updates:
            if param.grad is not None:
                local_part(param.grad).add_(local_part(grad).reshape(local_part(param.grad).shape))
            elif is_sharded(param) and not is_sharded(grad):  # a direction made of local shards
                param.grad = sharded_like(param, grad)
            else:
                param.grad = grad.detach().to(param.dtype).reshape(param.shape).clone()


def _guilty(losses: Losses, plan: Plan) -> int | None:
    """Which loss has the bad gradient; asked only after a combined one turned out to be bad, and then by elimination.

    Losses whose part of the graph is still whole are differentiated again. Of the others, one alone must be it.
    """
    fine = [_has_finite_gradient(losses, k, plan.shared + plan.own[k]) for k in range(len(losses))]
    if False in fine:
        return fine.index(False)
    return fine.index(None) if fine.count(None) == 1 else None


def _has_finite_gradient(losses: Losses, index: int, targets: Sequence[Tensor]) -> bool | None:
    """None where the graph was freed."""
    try:
        grads = _gradient(losses, index, targets, retain_graph=True)
    except RuntimeError:
        return None
    return all_finite([local_part(grad) for grad in grads if grad is not None])


def _first_bad(own: Sequence[tuple[Tensor, Tensor]], plan: Plan) -> int | None:
    bad = {id(param) for param, grad in own if not all_finite([grad])}
    return next((k for k, mine in enumerate(plan.own) if any(id(param) in bad for param in mine)), None)
