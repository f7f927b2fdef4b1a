r"""The Gramian block by block: rows are multiplied and dropped before the next ones are formed.

.. math::  G = \sum_b B_b B_b^\top , \qquad B_b = [K, N_b]

K cotangents walk down the graph together. It is cut where few numbers flow through it. From one cut to the next, K
backward passes give the K cotangents there and the rows of the parameters in between. All in all these are K backward
passes; what is alive at once are the rows of one block and the cotangents at two cuts, not K × N numbers.

Shapes: K = objectives, N = numbers in one gradient.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mogb.engines.differentiate import Root, refuse_sparse
from mogb.engines.distributed import Ranks
from mogb.engines.losses import Losses
from mogb.engines.plan import Plan
from mogb.engines.shards import mean_rows


@dataclass(frozen=True, eq=False)
class Segment:
    """A part of the graph between two cuts.

    Attributes:
        params: The positions of the parameters inside, among those that are balanced.
        exits: Where gradients leave it, towards the inputs.
    """

    params: tuple[int, ...]
    exits: tuple[GradientEdge, ...]


@dataclass(frozen=True, eq=False)
class Cut:
    """A place where the graph may be cut: nothing that flows out of it flows into something else that does.

    Attributes:
        position: How many parameters lie above.
        exits: The edges that cross it.
        width: Their bytes.
    """

    position: int
    exits: tuple[GradientEdge, ...]
    width: int


@dataclass(frozen=True, eq=False)
class Walk:
    """The way down the graph.

    Attributes:
        taken: The parameters in the order in which backward passes finish them.
        sizes: Their bytes.
        cuts: Where the graph may be cut in between: at each position, the narrowest place.
        left: Parameters that no loss reaches.
    """

    taken: tuple[int, ...]
    sizes: tuple[int, ...]
    cuts: tuple[Cut, ...]
    left: tuple[int, ...]

    def narrowest(self) -> tuple[tuple[int, ...], int]:
        """Where to cut so that as little as possible is alive at once, and the bytes of that for one objective."""
        start, end = Cut(0, (), 0), Cut(len(self.taken), (), 0)
        chosen, width = _narrowest([start, *self.cuts, end], self.sizes)
        return tuple(cut.position for cut in chosen[1:-1]), width

    def segments(self, positions: Sequence[int]) -> tuple[Segment, ...]:
        """The parts of the graph between the cuts at these positions."""
        at = {cut.position: cut for cut in self.cuts}
        chosen = [Cut(0, (), 0), *(at[position] for position in positions), Cut(len(self.taken), (), 0)]
        parts = [
            Segment(self.taken[before.position : after.position], after.exits) for before, after in pairwise(chosen)
        ]
        return (*parts[:-1], Segment(parts[-1].params + self.left, ()))


def streamed_gramian(
    losses: Losses, plan: Plan, segments: Sequence[Segment], ranks: Ranks, factor: float
) -> Float64[np.ndarray, "K K"]:
    """The Gramian of ``factor * losses`` over the shared parameters. The graph is kept."""
    size = len(losses)
    gramian = np.zeros((size, size))
    entries: list[list[tuple[Root, Tensor]]] = [[(losses.roots[k], losses.seeds[k] * factor)] for k in range(size)]
    for segment in segments:
        params = [plan.shared[index] for index in segment.params]
        blocks = [param.detach().new_empty((size, *param.shape)) for param in params]
        for k in range(size):
            grads = _pass_through(entries[k], (*params, *segment.exits))
            refuse_sparse(params, grads[: len(params)])
            for block, grad in zip(blocks, grads, strict=False):
                block[k] = 0 if grad is None else grad
            flowing = zip(segment.exits, grads[len(params) :], strict=True)
            entries[k] = [(edge, cotangent) for edge, cotangent in flowing if cotangent is not None]
            del grads
        if blocks:
            gramian += mean_rows(ranks, params, blocks, whole=False).gramian()
    return gramian


def _pass_through(entries: Sequence[tuple[Root, Tensor]], targets: Sequence[Any]) -> Sequence[Tensor | None]:
    if not entries or not targets:
        return (None,) * len(targets)
    roots, cotangents = zip(*entries, strict=True)
    return torch.autograd.grad(roots, targets, cotangents, retain_graph=True, allow_unused=True)


def walk_down(losses: Losses, plan: Plan) -> Walk:
    """Visits the nodes above the shared parameters, users first, as a backward pass does."""
    roots, params = losses.roots, plan.shared
    positions = {id(param): index for index, param in enumerate(params)}
    starts = [root if isinstance(root, GradientEdge) else get_gradient_edge(root) for root in roots]
    above = _above(starts, positions)
    waiting = _uses(starts, above)
    ready: list[tuple[int, int, Any]] = []
    open_edges: dict[Any, set[int]] = {}
    order = 0

    def open_edge(node: Any, output: int) -> None:
        open_edges.setdefault(node, set()).add(output)

    def arrive(node: Any) -> None:
        nonlocal order
        waiting[node] -= 1
        if waiting[node] == 0:
            order += 1
            heapq.heappush(ready, (-math.inf if _is_leaf(node) else -node._sequence_nr(), order, node))

    for edge in starts:
        if edge.node in above:
            open_edge(edge.node, edge.output_nr)
    for edge in starts:
        if edge.node in above:
            arrive(edge.node)
    taken: list[int] = []
    cuts: list[Cut] = []
    while ready:
        if len(ready) == len(open_edges) and not any(_is_leaf(node) for node in open_edges):
            exits = [GradientEdge(node, output) for node, outputs in open_edges.items() for output in sorted(outputs)]
            cuts.append(Cut(len(taken), tuple(exits), sum(map(_bytes, exits))))
        _, _, node = heapq.heappop(ready)
        del open_edges[node]
        if _is_leaf(node):
            taken.append(positions[id(node.variable)])
        below = [(child, output) for child, output in node.next_functions if child in above]
        for child, output in below:
            open_edge(child, output)
        for child, _ in below:
            arrive(child)
    sizes = tuple(params[index].numel() * params[index].element_size() for index in taken)
    between = tuple(cut for cut in _thinned(cuts) if 0 < cut.position < len(taken))
    return Walk(tuple(taken), sizes, between, tuple(sorted(set(range(len(params))) - set(taken))))


def _above(starts: Sequence[GradientEdge], positions: dict[int, int]) -> set[Any]:
    """The nodes from which a parameter can be reached, and those of the parameters themselves."""
    above: dict[Any, bool] = {}
    stack: list[tuple[Any, bool]] = [(edge.node, False) for edge in starts]
    while stack:
        node, done = stack.pop()
        if done:
            above[node] = above[node] or any(above.get(child, False) for child, _ in node.next_functions)
        elif node is not None and node not in above:
            above[node] = _is_leaf(node) and id(node.variable) in positions
            stack.append((node, True))
            stack += [(child, False) for child, _ in node.next_functions]
    return {node for node, wanted in above.items() if wanted}


def _uses(starts: Iterable[GradientEdge], above: set[Any]) -> dict[Any, int]:
    """How many edges lead to each node."""
    uses = dict.fromkeys(above, 0)
    for edge in starts:
        if edge.node in uses:
            uses[edge.node] += 1
    for node in above:
        for child, _ in node.next_functions:
            if child in uses:
                uses[child] += 1
    return uses


def _thinned(cuts: Sequence[Cut]) -> list[Cut]:
    """Of the cuts between the same two parameters, the narrowest one."""
    best: dict[int, Cut] = {}
    for cut in cuts:
        if cut.position not in best or cut.width < best[cut.position].width:
            best[cut.position] = cut
    return [best[position] for position in sorted(best)]


def _narrowest(cuts: Sequence[Cut], sizes: Sequence[int]) -> tuple[list[Cut], int]:
    """The chain of cuts, from the first to the last, whose widest segment is narrowest; of those, a shortest one."""
    offsets = [0, *np.cumsum(sizes, dtype=np.int64).tolist()]
    best: list[tuple[float, int, int]] = [(0.0, 0, -1)]  # width, segments, predecessor
    for j in range(1, len(cuts)):
        choice = (math.inf, 0, -1)
        for i in range(j - 1, -1, -1):
            rows = offsets[cuts[j].position] - offsets[cuts[i].position]
            if rows > choice[0]:
                break
            width = max(best[i][0], float(rows + cuts[i].width + cuts[j].width))
            choice = min(choice, (width, best[i][1] + 1, i))
        best.append(choice)
    chosen, j = [], len(cuts) - 1
    while j >= 0:
        chosen.append(cuts[j])
        j = best[j][2]
    return chosen[::-1], int(best[-1][0])


def _is_leaf(node: Any) -> bool:
    return type(node).__name__ == "AccumulateGrad"


def _bytes(edge: GradientEdge) -> int:
    metadata: Any = edge.node._input_metadata[edge.output_nr]
    return math.prod(metadata.shape) * metadata.dtype.itemsize
