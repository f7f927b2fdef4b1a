"""Which layers of a model are tapped, and the hooks that do it.

Shapes: B = samples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mogb.engines.per_sample.local import LocalRule
from mogb.engines.per_sample.rules import Site, find_rule
from mogb.engines.per_sample.taps import Hub, ModuleHook, PreHook, tap


class Attachment:
    """The taps on one model.

    Attributes:
        hub: What the taps share.
        sites: The tapped layers, by name.
        slots: For a layer and the name of its parameter: which of ``params`` that is.
        unsupported: Parameters that no tapped layer owns, and why.
    """

    def __init__(self, model: nn.Module, params: Sequence[Tensor], batch_dim: int | Mapping[str, int]) -> None:
        self.model = model
        self.params = params
        self.batch_dim = {"": batch_dim} if isinstance(batch_dim, int) else {"": 0, **batch_dim}
        self.hub = Hub()
        self.sites: dict[str, Site] = {}
        self.slots: dict[tuple[str, str], int] = {}
        self.names = _names(model, params)
        self.unsupported: dict[int, str] = {}
        self._handles: list[Any] = []
        self._find_sites()

    def dim(self, name: str) -> int:
        """The batch dimension in a module: that of the longest prefix of its name."""
        fits = (prefix for prefix in self.batch_dim if not prefix or name == prefix or name.startswith(prefix + "."))
        return self.batch_dim[max(fits, key=len)]

    @property
    def attached(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    def attach(self) -> None:
        """Puts the hooks in place."""
        for site in self.sites.values():
            if site.rule.casts:
                self._handles.append(site.module.register_forward_pre_hook(_CastHook(self.hub)))
            hook = _SiteHook(self.hub, site)
            self._handles.append(site.module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(_BoundaryHook(self.hub), with_kwargs=True))

    def detach(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def replaced(self) -> str | None:
        """The name of a parameter that was exchanged or frozen since the layers were found."""
        for (name, attribute), index in self.slots.items():
            current = self.sites[name].module.get_parameter(attribute)
            if current is not self.params[index] or not current.requires_grad:
                return self.names[index]
        return None

    def coupling(self) -> str | None:
        """The name of a layer that is known to mix samples in its present mode."""
        for name, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
                return name
        return None

    def _find_sites(self) -> None:
        index = {id(param): n for n, param in enumerate(self.params)}
        done: tuple[str, ...] = ()
        for name, module in self.model.named_modules():
            if name and name.startswith(done):
                continue
            own = [key for key, param in module._parameters.items() if id(param) in index]
            every = [key for key, param in module.named_parameters() if id(param) in index]
            rule = find_rule(module, own) if own and not _is_unit(module) else None
            if _is_unit(module) and every:
                own, rule = every, LocalRule()
                done += (name + "." if name else "",)
            elif own and rule is None and len(own) == len(every):
                rule = LocalRule()
            if rule is not None and own:
                self._add(Site(name, module, self.dim(name), tuple(own), rule), index)
            else:
                for key in own:
                    self.unsupported[index[id(module._parameters[key])]] = (
                        f"it belongs to {name or 'the model itself'!r}, which also holds layers with parameters"
                    )
        covered = set(self.slots.values())
        for n in range(len(self.params)):
            if n not in covered:
                self.unsupported.setdefault(n, "it belongs to no module of the model")

    def _add(self, site: Site, index: dict[int, int]) -> None:
        self.sites[site.name] = site
        for key in site.wanted:
            self.slots[site.name, key] = index[id(site.module.get_parameter(key))]


class _SiteHook(ModuleHook):
    def __init__(self, hub: Hub, site: Site) -> None:
        self.hub, self.site = hub, site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self.site.rule.tap(self.hub, self.site, args, kwargs, output) if self.hub.active else None


class _BoundaryHook(ModuleHook):
    """Marks what the model returns, so that the cotangents of different terms can be compared there."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return tree_map_only(Tensor, self._mark, output) if self.hub.active else None

    def _mark(self, tensor: Tensor) -> Tensor:
        return tap(self.hub, None, [tensor], [])[0] if tensor.requires_grad else tensor


class _CastHook(PreHook):
    """Casts the input as autocast would inside of the layer: the layer and the tap then keep the same tensor."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not args or not self.hub.active or not isinstance(args[0], Tensor):
            return None
        inputs, device = args[0], args[0].device.type
        if not torch.is_autocast_enabled(device) or inputs.dtype == torch.float64 or not inputs.is_floating_point():
            return None
        return (inputs.to(torch.get_autocast_dtype(device)), *args[1:])


def _is_unit(module: nn.Module) -> bool:
    """Whether parameters of modules inside are used without calling those."""
    return isinstance(module, nn.MultiheadAttention) or hasattr(module, "parametrizations")


def _names(model: nn.Module, params: Sequence[Tensor]) -> list[str]:
    known = {id(param): name for name, param in model.named_parameters()}
    return [known.get(id(param), f"params[{n}]") for n, param in enumerate(params)]
