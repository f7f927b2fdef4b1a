"""Which layers of a model are tapped, and the hooks that do it.

Shapes: B = samples.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mogb.engines.per_sample.attention import AttentionRule
from mogb.engines.per_sample.local import LocalRule
from mogb.engines.per_sample.rules import Rule, Site, find_rule
from mogb.engines.per_sample.taps import CopyableHook, Hub, tap

# Modules that use parameters of modules inside without calling those.
UNITS: dict[type[nn.Module], Rule] = {nn.MultiheadAttention: AttentionRule()}


class Attachment:
    """The taps on one model.

    Attributes:
        hub: What the taps share.
        sites: The tapped layers, by name.
        slots: For a layer and the name of its parameter: which of ``params`` that is.
        unsupported: Parameters that no tapped layer owns, and why.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[Tensor],
        batch_dim: int | Mapping[str, int],
        units: Iterable[type[nn.Module]],
    ) -> None:
        self.model = model
        self.units = tuple(units)
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
            self._handles += site.rule.install(self.hub, site)
        self._handles.append(self.model.register_forward_hook(_BoundaryHook(self.hub), with_kwargs=True))

    def detach(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def tokens(self) -> float:
        """How many tokens a sample has, on average over the tapped parameters."""
        total = weighted = 0
        for name, tokens in self.hub.tokens.items():
            size = sum(self.params[self.slots[name, key]].numel() for key in self.sites[name].wanted)
            total, weighted = total + size, weighted + tokens * size
        return weighted / max(1, total)

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
            if every and self._is_unit(module):
                done += (name + "." if name else "",)
                self._add(name, module, every, find_rule(module, every, UNITS) or LocalRule(), index)
            elif own and (rule := find_rule(module, own)) is not None:
                self._add(name, module, own, rule, index)
            elif own and len(own) == len(every):
                self._add(name, module, own, LocalRule(), index)
            else:
                for key in own:
                    self.unsupported[index[id(module._parameters[key])]] = (
                        f"it belongs to {repr(name) if name else 'the model itself'}, which also holds layers with "
                        "parameters"
                    )
        covered = set(self.slots.values())
        for n in range(len(self.params)):
            if n not in covered:
                self.unsupported.setdefault(n, "it belongs to no module of the model")

    def _is_unit(self, module: nn.Module) -> bool:
        """Whether parameters of modules inside are used without calling those."""
        return isinstance(module, (*UNITS, *self.units)) or hasattr(module, "parametrizations")

    def _add(self, name: str, module: nn.Module, wanted: Sequence[str], rule: Rule, index: dict[int, int]) -> None:
        self.sites[name] = Site(name, module, self.dim(name), tuple(wanted), rule)
        for key in wanted:
            self.slots[name, key] = index[id(module.get_parameter(key))]


class _BoundaryHook(CopyableHook):
    """Marks what the model returns, so that the cotangents of different terms can be compared there."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return tree_map_only(Tensor, self._mark, output) if self.hub.active else None

    def _mark(self, tensor: Tensor) -> Tensor:
        return tap(self.hub, None, [tensor], [])[0] if tensor.requires_grad else tensor


def _names(model: nn.Module, params: Sequence[Tensor]) -> list[str]:
    known = {id(param): name for name, param in model.named_parameters()}
    return [known.get(id(param), f"params[{n}]") for n, param in enumerate(params)]
