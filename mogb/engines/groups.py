"""Groups of parameters that are balanced apart, each with a copy of the method and so with a state of its own.

Shapes: K = objectives.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor, nn

from mogb.base import Aggregator, StateValue
from mogb.engines.losses import as_parameters

Groups: TypeAlias = (
    Literal["whole", "module", "matrix"]
    | Sequence[nn.Module | Iterable[Tensor]]
    | Mapping[str, nn.Module | Iterable[Tensor]]
)
PREFIX = "groups."


@dataclass(frozen=True, eq=False)
class Group:
    """Parameters that are balanced together.

    Attributes:
        name: Of the group.
        aggregator: The method, with the state of this group.
        members: The positions of the parameters.
    """

    name: str
    aggregator: Aggregator
    members: tuple[int, ...]


class Grouping:
    """Says which parameters belong together, and keeps a copy of the method for each group.

    Args:
        prototype: The method. It is used itself where everything is one group.
        groups: ``"whole"``: all parameters together. ``"module"``: those of each layer. ``"matrix"``: each parameter.
            Or a sequence of collections of parameters, or a mapping from names to them.
        params: As in :func:`mogb.backward`.

    Raises:
        ValueError: Unknown words, empty groups, a parameter in two of them, or groups that can't be told from
            ``params``.
    """

    def __init__(self, prototype: Aggregator, groups: Groups, params: nn.Module | Sequence[Tensor] | None) -> None:
        self.prototype = prototype
        self.whole = isinstance(groups, str) and groups == "whole"
        self._copies: dict[str, Aggregator] = {}
        self._names: dict[int, str] | None = None
        if self.whole:
            return
        if isinstance(groups, str):
            self._names = _named_by(groups, params, "parameters" in prototype.phases)
        else:
            self._names = _listed(groups)
        for name in dict.fromkeys((self._names or {}).values()):
            self._aggregator(name)

    def split(self, params: Sequence[Tensor]) -> list[Group]:
        """The groups of these parameters.

        Raises:
            ValueError: A parameter belongs to no group.
        """
        if self.whole:
            return [Group("whole", self.prototype, tuple(range(len(params))))]
        members: dict[str, list[int]] = {}
        for index, param in enumerate(params):
            name = f"params[{index}]" if self._names is None else self._names.get(id(param))
            if name is None:
                raise ValueError(
                    f"A balanced parameter of shape {list(param.shape)} belongs to no group: add it to one of groups, "
                    "or pass in params only those that do."
                )
            members.setdefault(name, []).append(index)
        return [Group(name, self._aggregator(name), tuple(found)) for name, found in members.items()]

    def aggregators(self) -> tuple[Aggregator, ...]:
        """The methods in use."""
        if self.whole or self.prototype.reads == "losses":
            return (self.prototype,)
        return tuple(self._copies.values())

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Whatever fails inside leaves every state as it was before."""
        with ExitStack() as stack:
            for aggregator in self.aggregators():
                stack.enter_context(aggregator.undone_on_failure())
            yield

    def state_dict(self) -> dict[str, StateValue]:
        """The states of all groups."""
        return {
            f"{PREFIX}{name}:{key}": value
            for name, aggregator in self._copies.items()
            for key, value in aggregator.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, StateValue]) -> None:
        """Takes the states over."""
        parts: dict[str, dict[str, StateValue]] = {name: {} for name in self._copies}
        for full, value in state.items():
            name, _, key = full.removeprefix(PREFIX).rpartition(":")
            if self._names is not None and name not in self._copies:
                raise ValueError(f"The state is for a group {name!r}, but there are {', '.join(self._copies)}.")
            parts.setdefault(name, {})[key] = value
        for name, part in parts.items():
            self._aggregator(name).load_state_dict(part)

    def _aggregator(self, name: str) -> Aggregator:
        if name not in self._copies:
            self._copies[name] = copy.deepcopy(self.prototype)
        return self._copies[name]


def has_state(aggregator: Aggregator) -> bool:
    """Whether a method remembers anything from step to step."""
    remembered = dict(aggregator._remember())
    inside = remembered.pop("inner", None)
    deeper = inside is not None and has_state(aggregator.inner)  # type: ignore[attr-defined]
    return bool(remembered) or deeper or "parameters" in aggregator.phases


def _named_by(word: str, params: nn.Module | Sequence[Tensor] | None, learned: bool) -> dict[int, str] | None:
    if word not in ("module", "matrix"):
        raise ValueError(f"groups must be 'whole', 'module', 'matrix' or a list of groups, but got {word!r}.")
    if isinstance(params, nn.Module):
        named = [(name, param) for name, param in params.named_parameters() if param.requires_grad]
        return {id(p): (name.rpartition(".")[0] or "(top)") if word == "module" else name for name, p in named}
    if word == "module":
        raise ValueError("groups='module' needs the module whose layers are meant: pass params=module.")
    if params is None:
        if learned:
            raise ValueError(
                "groups='matrix' of a method that learns numbers needs to know the parameters beforehand: pass params."
            )
        return None
    return {id(param): f"params[{index}]" for index, param in enumerate(as_parameters(params))}


def _listed(
    groups: Sequence[nn.Module | Iterable[Tensor]] | Mapping[str, nn.Module | Iterable[Tensor]],
) -> dict[int, str]:
    items = groups.items() if isinstance(groups, Mapping) else ((f"groups[{n}]", part) for n, part in enumerate(groups))
    names: dict[int, str] = {}
    for name, part in items:
        for param in as_parameters(part):
            if id(param) in names:
                raise ValueError(
                    f"A parameter of shape {list(param.shape)} is in {names[id(param)]} and in {name}: groups must not "
                    "overlap."
                )
            names[id(param)] = str(name)
    if not names:
        raise ValueError("groups is empty: pass at least one group of parameters, or groups='whole'.")
    return names
