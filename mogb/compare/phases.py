"""What some methods need of a training loop besides losses and gradients; see ``Aggregator.phases``.

Shapes: S = starting points, K = objectives.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from mogb.base import Aggregator
from mogb.problems.base import Problem

PARAMETER_LR = 0.025  # of a method's own parameters, with Adam, as in the code of Nash-MTL
EPOCH = 25  # steps that count as an epoch here, as in the code of Nash-MTL


class Phases:
    """Serves the aggregators of one run: one per starting point, all of one kind."""

    def __init__(self, aggregators: Sequence[Aggregator]) -> None:
        self.aggregators = aggregators
        self.kinds = aggregators[0].phases
        parameters = [parameter for one in aggregators for parameter in one.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=PARAMETER_LR) if parameters else None

    def before(self, noise: torch.Generator | None) -> Tensor | None:
        """What is needed to draw this step's mini-batch once more."""
        return noise.get_state() if noise is not None and "update" in self.kinds else None

    def after(self, problem: Problem, x: Float64[Tensor, "S N"], drawn: Tensor | None, step: int) -> None:
        """Everything that follows an optimizer step: x is where it led."""
        if self.optimizer is not None:
            self.optimizer.step()
        if "update" in self.kinds:
            again = None if drawn is None else torch.Generator().set_state(drawn)
            losses, _ = problem.jacobian(x, again)
            for aggregator, values in zip(self.aggregators, losses, strict=True):
                aggregator.update(values)
        if "end_epoch" in self.kinds and step % EPOCH == 0:
            for aggregator in self.aggregators:
                aggregator.end_epoch()
