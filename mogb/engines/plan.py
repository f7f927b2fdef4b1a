"""Which parameters are balanced, and which belong to one objective alone.

Shapes: K = objectives.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from mogb.engines.distributed import is_sharded, refuse_gathered, refuse_static_graph
from mogb.engines.graph import reached_leaves, reaches
from mogb.engines.losses import Losses, as_parameters


@dataclass(frozen=True, eq=False)
class Plan:
    """Which parameters are balanced, and which belong to one objective alone.

    Attributes:
        shared: Get the balanced direction.
        own: For every objective, the parameters that only it reaches: they get its plain gradient.
    """

    shared: tuple[Tensor, ...]
    own: tuple[tuple[Tensor, ...], ...]

    @property
    def targets(self) -> tuple[Tensor, ...]:
        """Everything that gets a gradient."""
        return self.shared + tuple(param for mine in self.own for param in mine)

    @property
    def sharded(self) -> bool:
        """Whether a balanced parameter is spread over ranks."""
        return any(is_sharded(param) for param in self.shared)


def make_plan(losses: Losses, params: nn.Module | Iterable[Tensor] | None) -> Plan:
    """Tells shared parameters from those of one objective.

    Raises:
        ValueError: A loss that reaches none of the parameters.
    """
    nobody: tuple[tuple[Tensor, ...], ...] = ((),) * len(losses)
    if params is not None:
        shared = as_parameters(params)
        refuse_gathered(shared)
        refuse_static_graph(losses.roots, shared)
        if any(is_sharded(param) for param in shared):  # their graph holds the gathered parameters, not the shards
            return Plan(shared, nobody)
        wanted = frozenset(id(param) for param in shared)
        for index, root in enumerate(losses.roots):
            if not reaches(root, wanted):
                raise ValueError(
                    f"{losses.describe(index)} does not depend on any of the {len(shared)} parameters in params: leave "
                    "it out, or pass the parameters that it depends on."
                )
        return Plan(shared, nobody)
    leaves, reached = reached_leaves(losses.roots)
    refuse_complex(leaves)
    refuse_gathered(leaves)
    refuse_static_graph(losses.roots, leaves)
    return Plan(*split(leaves, reached))


def split(
    leaves: Iterable[Tensor], reached: list[frozenset[int]]
) -> tuple[tuple[Tensor, ...], tuple[tuple[Tensor, ...], ...]]:
    """The leaves that two or more objectives reach, and for each objective those that it alone reaches."""
    leaves = tuple(leaves)
    counts = {id(leaf): sum(id(leaf) in mine for mine in reached) for leaf in leaves}
    own = tuple(tuple(leaf for leaf in leaves if counts[id(leaf)] == 1 and id(leaf) in mine) for mine in reached)
    return tuple(leaf for leaf in leaves if counts[id(leaf)] >= 2), own


def refuse_complex(leaves: Iterable[Tensor]) -> None:
    """Raises TypeError for a complex parameter."""
    for leaf in leaves:
        if leaf.is_complex():
            raise TypeError(f"A parameter of shape {list(leaf.shape)} is complex, which balancing does not define.")
