"""How the gradient of a layer's parameters splits over the samples: one rule per kind of layer.

A rule says which tensors to keep from the forward pass, and turns them and the cotangent of the layer's output into
per-sample gradients. Layers of a registered type whose ``forward`` is the original one get its rule.

Shapes: B = samples, T = tokens per sample, i = inputs, o = outputs, C = channels, L = positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mogb.engines.per_sample.contributions import Contribution, Formed, Lookup, Outer, Windows
from mogb.engines.per_sample.errors import UnsupportedLayerError
from mogb.engines.per_sample.taps import CopyableHook, Hub, cast_like_autocast, tap

Split = Iterator[tuple[str, int, Contribution]]


@dataclass(frozen=True, eq=False)
class Site:
    """A layer that is tapped.

    Attributes:
        name: Of the module in the model.
        module: The layer.
        dim: The batch dimension of its tensors.
        wanted: The names of its parameters whose gradients are collected.
        rule: How they split over the samples.
    """

    name: str
    module: nn.Module
    dim: int
    wanted: tuple[str, ...]
    rule: "Rule"

    def by_sample(self, tensor: Tensor, samples: int, features: int) -> Tensor:
        """A tensor as ``[B, rest...]``. Rows of one sample may lie behind one another in the first dimension.

        Args:
            tensor: Something that went in or came out.
            samples: B.
            features: How many trailing dimensions can't be the batch dimension.
        """
        if tensor.ndim - features > self.dim:
            size = tensor.shape[self.dim]
            if size == samples:
                return tensor.movedim(self.dim, 0) if self.dim else tensor
            if self.dim == 0 and size % samples == 0:
                return tensor.unflatten(0, (samples, -1))
        raise UnsupportedLayerError(
            f"Layer {self.name!r} handled a tensor of shape {list(tensor.shape)}, whose dimension {self.dim} does not "
            f"belong to the {samples} samples. If another dimension is the batch, say so with batch_dim={{...}}; if "
            "samples are mixed or broadcast here, the gradients can't be had sample by sample."
        )


class Rule(ABC):
    """How one kind of layer splits.

    Attributes:
        attributes: The parameters that it knows; None for any.
        casts: The layer runs in low precision under autocast: its input is cast before, so that it is kept once.
        features: The dimension of its input that is no token.
    """

    attributes: tuple[str, ...] | None = ()
    casts: bool = False
    features: int = -1

    def problem(self, module: nn.Module) -> str | None:
        """Why a module of the right type does not qualify after all."""
        return None

    def tap(self, hub: Hub, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Taps the output of one call of the layer."""
        inputs = args[0] if args else next(iter(kwargs.values()))
        saved = [inputs] if self.attributes is None or self.attributes[0] in site.wanted else []
        return tap(hub, site, [output], saved)[0]

    def note(self, hub: Hub, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remembers that the layer was called, and the size of the batch."""
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        size = first.shape[site.dim] if first is not None and first.ndim > site.dim else 0
        hub.seen.add((site.name, size))
        if first is not None and size:
            hub.tokens[site.name] = max(1, first.numel() // (size * max(1, first.shape[self.features])))

    def install(self, hub: Hub, site: Site) -> list[Any]:
        """Puts the taps in place; the handles take them away with ``remove()``."""
        handles: list[Any] = [site.module.register_forward_pre_hook(CastHook(hub))] if self.casts else []
        return [*handles, site.module.register_forward_hook(SiteHook(hub, site), prepend=True, with_kwargs=True)]

    @abstractmethod
    def split(
        self, site: Site, call: Any, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None], samples: int
    ) -> Split:
        """The per-sample gradients: name of the parameter, position of the first number in it, contribution."""


class LinearRule(Rule):
    r"""``y = x W^T + b``: :math:`S_i = \sum_t y_{it} x_{it}^\top`, and :math:`\sum_t y_{it}` for the bias.

    Args:
        weight: The name of W.
        bias: The name of b.
        weight_start: Where the first number of W is, if it is a part of the parameter with that name.
        bias_start: The same for b.
    """

    casts = True

    def __init__(self, weight: str = "weight", bias: str = "bias", weight_start: int = 0, bias_start: int = 0) -> None:
        self.attributes = (weight, bias)
        self.starts = (weight_start, bias_start)

    def split(
        self, site: Site, call: Any, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None], samples: int
    ) -> Split:
        assert self.attributes is not None
        weight, bias = self.attributes
        outer = cotangents[0]
        assert outer is not None
        outer = site.by_sample(outer, samples, 1).reshape(samples, -1, outer.shape[-1])
        if weight in site.wanted:
            inputs = site.by_sample(saved[0], samples, 1).reshape(samples, -1, saved[0].shape[-1])
            yield weight, self.starts[0], Outer(inputs.to(outer.dtype), outer)
        if bias in site.wanted:
            yield bias, self.starts[1], Formed(_sum(outer, (1,)))


class EmbeddingRule(Rule):
    """``y = W[indices]``: each cotangent goes to the row that was looked up."""

    attributes = ("weight",)

    def problem(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Embedding)
        if module.sparse:
            return "its gradient is sparse: use Embedding(..., sparse=False)"
        return "scale_grad_by_freq=True divides by counts over the batch" if module.scale_grad_by_freq else None

    def split(
        self, site: Site, call: Any, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None], samples: int
    ) -> Split:
        module, outer = site.module, cotangents[0]
        assert isinstance(module, nn.Embedding)
        assert outer is not None
        indices = site.by_sample(saved[0], samples, 0).reshape(samples, -1)
        outer = site.by_sample(outer, samples, 1).reshape(samples, -1, outer.shape[-1])
        if module.padding_idx is not None:
            outer = outer.masked_fill((indices == module.padding_idx)[..., None], 0)
        yield "weight", 0, Lookup(indices, outer, module.num_embeddings)


class ConvRule(Rule):
    """Convolution is a product with a matrix, over the windows of the input."""

    attributes = ("weight", "bias")
    casts = True
    features = 1

    def split(
        self, site: Site, call: Any, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None], samples: int
    ) -> Split:
        module, outer = site.module, cotangents[0]
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        assert outer is not None
        site.by_sample(outer, samples, outer.ndim - 1)
        outer = outer.flatten(2)  # [B m, o, L]
        if "weight" in site.wanted:
            yield "weight", 0, Windows(_padded(module, saved[0]).to(outer.dtype), outer, _geometry(module), samples)
        if "bias" in site.wanted:
            yield "bias", 0, Formed(_sum(outer.unflatten(0, (samples, -1)), (1, 3)))


class NormRule(Rule):
    """``y = w * z + b`` with z the normalized input, which is formed again in the backward pass.

    Args:
        normalized: z from the layer and its input.
        channels_first: One scale per channel, in dimension 1, instead of one per trailing coordinate.
    """

    attributes = ("weight", "bias")

    def __init__(
        self, normalized: Callable[[Any, Tensor], Tensor], *, channels_first: bool, batch_statistics: bool = False
    ) -> None:
        self.normalized = normalized
        self.channels_first = channels_first
        self.batch_statistics = batch_statistics

    def split(
        self, site: Site, call: Any, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None], samples: int
    ) -> Split:
        outer = cotangents[0]
        assert outer is not None
        if self.batch_statistics and (site.module.training or site.module.running_mean is None):
            raise UnsupportedLayerError(f"Layer {site.name!r} normalizes over the batch: its samples are coupled.")
        outer = self._flat(site, outer, samples)
        if "weight" in site.wanted:
            inputs = self._flat(site, self.normalized(site.module, saved[0]), samples)
            yield "weight", 0, Formed(_sum(outer * inputs, (1, 3)))
        if "bias" in site.wanted:
            yield "bias", 0, Formed(_sum(outer, (1, 3)))

    def _flat(self, site: Site, tensor: Tensor, samples: int) -> Float[Tensor, "B T C L"]:
        if self.channels_first:
            channels = tensor.shape[1]
            return site.by_sample(tensor, samples, tensor.ndim - 1).reshape(samples, -1, channels, _tail(tensor))
        features = len(site.module.normalized_shape)  # type: ignore[arg-type]
        width = tensor.shape[tensor.ndim - features :].numel()
        return site.by_sample(tensor, samples, features).reshape(samples, -1, width, 1)


class SiteHook(CopyableHook):
    """Taps the output of a layer."""

    def __init__(self, hub: Hub, site: Site) -> None:
        self.hub, self.site = hub, site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.hub.active or self.hub.recording:
            self.site.rule.note(self.hub, self.site, args, kwargs)
        return self.site.rule.tap(self.hub, self.site, args, kwargs, output) if self.hub.active else None


class CastHook(CopyableHook):
    """Casts the input as autocast would inside of the layer: the layer and the tap then keep the same tensor."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not args or not self.hub.active or not isinstance(args[0], Tensor):
            return None
        return (cast_like_autocast(args[0]), *args[1:])


RULES: dict[type[Any], Rule] = {
    nn.Linear: LinearRule(),
    nn.Embedding: EmbeddingRule(),
    nn.Conv1d: ConvRule(),
    nn.Conv2d: ConvRule(),
    nn.LayerNorm: NormRule(lambda m, x: F.layer_norm(x, m.normalized_shape, eps=m.eps), channels_first=False),
    nn.RMSNorm: NormRule(lambda m, x: F.rms_norm(x, m.normalized_shape, eps=m.eps), channels_first=False),
    nn.GroupNorm: NormRule(lambda m, x: F.group_norm(x, m.num_groups, eps=m.eps), channels_first=True),
}
_BATCH_NORM = NormRule(
    lambda m, x: F.batch_norm(x, m.running_mean, m.running_var, eps=m.eps), channels_first=True, batch_statistics=True
)
RULES |= {nn.BatchNorm1d: _BATCH_NORM, nn.BatchNorm2d: _BATCH_NORM, nn.BatchNorm3d: _BATCH_NORM}


def find_rule(module: nn.Module, wanted: Sequence[str], rules: Mapping[type[Any], Rule] = RULES) -> Rule | None:
    """The rule of a module's type, if the module computes what the rule says."""
    kind: Any = type(module)
    for base in kind.__mro__:
        rule = rules.get(base)
        if rule is None:
            continue
        original = vars(module).get("forward", kind.forward) is base.forward
        known = rule.attributes is None or set(wanted) <= set(rule.attributes)
        return rule if original and known and rule.problem(module) is None else None
    return None


def _sum(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    return tensor.sum(dims, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _tail(tensor: Tensor) -> int:
    return tensor.shape[2:].numel()


def _padded(module: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Tensor:
    """The input with all of the padding there, as images."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    inputs = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    return inputs[:, :, None] if isinstance(module, nn.Conv1d) else inputs


def _geometry(module: nn.Conv1d | nn.Conv2d) -> dict[str, Any]:
    def pair(values: tuple[int, ...]) -> tuple[int, ...]:
        return (1, *values) if isinstance(module, nn.Conv1d) else values

    sizes = {"kernel_size": module.kernel_size, "dilation": module.dilation, "stride": module.stride}
    return {name: pair(value) for name, value in sizes.items()} | {"groups": module.groups}
