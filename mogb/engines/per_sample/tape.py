"""Gradient checkpointing with one recomputation for all passes.

Of a checkpointed segment only the inputs are kept. An ordinary backward pass, which reaches a segment with one
cotangent, computes it again each time. The tape instead walks the segments from the last to the first, and sends the
cotangents of all passes through a segment before it moves on: one recomputation, whatever the number of passes.

Shapes: R = passes.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

from mogb.engines.per_sample.errors import UnsupportedLayerError
from mogb.engines.per_sample.rows import Collector
from mogb.engines.per_sample.taps import Hub

Edge = tuple[Any, int]  # a node of the graph, and which of its outputs
Arrived = list[Tensor | None]  # cotangents, one for each of the R passes
Places = Sequence[Tensor] | Sequence[GradientEdge]


@dataclass(frozen=True, eq=False)
class Leaves:
    """A nest of arguments or results, flattened: where the tensors were, and all the rest."""

    form: TreeSpec
    constants: tuple[Any, ...]
    is_tensor: tuple[bool, ...]

    @classmethod
    def of(cls, nest: Any) -> "tuple[Leaves, list[Tensor]]":
        """Takes a nest apart."""
        leaves, form = tree_flatten(nest)
        is_tensor = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return cls(form, constants, is_tensor), [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """The nest with these tensors in it."""
        rest = iter(tensors)
        leaves = [next(rest) if t else constant for t, constant in zip(self.is_tensor, self.constants, strict=True)]
        return tree_unflatten(leaves, self.form)


@dataclass(frozen=True, eq=False)
class Segment:
    """A call that can be repeated.

    Attributes:
        hub: The taps that record it.
        number: Segments that were called later have larger ones.
        function: What was called.
        arguments: Its arguments, without the tensors.
        random: The states of the generators before the call: of the CPU, the other devices, and theirs.
        autocast: For each type of device: whether it was enabled, and its dtype.
        returned: What the call returned, without the tensors.
    """

    hub: Hub
    number: int
    function: Callable[..., Any]
    arguments: Leaves
    random: tuple[Tensor, list[int], list[Tensor]]
    autocast: dict[str, tuple[bool, torch.dtype]]
    returned: list[Leaves] = field(default_factory=list)

    def call(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Makes the call; the tensors that it returns."""
        args, kwargs = self.arguments.filled(tensors)
        returned, outputs = Leaves.of(self.function(*args, **kwargs))
        self.returned[:] = [returned]
        return outputs

    def again(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Repeats the call under the conditions of the first time, with gradients."""
        cpu, devices, states = self.random
        kind = next((tensor.device.type for tensor in tensors if tensor.device.type != "cpu"), "cuda")
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices, device_type=kind))
            torch.set_rng_state(cpu)
            if devices:
                set_device_states(devices, states, device_type=kind)
            for device, (enabled, dtype) in self.autocast.items():
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            stack.enter_context(torch.enable_grad())
            return self.call(tensors)


class Run(torch.autograd.Function):
    """A segment in the graph. While the tape runs, backward passes end here: the tape goes on by itself."""

    @staticmethod
    def forward(ctx: Any, segment: Segment, count: int, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.segment, ctx.count, ctx.params = segment, count, tensors[count:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:count])
        segment.hub.recording = True
        try:
            outputs = segment.call(tensors[:count])
        finally:
            segment.hub.recording = False
        ctx.outputs = len(outputs)
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        hub = ctx.segment.hub
        inputs = _leaves(ctx.saved_tensors) if not hub.cut else []
        grads: dict[int, Tensor | None] = {}
        if not hub.cut and any(cotangent is not None for cotangent in cotangents):
            watched = ctx.params if hub.listener is None else tuple(p for p in ctx.params if id(p) in hub.watched)
            targets = [*(leaf for leaf in inputs if leaf.requires_grad), *watched]
            found = pull(ctx.segment.again(inputs), cotangents, [*targets, hub.anchor], retain_graph=False)
            grads = dict(zip(map(id, targets), found, strict=False))
        nothing: tuple[Tensor | None, ...] = (None,) * (3 + ctx.count - len(inputs))
        return nothing + tuple(grads.get(id(tensor)) for tensor in (*inputs, *ctx.params))


def checkpoint(hub: Hub, model: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function or a module, and keeps only its arguments for the backward pass."""
    arguments, tensors = Leaves.of((args, kwargs))
    owner = getattr(function, "__self__", function)
    params = [p for p in (owner if isinstance(owner, nn.Module) else model).parameters() if p.requires_grad]
    kinds = {"cpu"} | {tensor.device.type for tensor in tensors}
    random = (torch.get_rng_state(), *get_device_states(*tensors))
    autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}
    hub.segments += 1
    segment = Segment(hub, hub.segments, function, arguments, random, autocast)
    outputs = Run.apply(segment, len(tensors), hub.anchor, *tensors, *params)
    return segment.returned[0].filled(outputs)


