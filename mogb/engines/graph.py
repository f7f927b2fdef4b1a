"""Which parameters does each loss reach? Answered from the autograd graph, without a backward pass.

Shapes: K = objectives.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
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


def reached_above(root: Tensor | GradientEdge, edges: Collection[GradientEdge]) -> tuple[list[Tensor], bool]:
    """The leaves that a root reaches without passing through any of some edges, and whether it meets one of these."""
    stops = {(edge.node, edge.output_nr) for edge in edges}
    start = root if isinstance(root, GradientEdge) else get_gradient_edge(root)
    todo: list[tuple[Any, int]] = [(start.node, start.output_nr)]
    seen, leaves, met = set(), [], False
    while todo:
        edge = todo.pop()
        node = edge[0]
        if edge in stops:
            met = True
        elif node is not None and node not in seen:
            seen.add(node)
            if type(node).__name__ == "AccumulateGrad":
                leaves.append(node.variable)
            todo.extend(node.next_functions)
    return leaves, met


def nodes_below(roots: Iterable[Tensor | GradientEdge]) -> Iterator[Any]:
    """Every node of the graphs of some roots, once, depth first."""
    todo: list[Any] = [(root if isinstance(root, GradientEdge) else get_gradient_edge(root)).node for root in roots]
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        todo.extend(child for child, _ in node.next_functions)


def _leaves_below(root: Tensor | GradientEdge) -> Iterator[Tensor]:
    return (node.variable for node in nodes_below([root]) if type(node).__name__ == "AccumulateGrad")
