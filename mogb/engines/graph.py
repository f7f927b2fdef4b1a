"""Which parameters does each loss reach? Answered from the autograd graph, without a backward pass.

Shapes: K = objectives.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


def reaches(root: Tensor | GradientEdge, wanted: frozenset[int]) -> bool:
    """Whether a root depends on any of the leaves with these ids. Depth first, so that the first one found ends it."""
    return any(id(leaf) in wanted for leaf in _leaves_below(root))


def reached_leaves(roots: Sequence[Tensor | GradientEdge]) -> tuple[list[Tensor], list[frozenset[int]]]:
    """The leaves that any root reaches, in the order found, and for each root the ids of those that it reaches."""
    leaves: dict[int, Tensor] = {}
    reached = []
    for root in roots:
        mine = {id(leaf): leaf for leaf in _leaves_below(root)}
        leaves.update(mine)
        reached.append(frozenset(mine))
    return list(leaves.values()), reached


def _leaves_below(root: Tensor | GradientEdge) -> Iterator[Tensor]:
    edge = root if isinstance(root, GradientEdge) else get_gradient_edge(root)
    seen = set()
    todo: list[Any] = [edge.node]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            yield node.variable
        todo.extend(child for child, _ in node.next_functions)