class Tape:
    """Walks checkpointed segments from the last to the first, with R cotangents at once.

    Args:
        hub: The taps.
        params: A segment must not get one of them as an argument.
        targets: Leaves whose gradients are asked for in every piece of the graph.
        collector: Told which pass is running, and when a segment is done.

    Attributes:
        grads: What was found for the targets, a list for every piece and pass.
    """

    def __init__(self, hub: Hub, params: Sequence[Tensor], targets: Sequence[Tensor], collector: Collector) -> None:
        self.hub, self.targets, self.collector = hub, targets, collector
        self.params = {id(param) for param in params}
        self.grads: list[Sequence[Tensor | None]] = []
        self._arrived: dict[Edge, Arrived] = {}
        self._below: dict[Any, set[Any]] = {}

    def run(self, outputs: Places, cotangents: Sequence[Sequence[Tensor]]) -> bool:
        """Sends R cotangents through all that is below the outputs, unless there is no segment."""
        output: Any
        for number, output in enumerate(outputs):
            self._add(_edge(output), [parts[number] for parts in cotangents])
        if self._last_segment() is None:
            return False
        while (last := self._last_segment()) is not None:
            above = [edge for edge in self._arrived if edge[0] is not last and last in self._runs_below(edge[0])]
            if above:
                self._through_pieces(above)
            else:
                self._through_segment(last)
        self._through_pieces(list(self._arrived))
        return True

    def _through_pieces(self, edges: Sequence[Edge]) -> None:
        """From some edges through ordinary operations, to the segments right below."""
        arrived = [self._arrived.pop(edge) for edge in edges]
        runs = {run for edge in edges for run in self._runs_below(edge[0])}
        ends = [(run, number) for run in runs for number in range(run.outputs)]
        starts = [GradientEdge(*edge) for edge in edges]
        self.hub.cut = True
        try:
            found = self._pull(starts, arrived, [GradientEdge(*end) for end in ends], retain_graph=True)
        finally:
            self.hub.cut = False
        for end, grads in zip(ends, found, strict=True):
            self._add(end, grads)

    def _through_segment(self, run: Any) -> None:
        """Computes a segment once more, and goes through it."""
        originals = run.saved_tensors
        inputs = _leaves(originals)
        outputs = run.segment.again(inputs)
        arrived = {n: self._arrived.pop((run, n)) for n in range(run.outputs) if (run, n) in self._arrived}
        leaves = [n for n, leaf in enumerate(inputs) if leaf.requires_grad]
        found = self._pull(
            [outputs[n] for n in arrived], list(arrived.values()), [inputs[n] for n in leaves], retain_graph=False
        )
        self.collector.segment_done()
        for n, grads in zip(leaves, found, strict=True):
            self._add(_edge(originals[n]), grads)

    def _pull(
        self,
        outputs: Places,
        arrived: Sequence[Arrived],
        inputs: Places,
        *,
        retain_graph: bool,
    ) -> list[Arrived]:
        """R backward passes through one piece; for every input, what arrives there."""
        found = []
        passes = len(arrived[0]) if arrived else 0
        for number in range(passes):
            self.collector.current = number
            keep = retain_graph or number < passes - 1
            grads = pull(outputs, [parts[number] for parts in arrived], [*self.targets, *inputs], retain_graph=keep)
            self.grads.append(grads[: len(self.targets)])
            found.append(grads[len(self.targets) :])
        return [list(parts) for parts in zip(*found, strict=True)]

    def _add(self, edge: Edge, grads: Arrived) -> None:
        leaf = getattr(edge[0], "variable", None)
        if leaf is not None and id(leaf) in self.params:
            raise UnsupportedLayerError("A parameter was passed to a checkpointed call as an argument.")
        if leaf is not None or all(grad is None for grad in grads):
            return
        before = self._arrived.get(edge, [None] * len(grads))
        self._arrived[edge] = [
            new if old is None else old if new is None else old + new for old, new in zip(before, grads, strict=True)
        ]

    def _last_segment(self) -> Any:
        runs = {run for node, _ in self._arrived for run in self._runs_below(node)}
        return max(runs, key=lambda run: run.segment.number, default=None)

    def _runs_below(self, node: Any) -> set[Any]:
        """The segments that are reached from a node without passing another segment; itself, if it is one."""
        if node not in self._below:
            found: set[Any] = set()
            seen: set[Any] = set()
            todo: list[Any] = [node]
            while todo:
                at = todo.pop()
                if at is None or at in seen:
                    continue
                seen.add(at)
                if _is_run(at) and at.segment.hub is self.hub:
                    found.add(at)
                else:
                    todo.extend(child for child, _ in at.next_functions)
            self._below[node] = found
        return self._below[node]


def pull(
    outputs: Places,
    cotangents: Sequence[Tensor | None],
    inputs: Sequence[Tensor | GradientEdge],
    *,
    retain_graph: bool,
) -> tuple[Tensor | None, ...]:
    """One backward pass; outputs without a cotangent, or off the graph, take no part."""
    places: Sequence[Any] = outputs
    pairs = [
        (output, cotangent)
        for output, cotangent in zip(places, cotangents, strict=True)
        if cotangent is not None and (isinstance(output, GradientEdge) or output.requires_grad)
    ]
    if not pairs:
        return (None,) * len(inputs)
    roots, seeds = zip(*pairs, strict=True)
    return torch.autograd.grad(roots, inputs, seeds, retain_graph=retain_graph, allow_unused=True)  # type: ignore[arg-type]


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers as leaves of a new graph."""
    return [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]


def _is_run(node: Any) -> bool:
    return isinstance(node, Run._backward_cls)


def _edge(output: Tensor | GradientEdge) -> Edge:
    edge = output if isinstance(output, GradientEdge) else get_gradient_edge(output)
    return edge.node, edge.output_nr
