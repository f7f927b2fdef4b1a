"""Per-sample terms as a source of gradients for a balancing step.

Shapes: K = objectives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from mogb.engines.differentiate import Update, averaged, present
from mogb.engines.distributed import Ranks
from mogb.engines.per_sample.problem import Problem
from mogb.engines.per_sample.step import PerSampleReport
from mogb.engines.rows import Rows
from mogb.engines.shards import mean_rows
from mogb.errors import NonFiniteError
from mogb.jacobian import Jacobian


@dataclass(frozen=True, eq=False)
class Means:
    """What an engine can do with the terms.

    Attributes:
        rows: The gradients of the K losses, added to given ones.
        gramian: Their inner products alone.
        report: What the last call did.
    """

    rows: Callable[[Jacobian | None], Jacobian]
    gramian: Callable[[], Float64[np.ndarray, "K K"]]
    report: Callable[[], PerSampleReport | None]


class TermSource:
    """Losses that are linear in per-sample terms: see :class:`mogb.engines.step.Source`.

    Args:
        problem: Terms and coefficients, the latter multiplied with this rank's share and the scale.
        params: The parameters.
        means: How the engine answers.
        values: Of the losses, over the whole batch.
        names: Of the objectives.
        ranks: Those that share the step.
        scale: What the coefficients were multiplied with.
        streams: Whether only the Gramian is formed.
        retain_graph: Keep the graph.
    """

    def __init__(
        self,
        problem: Problem,
        params: Sequence[Tensor],
        means: Means,
        *,
        values: Float64[np.ndarray, " K"],
        names: tuple[str, ...] | None,
        ranks: Ranks,
        scale: float | None,
        streams: bool,
        retain_graph: bool,
    ) -> None:
        self.problem = problem
        self.params = tuple(params)
        self.means = means
        self.values = values
        self.names = names
        self.ranks = ranks
        self.scale = scale
        self.streams = streams
        self.retain_graph = retain_graph

    @property
    def engine(self) -> str:
        report = self.means.report()
        return "per_sample" if report is not None and report.rank is not None else "sequential"

    @property
    def note(self) -> str:
        report = self.means.report()
        return "" if report is None else report.reason

    @property
    def targets(self) -> Sequence[Tensor]:
        return self.params

    def rows(self, into: Sequence[tuple[Tensor, Tensor]] = ()) -> Rows:
        jacobian = self.means.rows(Jacobian(tuple(block for _, block in into)) if into else None)
        return Rows(self.params, jacobian, (), self._passes())

    def joined(self, params: Sequence[Tensor], take: Callable[[], Jacobian], *, whole: bool) -> Jacobian:
        return take() if self.ranks.alone else mean_rows(self.ranks, params, list(take().blocks), whole=whole)

    def land(self, params: Sequence[Tensor], direction: Sequence[Tensor]) -> tuple[list[Update], int]:
        return list(zip(params, direction, strict=True)), 0

    def gramian(self) -> tuple[Float64[np.ndarray, "K K"], int]:
        return self.means.gramian(), self._passes()

    def weighted(self, weights: Float64[np.ndarray, " K"]) -> tuple[list[Update], int]:
        seeds = self.problem.seeds(np.tensordot(weights, self.problem.coefficients, 1))
        grads = torch.autograd.grad(
            self.problem.outputs, self.params, seeds, retain_graph=self.retain_graph, allow_unused=True
        )
        return averaged(self.ranks, present(self.params, grads)), 1

    def blame(self, suspect: int | None) -> NonFiniteError:
        return NonFiniteError("direction" if suspect is None else "gradient", suspect)

    def _passes(self) -> int:
        report = self.means.report()
        return 0 if report is None else report.passes
