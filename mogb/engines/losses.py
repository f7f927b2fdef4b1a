"""The user's losses and parameters, checked once and brought into one form.

Shapes: K = objectives.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from mogb.engines.distributed import parameters_of


@dataclass(frozen=True, eq=False)
class Losses:
    """K scalar losses on graphs that may be shared.

    Attributes:
        scalars: One 0-dimensional tensor per objective.
        roots: Where to start a backward pass of one objective alone. Losses that were stacked into one tensor begin
            below the stack: through it, every pass would visit the graphs of all of them.
        seeds: The gradient 1 of every root, in its dtype, on its device.
        names: Their names, where the user gave a mapping.
    """

    scalars: tuple[Float[Tensor, ""], ...]
    roots: tuple[Tensor | GradientEdge, ...]
    seeds: tuple[Float[Tensor, ""], ...]
    names: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.scalars)

    def values(self) -> Float64[np.ndarray, " K"]:
        """The loss values: one transfer from the device."""
        return torch.stack([scalar.detach().double() for scalar in self.scalars]).cpu().numpy()

    def label(self, index: int | None) -> str | None:
        """The name of an objective, if it has one."""
        return None if self.names is None or index is None else self.names[index]

    def describe(self, index: int) -> str:
        """How an error message calls an objective."""
        return f"losses[{index}]" if self.names is None else f"losses[{self.names[index]!r}]"


def as_losses(losses: Losses | Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> Losses:
    """Accepts a tensor ``[K]``, a sequence of K scalars, or a mapping from names to scalars; and what it returned.

    Raises:
        TypeError: Something else, complex numbers or integers.
        ValueError: No loss, a loss that is no scalar, or one that carries no graph.
    """
    if isinstance(losses, Losses):
        return losses
    if isinstance(losses, Tensor):
        if losses.ndim != 1:
            raise ValueError(
                f"losses must have the shape [K], one number per objective, but got {list(losses.shape)}. Reduce each "
                "objective to a scalar first, and stack them."
            )
        return _from_tensor(losses)
    if isinstance(losses, Mapping):
        names, given = tuple(str(name) for name in losses), tuple(losses.values())
    elif isinstance(losses, Sequence):
        names, given = None, tuple(losses)
    else:
        raise TypeError(
            f"losses must be a tensor [K], a sequence or a mapping of scalars, but got {type(losses).__name__}."
        )
    if not given:
        raise ValueError("losses is empty: pass at least one loss.")
    labels = [f"losses[{index}]" if names is None else f"losses[{names[index]!r}]" for index in range(len(given))]
    scalars = tuple(_as_scalar(loss, label) for loss, label in zip(given, labels, strict=True))
    return _plain(scalars, names)


def as_parameters(params: nn.Module | Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The distinct parameters that require a gradient, in the order given. Frozen ones are skipped.

    Raises:
        TypeError: Something that is no tensor, complex numbers, or a tensor given where a collection is expected.
        ValueError: None is left, or one is no leaf of the graph.
    """
    if isinstance(params, Tensor):
        raise TypeError("params must be a collection of tensors, but got one tensor: write [tensor].")
    candidates = parameters_of(params) if isinstance(params, nn.Module) else params
    chosen: dict[int, Tensor] = {}
    total = 0
    for index, param in enumerate(candidates):
        total += 1
        if not isinstance(param, Tensor):
            raise TypeError(f"params[{index}] must be a tensor, but got {type(param).__name__}.")
        if not param.requires_grad:
            continue
        if not param.is_leaf:
            raise ValueError(
                f"params[{index}] of shape {list(param.shape)} is no leaf: it was computed from other tensors. Pass "
                "the parameters that the optimizer updates."
            )
        if param.is_complex():
            raise TypeError(f"params[{index}] is complex ({param.dtype}), which gradient balancing does not define.")
        chosen.setdefault(id(param), param)
    if not chosen:
        why = "is empty" if total == 0 else f"holds {total} tensors, of which none requires a gradient"
        raise ValueError(f"params {why}: pass the parameters to balance, with requires_grad=True.")
    return tuple(chosen.values())


def _from_tensor(losses: Float[Tensor, " K"]) -> Losses:
    if len(losses) == 0:
        raise ValueError("losses is empty: pass at least one loss.")
    scalars = tuple(_as_scalar(loss, f"losses[{index}]") for index, loss in enumerate(losses.unbind()))
    node = losses.grad_fn
    hooked = bool(getattr(losses, "_backward_hooks", None))  # as by fully_shard, on what its module returns
    if node is None or hooked or not type(node).__name__.startswith("StackBackward"):
        return _plain(scalars, None)
    roots, seeds = [], []
    for index, (below, output) in enumerate(node.next_functions):
        if below is None:
            raise ValueError(_no_graph(f"losses[{index}]"))
        roots.append(GradientEdge(below, output))
        metadata = below._input_metadata[output]  # stacked numbers may differ in dtype
        seeds.append(torch.ones((), dtype=metadata.dtype, device=metadata.device))
    return Losses(scalars, tuple(roots), tuple(seeds), None)


def _plain(scalars: tuple[Tensor, ...], names: tuple[str, ...] | None) -> Losses:
    return Losses(scalars, scalars, tuple(torch.ones_like(scalar) for scalar in scalars), names)


def _as_scalar(loss: Tensor, label: str) -> Float[Tensor, ""]:
    if not isinstance(loss, Tensor):
        raise TypeError(f"{label} must be a tensor on the graph, but got {type(loss).__name__}: {loss!r}.")
    if loss.numel() != 1:
        raise ValueError(f"{label} must be one number, but has the shape {list(loss.shape)}: take its mean or sum.")
    if not loss.is_floating_point():
        raise TypeError(f"{label} must be a floating-point number, but is {loss.dtype}.")
    if not loss.requires_grad:
        raise ValueError(_no_graph(label))
    return loss if loss.ndim == 0 else loss.reshape(())


def _no_graph(label: str) -> str:
    return (
        f"{label} carries no graph: it was computed under no_grad(), detached, or depends on no parameter. Leave a "
        "constant objective out of this step."
    )
