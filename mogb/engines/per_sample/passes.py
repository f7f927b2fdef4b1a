r"""Which backward passes are run, and how per-sample gradients of each are mixed into the K objectives.

.. math::  g_k = \sum_{r=1}^{R} \sum_{i=1}^{B} M^{(r)}_{ki} S^{(r)}_i

Shapes: K = objectives, B = samples, J = terms, R = passes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mogb.engines.per_sample.attachment import Attachment
from mogb.engines.per_sample.basis import orthogonal_basis
from mogb.engines.per_sample.errors import PerSampleError, UnsupportedLayerError
from mogb.engines.per_sample.problem import Problem
from mogb.engines.per_sample.rows import Collector
from mogb.engines.per_sample.rules import Site
from mogb.engines.per_sample.tape import Tape, pull
from mogb.engines.per_sample.taps import Hub, Tap

Basis = str | Tensor  # "auto", "terms", or combinations [R, J]


@dataclass(frozen=True, eq=False)
class Passes:
    """R backward passes.

    Attributes:
        outputs: Where they begin.
        cotangents: What each sends into ``outputs``.
        mixing: For each, the weights of the samples in the objectives, ``[K, B]``.
    """

    outputs: tuple[Tensor, ...] | tuple[GradientEdge, ...]
    cotangents: tuple[tuple[Tensor, ...], ...]
    mixing: tuple[Float64[np.ndarray, "K B"], ...]

    def __len__(self) -> int:
        return len(self.mixing)


def plan_passes(problem: Problem, attachment: Attachment, basis: Basis) -> Passes:
    """Chooses the passes.

    Raises:
        ValueError: A basis that does not span the coefficients.
    """
    if isinstance(basis, Tensor):
        combinations, coefficients = _explicit(problem, basis)
    else:
        combinations, coefficients = np.eye(problem.terms), problem.coefficients
    edges = _boundary(problem, attachment) if basis != "terms" and len(combinations) > 1 else ()
    if not edges:
        seeds = [problem.seeds(np.tile(row, (problem.samples, 1))) for row in combinations]
        return Passes(problem.outputs, tuple(seeds), _columns(coefficients))
    cotangents = [_arriving(problem, edges, row) for row in combinations]
    if isinstance(basis, Tensor):
        return _without_zeros(Passes(edges, tuple(cotangents), _columns(coefficients)))
    dim = attachment.dim("")
    aligned = [[_by_sample(part, problem.samples, dim) for part in parts] for parts in cotangents]
    if any(part is None for parts in aligned for part in parts):
        return Passes(edges, tuple(cotangents), _columns(coefficients))
    vectors, factors = orthogonal_basis(aligned)  # type: ignore[arg-type]
    mixed = np.einsum("kbj,bjr->kbr", coefficients, factors.cpu().numpy())
    likes = cotangents[0]
    restored = [
        tuple(_restored(part, like, problem.samples, dim) for part, like in zip(parts, likes, strict=True))
        for parts in vectors
    ]
    return Passes(edges, tuple(restored), _columns(mixed))


def run_passes(
    passes: Passes, attachment: Attachment, samples: int, collector: Collector, *, retain_graph: bool
) -> float:
    """Runs them, and hands per-sample gradients to the collector. Returns the unit of rounding of what was collected.

    Raises:
        UnsupportedLayerError: A layer can't be split over the samples.
        PerSampleError: The graph holds no tapped layer.
    """
    others = sorted(attachment.unsupported)
    targets = [attachment.hub.anchor, *(attachment.params[n] for n in others)]
    listener = _Listener(attachment, samples, collector)
    tape = Tape(attachment.hub, attachment.params, targets, collector)
    with _listening(attachment.hub, listener, targets):
        taped = len(passes) > 1 and tape.run(passes.outputs, passes.cotangents)
        for number, cotangents in enumerate(() if taped else passes.cotangents):
            collector.current = number
            keep = retain_graph or number < len(passes) - 1
            tape.grads.append(pull(passes.outputs, cotangents, targets, retain_graph=keep))
    for n, *grads in zip(others, *(found[1:] for found in tape.grads), strict=True):
        if any(grad is not None for grad in grads):
            raise UnsupportedLayerError(
                f"The losses depend on the parameter {attachment.names[n]!r}, but {attachment.unsupported[n]}."
            )
    if not listener.calls:
        raise PerSampleError(
            "The terms depend on no tapped layer: run the forward pass after attach(), with gradients enabled, by "
            "calling the module (not its forward method). What torch.compile made before attach() has no taps either: "
            "call torch.compiler.reset()."
        )
    return listener.rounding


class _Listener:
    def __init__(self, attachment: Attachment, samples: int, collector: Collector) -> None:
        self.slots, self.samples, self.collector = attachment.slots, samples, collector
        self.calls = 0
        self.rounding = 0.0

    def __call__(self, site: Site, call: Any, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> None:
        self.calls += 1
        self.rounding = max([self.rounding] + [torch.finfo(c.dtype).eps for c in cotangents if c is not None])
        with torch.no_grad():
            for key, start, contribution in site.rule.split(site, call, saved, cotangents, self.samples):
                self.collector.collect(self.slots[site.name, key], start, contribution)


@contextmanager
def _listening(hub: Hub, listener: _Listener, targets: Sequence[Tensor]) -> Iterator[None]:
    hub.listener, hub.watched = listener, frozenset(id(target) for target in targets)
    try:
        yield
    finally:
        hub.listener, hub.watched = None, frozenset()


def _boundary(problem: Problem, attachment: Attachment) -> tuple[GradientEdge, ...]:
    """Where the model's outputs enter the terms; nothing if the terms reach parameters in another way as well."""
    edges: dict[tuple[int, int], GradientEdge] = {}
    seen: set[object] = set()
    params = {id(param) for param in attachment.params}
    todo: list[Any] = [output.grad_fn for output in problem.outputs]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if _is_tap(node) or id(getattr(node, "variable", None)) in params:
            return ()
        for child, number in node.next_functions:
            if _is_tap(child) and (child.site, child.hub) == (None, attachment.hub):
                edges[id(child), number] = GradientEdge(child, number)
            else:
                todo.append(child)
    return tuple(edges.values())


