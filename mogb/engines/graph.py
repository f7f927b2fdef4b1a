"""Which parameters does each loss reach? Answered from the autograd graph, without a backward pass.

Shapes: K = objectives.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


def reached_leaves(roots: Sequence[Tensor | GradientEdge]) -> tuple[list[Tensor], list[frozenset[int]]]:
    """The leaves that any root reaches, in the order found, and for each root the ids of those that it reaches."""
    leaves: dict[int, Tensor] = {}
    reached = []
    for root in roots:
        edge = root if isinstance(root, GradientEdge) else get_gradient_edge(root)
        mine = _leaves_below(edge.node)
        leaves.update(mine)
        reached.append(frozenset(mine))
    return list(leaves.values()), reached


def _leaves_below(root: Any) -> dict[int, Tensor]:
    leaves: dict[int, Tensor] = {}
    seen = set()
    todo = [root]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves[id(variable)] = variable
        todo.extend(child for child, _ in node.next_functions)
    return leaves
