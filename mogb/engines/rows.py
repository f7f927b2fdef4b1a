r"""The rows of the Jacobian: K backward passes, or one that carries K cotangents.

Shapes: K = objectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mogb.engines.differentiate import Update, differentiate, present, refuse_sparse
from mogb.engines.distributed import local_part
from mogb.engines.losses import Losses
from mogb.engines.plan import Plan
from mogb.jacobian import Jacobian


@dataclass(eq=False)
class Rows:
    """The gradients of K losses on this rank.

    Attributes:
        params: The parameters that are balanced, one block of the Jacobian each.
        jacobian: Their rows; None if there is no such parameter.
        own: The other parameters: the objective that reaches each, and its gradient.
        passes: Backward passes spent.
    """

    params: tuple[Tensor, ...]
    jacobian: Jacobian | None
    own: tuple[tuple[int, Update], ...]
    passes: int

    def take(self) -> Jacobian:
        """Hands the rows out and lets go of them, so that whoever sends them away can free them."""
        assert self.jacobian is not None
        jacobian, self.jacobian = self.jacobian, None
        return jacobian


def sequential_rows(
    losses: Losses, plan: Plan, factor: float, *, retain_graph: bool, into: Sequence[Tensor | None] = ()
) -> Rows:
    """One backward pass per loss.

    Args:
        losses: The losses.
        plan: What is differentiated.
        factor: All losses are multiplied with it.
        retain_graph: Keep the graph.
        into: For every shared parameter, rows ``[K, *shape]`` to add to; None where there are none yet.
    """
    size = len(losses)
    before = _given(plan.shared, into)
    blocks = [_empty(param, size) if rows is None else rows for param, rows in zip(plan.shared, before, strict=True)]
    own: list[tuple[int, Update]] = []
    for k in range(size):
        seed = losses.seeds[k] if factor == 1.0 else losses.seeds[k] * factor
        grads = differentiate(
            losses.roots[k], seed, plan.shared + plan.own[k], retain_graph=retain_graph or k < size - 1
        )
        for block, rows, grad in zip(blocks, before, grads, strict=False):
            if rows is not None and grad is not None:
                block[k] += local_part(grad)
            elif rows is None:
                block[k] = 0 if grad is None else local_part(grad)
        grads = grads[len(plan.shared) :]  # lets go of what was copied
        own += [(k, update) for update in present(plan.own[k], grads)]
    return Rows(plan.shared, Jacobian(tuple(blocks)) if blocks else None, tuple(own), size)


def batched_rows(
    losses: Losses, plan: Plan, factor: float, *, retain_graph: bool, into: Sequence[Tensor | None] = ()
) -> Rows:
    """One backward pass of all K unit cotangents at once, vectorized by ``torch.vmap``. Arguments as above.

    Raises:
        RuntimeError: A part of the graph can't be vectorized.
    """
    size, targets = len(losses), plan.targets
    roots: Any = losses.roots  # tensors, or edges of the graph
    unit = torch.eye(size, dtype=torch.float64) * factor
    seeds = [unit[:, k].to(seed.device, seed.dtype) for k, seed in enumerate(losses.seeds)]
    try:
        grads = torch.autograd.grad(
            roots, targets, seeds, retain_graph=retain_graph, allow_unused=True, is_grads_batched=True
        )
    except (RuntimeError, NotImplementedError) as error:
        if "second time" in str(error):
            raise
        raise RuntimeError(
            "engine='batched' failed, because a part of the graph can't be vectorized (an autograd.Function without a "
            f"vmap rule, sparse gradients, or a compiled module, for example): use engine='sequential'. "
            f"({str(error).partition('. ')[0][:300]})"
        ) from error
    refuse_sparse(targets, grads)
    blocks = []
    for param, before, grad in zip(plan.shared, _given(plan.shared, into), grads, strict=False):
        rows = param.detach().new_zeros((size, *param.shape)) if grad is None else grad
        blocks.append(rows if before is None else before.add_(rows))
    rest = iter(grads[len(plan.shared) :])
    found = [(k, param, next(rest)) for k, mine in enumerate(plan.own) for param in mine]
    own = tuple((k, (param, grad[k])) for k, param, grad in found if grad is not None)
    return Rows(plan.shared, Jacobian(tuple(blocks)) if blocks else None, own, 1)


def _given(params: Sequence[Tensor], into: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    return into or (None,) * len(params)


def _empty(param: Tensor, size: int) -> Tensor:
    local = local_part(param.detach())
    return local.new_empty((size, *local.shape))