def _is_tap(node: Any) -> bool:
    return isinstance(node, Tap._backward_cls)


def _arriving(problem: Problem, edges: tuple[GradientEdge, ...], row: Float64[np.ndarray, " J"]) -> tuple[Tensor, ...]:
    seeds = problem.seeds(np.tile(row, (problem.samples, 1)))
    grads = torch.autograd.grad(problem.outputs, edges, seeds, retain_graph=True, allow_unused=True)
    return tuple(_zeros(edge) if grad is None else grad.detach() for edge, grad in zip(edges, grads, strict=True))


def _zeros(edge: GradientEdge) -> Tensor:
    metadata = edge.node._input_metadata[edge.output_nr]
    return torch.zeros(tuple(metadata.shape), dtype=metadata.dtype, device=metadata.device)


def _by_sample(tensor: Tensor, samples: int, dim: int) -> Tensor | None:
    if tensor.ndim > dim and tensor.shape[dim] == samples:
        return tensor.movedim(dim, 0)
    return tensor.unflatten(0, (samples, -1)) if dim == 0 and tensor.ndim and tensor.shape[0] % samples == 0 else None


def _restored(part: Tensor, like: Tensor, samples: int, dim: int) -> Tensor:
    return part.movedim(0, dim) if like.shape[dim] == samples else part.reshape(like.shape)


def _columns(coefficients: Float64[np.ndarray, "K B R"]) -> tuple[Float64[np.ndarray, "K B"], ...]:
    return tuple(np.ascontiguousarray(column) for column in np.moveaxis(coefficients, 2, 0))


def _explicit(problem: Problem, basis: Tensor) -> tuple[Float64[np.ndarray, "R J"], Float64[np.ndarray, "K B R"]]:
    matrix = basis.detach().to("cpu", torch.float64).numpy()
    if matrix.ndim != 2 or matrix.shape[1] != problem.terms:
        raise ValueError(f"basis must have the shape [R, J] = [R, {problem.terms}], but got {list(matrix.shape)}.")
    coefficients = problem.coefficients @ np.linalg.pinv(matrix)
    lost = np.abs(coefficients @ matrix - problem.coefficients).max()
    if lost > 1e-12 * np.abs(problem.coefficients).max():
        raise ValueError(
            f"basis, of {len(matrix)} combinations of {problem.terms} terms, does not span the coefficients: they are "
            f"missed by {lost:.1e}. Add combinations, or use basis='auto'."
        )
    return matrix, coefficients


def _without_zeros(passes: Passes) -> Passes:
    """Leaves out passes whose cotangents are nothing but rounding errors of the largest."""
    sizes = [max(float(part.abs().max()) for part in parts) for parts in passes.cotangents]
    eps = min(torch.finfo(part.dtype).eps for parts in passes.cotangents for part in parts)
    kept = [r for r, size in enumerate(sizes) if size > 8 * min(eps, 1e-7) * max(sizes)] or [0]
    return Passes(passes.outputs, tuple(passes.cotangents[r] for r in kept), tuple(passes.mixing[r] for r in kept))
