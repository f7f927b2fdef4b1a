"""The gradient of ``weights @ losses``, in one backward pass.

Shapes: K = objectives.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from numpy import ndarray
from torch import Tensor

from mogb.engines.differentiate import Update, averaged, differentiate, present
from mogb.engines.distributed import Ranks, local_part
from mogb.engines.losses import Losses
from mogb.engines.plan import Plan
from mogb.jacobian import all_finite


def weighted_updates(
    losses: Losses, plan: Plan, weights: Float64[ndarray, " K"], ranks: Ranks, factor: float, *, retain_graph: bool
) -> tuple[list[Update], int]:
    """What the shared parameters and those of single objectives get, averaged over the ranks; and the passes spent.

    The parameters of one objective alone get its plain gradient, which is the weighted one over its weight; only an
    objective of weight zero that has such parameters costs a pass of its own.

    Args:
        losses: The losses.
        plan: What is differentiated.
        weights: On the raw gradients.
        ranks: Those that share the step.
        factor: All losses are multiplied with it.
        retain_graph: Keep the graph.
    """
    muted = [k for k, mine in enumerate(plan.own) if any(_loses_digits(weights[k], param.dtype) for param in mine)]
    targets = plan.shared + tuple(param for k, mine in enumerate(plan.own) if k not in muted for param in mine)
    updates: list[Update] = []
    if targets:
        # In float32 at least: a weight may be larger than half precision can hold.
        total = losses.scalars[0].new_zeros((), dtype=torch.promote_types(losses.scalars[0].dtype, torch.float32))
        for loss, weight in zip(losses.scalars, weights, strict=True):
            total = total + loss.to(total.dtype) * float(weight)
        seed = torch.full_like(total, factor)
        grads = differentiate(total, seed, targets, retain_graph=retain_graph or bool(muted))
        updates += list(zip(plan.shared, _filled(plan.shared, grads), strict=True))
        rest = iter(grads[len(plan.shared) :])
        for k, mine in enumerate(plan.own):
            if k not in muted:
                updates += [
                    (param, grad / float(weights[k])) for param, grad in present(mine, [next(rest) for _ in mine])
                ]
    for position, k in enumerate(muted):
        keep = retain_graph or position < len(muted) - 1
        seed = losses.seeds[k] * factor
        updates += present(plan.own[k], differentiate(losses.roots[k], seed, plan.own[k], retain_graph=keep))
    return averaged(ranks, updates), bool(targets) + len(muted)


def guilty(losses: Losses, plan: Plan) -> int | None:
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
        grads = differentiate(losses.roots[index], losses.seeds[index], targets, retain_graph=True)
    except RuntimeError:
        return None
    return all_finite([local_part(grad) for grad in grads if grad is not None])


def _filled(targets: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients of the first parameters, zero where no loss reaches one."""
    return [torch.zeros_like(t) if g is None else g for t, g in zip(targets, grads, strict=False)]


def _loses_digits(weight: float, dtype: torch.dtype) -> bool:
    """Whether a gradient times this weight, divided by it again, may not be what it was."""
    small, large = (1e-2, 1e2) if dtype == torch.float16 else (1e-12, 1e12)
    return not small < abs(weight) < large
