"""One backward pass, its gradients returned instead of added to ``.grad``; and gradients added to ``.grad``."""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mogb.engines.distributed import Ranks, is_sharded, local_part, sharded_like
from mogb.engines.graph import reached_leaves

Root: TypeAlias = Tensor | GradientEdge
Update: TypeAlias = tuple[Tensor, Tensor]  # a parameter, and what is to be added to its .grad


def differentiate(
    root: Root, seed: Tensor, targets: Sequence[Tensor], *, retain_graph: bool
) -> tuple[Tensor | None, ...]:
    """The gradient of one root; None for a target that it does not reach.

    Raises:
        TypeError: A gradient is sparse.
        RuntimeError: The graph was already freed.
    """
    if any(is_sharded(target) for target in targets):
        return _differentiate_sharded(root, seed, targets, retain_graph)
    grads = torch.autograd.grad(root, targets, seed, retain_graph=retain_graph, allow_unused=True)
    refuse_sparse(targets, grads)
    return grads


def refuse_sparse(targets: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Raises TypeError for a sparse gradient."""
    for target, grad in zip(targets, grads, strict=True):
        if grad is not None and grad.layout != torch.strided:
            raise TypeError(
                f"The gradient of a parameter of shape {list(target.shape)} is sparse ({grad.layout}), which balancing "
                "does not support: use Embedding(..., sparse=False)."
            )


def present(targets: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Update]:
    """What there is to add: nothing where no loss reaches a target."""
    return [(target, grad) for target, grad in zip(targets, grads, strict=True) if grad is not None]


def averaged(ranks: Ranks, updates: Sequence[Update]) -> list[Update]:
    """The updates averaged over the ranks; what is sharded arrives averaged."""
    plain = iter(ranks.average([grad for param, grad in updates if not is_sharded(param)]))
    return [(param, grad if is_sharded(param) else next(plain)) for param, grad in updates]


def add_to_grads(updates: Iterable[Update], *, fresh: bool = False) -> None:
    """Adds to every ``.grad``; ``fresh`` if nobody else holds what is added, so that it needs no copy."""
    with torch.no_grad():
        for param, grad in updates:
            if param.grad is not None:
                local_part(param.grad).add_(local_part(grad).reshape(local_part(param.grad).shape))
            elif is_sharded(param) and not is_sharded(grad):  # a direction made of local shards
                param.grad = sharded_like(param, grad)
            else:
                own = grad.detach().to(param.dtype).reshape(param.shape)
                param.grad = own if fresh else own.clone()


def _differentiate_sharded(
    root: Root, seed: Tensor, targets: Sequence[Tensor], retain_graph: bool
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
