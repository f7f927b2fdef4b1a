"""Any layer by itself: its own derivative, evaluated for every sample in the backward pass.

For a layer without a rule of its own, the layer alone runs once more per sample, vectorized, and is differentiated
with respect to its parameters. That costs about two more forward passes of that layer.

Shapes: B = samples.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from mogb.engines.per_sample.contributions import Formed
from mogb.engines.per_sample.errors import UnsupportedLayerError
from mogb.engines.per_sample.rules import Rule, Site, Split
from mogb.engines.per_sample.taps import Hub, tap


@dataclass(frozen=True, eq=False)
class Call:
    """How a layer was called: what is no tensor, and where the tensors were."""

    hub: Hub
    constants: tuple[Any, ...]
    is_tensor: tuple[bool, ...]
    inputs: TreeSpec
    tapped: tuple[int, ...]
    autocast: tuple[str, torch.dtype] | None


class LocalRule(Rule):
    """Differentiates the layer sample by sample."""

    attributes = None

    def tap(self, hub: Hub, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        leaves, inputs = tree_flatten((args, kwargs))
        is_tensor = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        saved = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        outputs, form = tree_flatten(output)
        tapped = tuple(n for n, leaf in enumerate(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad)
        constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        device = saved[0].device.type if saved else "cpu"
        autocast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        call = Call(hub, constants, is_tensor, inputs, tapped, autocast)
        for n, leaf in zip(tapped, tap(hub, site, [outputs[n] for n in tapped], saved, call), strict=True):
            outputs[n] = leaf
        return tree_unflatten(outputs, form)

    def split(
        self, site: Site, call: Call, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None], samples: int
    ) -> Split:
        params = {name: site.module.get_parameter(name).detach() for name in site.wanted}
        given = [n for n, cotangent in enumerate(cotangents) if cotangent is not None]
        outer = [site.by_sample(cotangents[n], samples, 0) for n in given]  # type: ignore[arg-type]
        batched = [_is_batched(site, tensor, samples) for tensor in saved]
        single = [b and t.shape[site.dim] == samples for t, b in zip(saved, batched, strict=True)]
        if not any(batched):
            raise UnsupportedLayerError(f"Layer {site.name!r} saw no tensor with {samples} samples.")
        inputs = [site.by_sample(t, samples, 0) if b else t for t, b in zip(saved, batched, strict=True)]

        def pulled(cotangents: list[Tensor], inputs: list[Tensor]) -> dict[str, Tensor]:
            def outputs(params: dict[str, Tensor]) -> list[Tensor]:
                tensors = iter(t.unsqueeze(site.dim) if one else t for t, one in zip(inputs, single, strict=True))
                leaves = [
                    next(tensors) if is_tensor else constant
                    for is_tensor, constant in zip(call.is_tensor, call.constants, strict=True)
                ]
                args, kwargs = tree_unflatten(leaves, call.inputs)
                with _autocast(call.autocast):
                    produced = tree_flatten(functional_call(site.module, params, args, kwargs))[0]
                return [produced[call.tapped[n]] for n in given]

            produced, pull = vjp(outputs, params)
            shaped = [c.reshape(p.shape).to(p.dtype) for c, p in zip(cotangents, produced, strict=True)]
            return pull(shaped)[0]

        call.hub.suspended = True
        try:
            with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
                # What can't be vectorized runs in a loop, with a warning that a user can do nothing about.
                warnings.filterwarnings("ignore", message="There is a performance drop")
                gradients = vmap(pulled, in_dims=(0, [0 if b else None for b in batched]))(outer, inputs)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UnsupportedLayerError(
                f"Layer {site.name!r} ({type(site.module).__name__}) has no rule, and can't be run on one sample at a "
                f"time: {error}"
            ) from error
        finally:
            call.hub.suspended = False
        for name in site.wanted:
            yield name, 0, Formed(gradients[name].flatten(1))


def _is_batched(site: Site, tensor: Tensor, samples: int) -> bool:
    if tensor.ndim <= site.dim:
        return False
    size = tensor.shape[site.dim]
    return size == samples or (site.dim == 0 and size > samples and size % samples == 0)


def _autocast(state: tuple[str, torch.dtype] | None) -> torch.autocast:
    device, dtype = state or ("cpu", torch.bfloat16)
    return torch.autocast(device, dtype=dtype, enabled=state is not None)
