"""K losses and the parameters that they are differentiated with respect to, ready for a step.

Shapes: K = objectives.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from mogb.engines.choice import Choice
from mogb.engines.differentiate import Update
from mogb.engines.distributed import Ranks
from mogb.engines.losses import Losses
from mogb.engines.plan import Plan
from mogb.engines.rows import Rows, batched_rows, sequential_rows
from mogb.engines.shards import mean_rows
from mogb.engines.streaming import streamed_gramian
from mogb.engines.weighted import guilty, weighted_updates
from mogb.errors import NonFiniteError
from mogb.jacobian import Jacobian


class GraphSource:
    """What all sources of losses on a graph have in common: see :class:`mogb.engines.step.Source`."""

    def __init__(self, losses: Losses, plan: Plan, ranks: Ranks, scale: float | None, *, retain_graph: bool) -> None:
        self.losses = losses
        self.plan = plan
        self.ranks = ranks
        self.scale = scale
        self.retain_graph = retain_graph
        self.names = losses.names
        self.values = ranks.mean_losses(losses.values())

    @property
    def targets(self) -> Sequence[Tensor]:
        return self.plan.targets

    @property
    def _factor(self) -> float:
        return self.ranks.share * (1.0 if self.scale is None else self.scale)

    def weighted(self, weights: Float64[np.ndarray, " K"]) -> tuple[list[Update], int]:
        return weighted_updates(
            self.losses, self.plan, weights, self.ranks, self._factor, retain_graph=self.retain_graph
        )


class LossSource(GraphSource):
    """Losses that are differentiated down to the parameters, by the engine that was chosen."""

    def __init__(
        self, losses: Losses, plan: Plan, choice: Choice, ranks: Ranks, scale: float | None, *, retain_graph: bool
    ) -> None:
        super().__init__(losses, plan, ranks, scale, retain_graph=retain_graph)
        self.choice = choice

    @property
    def engine(self) -> str:
        return self.choice.name

    @property
    def note(self) -> str:
        return self.choice.note

    @property
    def streams(self) -> bool:
        return self.choice.streams

    def rows(self, into: Sequence[tuple[Tensor, Tensor]] = ()) -> Rows:
        given = {id(param): block for param, block in into}
        blocks = [given.get(id(param)) for param in self.plan.shared]
        engine = batched_rows if self.engine == "batched" else sequential_rows
        return engine(self.losses, self.plan, self._factor, retain_graph=self.retain_graph, into=blocks)

    def joined(self, params: Sequence[Tensor], take: Callable[[], Jacobian], *, whole: bool) -> Jacobian:
        return take() if self.ranks.alone else mean_rows(self.ranks, params, list(take().blocks), whole=whole)

    def land(self, params: Sequence[Tensor], direction: Sequence[Tensor]) -> tuple[list[Update], int]:
        return list(zip(params, direction, strict=True)), 0

    def gramian(self) -> tuple[Float64[np.ndarray, "K K"], int]:
        found = streamed_gramian(self.losses, self.plan, self.choice.segments, self.ranks, self._factor)
        return found, len(self.losses)

    def blame(self, suspect: int | None) -> NonFiniteError:
        # Zero times infinity is not a number: in one vectorized pass, a bad objective spoils the rows of others.
        sure = suspect is not None and self.engine != "batched"
        return NonFiniteError("gradient", suspect if sure else guilty(self.losses, self.plan))
