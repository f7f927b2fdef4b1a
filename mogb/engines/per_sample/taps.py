"""Taps: where the backward pass tells what went through a layer.

A forward hook lets every output of a tapped layer pass through an identity whose backward hands the cotangent, and the
layer's input, to whoever listens. Forward and backward of the model stay PyTorch's own, on the real parameters: with
nobody listening, training goes on as if nothing were attached.

All taps hang on one leaf, the anchor. A backward pass that asks for the gradient of the anchor alone runs through every
tap, and autograd leaves out what only the gradients of the parameters would need.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Gets the layer, what is known of the call, the tensors kept from it, and the cotangents of its outputs.
Listener = Callable[[Any, Any, Sequence[Tensor], Sequence[Tensor | None]], None]


@dataclass(eq=False)
class Hub:
    """What all taps of an engine share.

    Attributes:
        anchor: The leaf that the taps hang on.
        listener: Gets the cotangents; None while nobody collects.
        suspended: Layers that run now are not tapped.
        tokens: How many tokens a sample had in the last call of a layer.
        recording: Layers that run now are noted in ``seen``, even without gradients.
        watched: The ids of parameters that are not tapped; passes that collect ask for their gradients, too.
        cut: Backward passes end at checkpointed segments.
        segments: How many segments were checkpointed so far.
        seen: The tapped layers and the sizes of their batch dimension since this set was last cleared.
    """

    anchor: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    listener: Listener | None = None
    suspended: bool = False
    tokens: dict[str, int] = field(default_factory=dict)
    recording: bool = False
    watched: frozenset[int] = frozenset()
    cut: bool = False
    segments: int = 0
    seen: set[tuple[str, int]] = field(default_factory=set)

    @property
    def active(self) -> bool:
        """Whether a layer that runs now is to be tapped."""
        return not self.suspended and torch.is_grad_enabled()


class Tap(torch.autograd.Function):
    """The identity, and a listening post for its cotangent; without a site, a mark on the output of the model."""

    @staticmethod
    def forward(
        ctx: Any, hub: Hub, site: Any, call: Any, anchor: Tensor, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.hub, ctx.site, ctx.call, ctx.count = hub, site, call, count
        ctx.saved = len(tensors) - count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[count:])
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        listener = ctx.hub.listener
        if listener is not None and ctx.site is not None and any(cotangent is not None for cotangent in cotangents):
            listener(ctx.site, ctx.call, ctx.saved_tensors, cotangents)
        return (None,) * 5 + cotangents + (None,) * ctx.saved


def _tap(hub: Hub, site: Any, outputs: Sequence[Tensor], saved: Sequence[Tensor], call: Any = None) -> list[Tensor]:
    """The outputs again, tapped."""
    kept = (tensor.detach() for tensor in saved)
    return list(Tap.apply(hub, site, call, hub.anchor, len(outputs), *outputs, *kept))


tap = torch.compiler.disable(_tap)  # what a tap hands over can't be traced: compiled code is interrupted here


def cast_like_autocast(inputs: Tensor) -> Tensor:
    """The tensor as autocast hands it to a layer that runs in low precision."""
    device = inputs.device.type
    if not torch.is_autocast_enabled(device) or inputs.dtype == torch.float64 or not inputs.is_floating_point():
        return inputs
    return inputs.to(torch.get_autocast_dtype(device))


class CopyableHook:
    """A hook that a copy or a pickle of its module does not inherit: there it does nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()


class _Nothing:
    def __call__(self, *arguments: Any) -> None:
        return None
