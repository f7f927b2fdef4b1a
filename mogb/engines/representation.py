r"""Balancing on a shared representation: the K gradients stop at a tensor, and one pass goes on from there.

.. math::  g_k = \partial L_k / \partial Z , \qquad d = \Big( \frac{\partial Z}{\partial \theta} \Big)^{\!\top}
           \sum_k w_k g_k

The weights come from the gradients at Z, which are cheap: only the heads are passed K times. They bound the gradients
of the trunk from above, :math:`\|\nabla_\theta \sum_k w_k L_k\| \le \|\partial Z / \partial \theta\| \,
\|\sum_k w_k g_k\|`, hence "upper bound" (O. Sener and V. Koltun, Multi-Task Learning as Multi-Objective Optimization,
NeurIPS 2018, equation 5, MGDA-UB). Here any method may stand in place of min-norm.

Shapes: K = objectives.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from mogb.engines.differentiate import Update, averaged, present
from mogb.engines.distributed import Ranks, refuse_gathered, refuse_static_graph
from mogb.engines.graph import reached_above, reached_leaves
from mogb.engines.losses import Losses, as_parameters
from mogb.engines.plan import Plan, refuse_complex, split
from mogb.engines.rows import Rows, sequential_rows
from mogb.engines.source import GraphSource
from mogb.engines.weighted import guilty
from mogb.errors import NonFiniteError
from mogb.jacobian import Jacobian, all_finite


def as_representation(shared: Tensor | Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Checks the tensors that stand between the trunk and the heads.

    Raises:
        TypeError: Something that is no floating-point tensor.
        ValueError: None, or one that is a leaf or carries no graph.
    """
    tensors = (shared,) if isinstance(shared, Tensor) else tuple(shared)
    if not tensors:
        raise ValueError("shared is empty: pass the tensor between the shared part of the model and its heads.")
    for index, tensor in enumerate(tensors):
        label = "shared" if len(tensors) == 1 else f"shared[{index}]"
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{label} must be a floating-point tensor, but is {found}.")
        if tensor.grad_fn is None:
            raise ValueError(
                f"{label} of shape {list(tensor.shape)} was not computed from parameters: it is a leaf, or detached. "
                "Pass the output of the shared part of the model, or leave shared out."
            )
    return tensors


def plan_representation(losses: Losses, tensors: Sequence[Tensor], params: nn.Module | Iterable[Tensor] | None) -> Plan:
    """The trunk, which is what the tensors depend on, and the heads, which are the rest.

    Raises:
        ValueError: A loss that depends on none of the tensors, or on the trunk in another way too; a parameter above
            the tensors that several losses reach.
    """
    edges = [get_gradient_edge(tensor) for tensor in tensors]
    trunk, _ = reached_leaves(edges)
    below = {id(leaf) for leaf in trunk}
    heads: dict[int, Tensor] = {}
    reached = []
    for index, root in enumerate(losses.roots):
        leaves, met = reached_above(root, edges)
        if not met:
            raise ValueError(
                f"{losses.describe(index)} does not depend on shared: leave it out, or pass a tensor that all losses "
                "depend on."
            )
        if any(id(leaf) in below for leaf in leaves):
            raise ValueError(
                f"{losses.describe(index)} depends on parameters below shared in another way than through shared: "
                "name all tensors that lead from the shared part to the heads, or balance without shared."
            )
        heads.update({id(leaf): leaf for leaf in leaves})
        reached.append(frozenset(id(leaf) for leaf in leaves))
    wanted = None if params is None else {id(param) for param in as_parameters(params)}
    refuse_complex([*trunk, *heads.values()])
    refuse_gathered([*trunk, *heads.values()])
    refuse_static_graph(losses.roots, trunk)
    several, own = split(heads.values(), reached)
    if wanted is not None:
        trunk = [leaf for leaf in trunk if id(leaf) in wanted]
        several = tuple(leaf for leaf in several if id(leaf) in wanted)
        own = tuple(tuple(leaf for leaf in mine if id(leaf) in wanted) for mine in own)
    if several:
        raise ValueError(
            f"{len(several)} parameters above shared are reached by several losses, the first of shape "
            f"{list(several[0].shape)}: name tensors nearer to the losses, or balance without shared."
        )
    if not trunk:
        raise ValueError("shared depends on none of the parameters in params: pass those of the shared part.")
    return Plan(tuple(trunk), own)


class RepresentationSource(GraphSource):
    """Losses whose gradients stop at tensors."""

    engine = "representation"
    note = ""
    streams = False

    def __init__(
        self,
        losses: Losses,
        plan: Plan,
        tensors: tuple[Tensor, ...],
        ranks: Ranks,
        scale: float | None,
        *,
        retain_graph: bool,
    ) -> None:
        super().__init__(losses, plan, ranks, scale, retain_graph=retain_graph)
        self.tensors = tensors

    def rows(self, into: Sequence[tuple[Tensor, Tensor]] = ()) -> Rows:
        if into:
            raise ValueError("Gradients at a representation don't add up over micro-batches: each has its own samples.")
        heads = Plan(self.tensors, self.plan.own)
        return sequential_rows(self.losses, heads, self._factor, retain_graph=self.retain_graph)

    def joined(self, params: Sequence[Tensor], take: Callable[[], Jacobian], *, whole: bool) -> Jacobian:
        jacobian = take()
        if self.ranks.alone:
            return jacobian
        if whole:
            raise ValueError(
                "Each rank has the gradients at the representation of its own samples, but this method reads whole "
                "rows: use a method that yields weights, or balance without shared."
            )
        return Jacobian(jacobian.blocks, _OwnSamples(self.ranks, len(jacobian.blocks)))

    def land(self, params: Sequence[Tensor], direction: Sequence[Tensor]) -> tuple[list[Update], int]:
        """The one pass through the trunk."""
        trunk = self.plan.shared
        cotangents = [part.to(tensor.dtype) for part, tensor in zip(direction, params, strict=True)]
        grads = torch.autograd.grad(params, trunk, cotangents, retain_graph=self.retain_graph, allow_unused=True)
        updates = averaged(self.ranks, [(param, grad.clone()) for param, grad in present(trunk, grads)])
        if not all_finite([grad for _, grad in updates]):
            raise NonFiniteError("direction", None)
        return updates, 1

    def gramian(self) -> tuple[Float64[np.ndarray, "K K"], int]:
        raise NotImplementedError("Rows at a representation are kept.")

    def blame(self, suspect: int | None) -> NonFiniteError:
        return NonFiniteError("gradient", guilty(self.losses, self.plan) if suspect is None else suspect)


@dataclass(frozen=True, eq=False)
class _OwnSamples:
    """Ties the gradients at this rank's samples to those at the others': see :class:`mogb.jacobian.Across`."""

    ranks: Ranks
    count: int

    @property
    def sharded(self) -> tuple[bool, ...]:
        return (True,) * self.count

    def total(self, part: Float64[np.ndarray, "K K"]) -> Float64[np.ndarray, "K K"]:
        return self.ranks.total(part) / self.ranks.size**2  # rows are those of a sum over ranks, not of a mean

    def agree(self, gramian: Float64[np.ndarray, "K K"]) -> Float64[np.ndarray, "K K"]:
        return self.ranks.agree(gramian)

    def whole(self, direction: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(direction)

    def all(self, flag: bool) -> bool:
        return not self.ranks.any(not flag)
