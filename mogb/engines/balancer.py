"""A balancing method in a training loop: full balancing now and then, one weighted backward pass in between.

Shapes: K = objectives.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mogb.base import Aggregator, Solution, StateValue
from mogb.engines.backward import backward, checked_values, make_plan, weighted_backward
from mogb.engines.distributed import Exchange, GroupChoice, describe_step, find_ranks
from mogb.engines.losses import as_losses
from mogb.engines.report import Report, make_report


class Balancer:
    """Replaces ``loss.backward()`` in a training loop, and remembers the weights between refreshes.

    Every ``refresh_every``-th call, the first included, balances in full, as :func:`mogb.backward` does. The calls in
    between reuse the last weights on the raw gradients: one backward pass of ``weights @ losses``. With
    ``refresh_every=1`` every call is a full one. No moving average is added to that of the method.

    Args:
        aggregator: A method, from :func:`mogb.make`.
        params: As in :func:`mogb.backward`.
        refresh_every: Steps from one full balancing to the next, at least 1.
        process_group: As in :func:`mogb.backward`.
        exchange: As in :func:`mogb.backward`.

    Attributes:
        step: Calls so far.

    Raises:
        ValueError: ``refresh_every`` below 1, or above 1 for a method that yields no weights.

    Examples:
        >>> import mogb
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> balancer = mogb.Balancer(mogb.make("upgrad"), [weight], refresh_every=10)
        >>> report = balancer.backward(torch.stack([(weight - 1).square().sum(), (weight + 2).sum()]))
        >>> balancer.step, report.backward_passes
        (1, 2)
    """

    def __init__(
        self,
        aggregator: Aggregator,
        params: nn.Module | Iterable[Tensor] | None = None,
        *,
        refresh_every: int = 1,
        process_group: GroupChoice = "default",
        exchange: Exchange = "auto",
    ) -> None:
        if not isinstance(aggregator, Aggregator):
            raise TypeError(f"aggregator must be a method, such as mogb.make('mgda'), but got {aggregator!r}.")
        if isinstance(refresh_every, bool) or not isinstance(refresh_every, int) or refresh_every < 1:
            raise ValueError(f"refresh_every must be a whole number of steps, at least 1, but got {refresh_every!r}.")
        if refresh_every > 1 and not aggregator.yields_weights:
            raise ValueError(
                f"refresh_every={refresh_every} needs a method that yields weights to reuse, but {aggregator.name!r} "
                "reads the whole Jacobian: use refresh_every=1, or another method."
            )
        self.aggregator = aggregator
        self.params = params if params is None or isinstance(params, nn.Module) else tuple(params)
        self.refresh_every = refresh_every
        self.process_group = process_group
        self.exchange = exchange
        self.step = 0
        self._solution: Solution | None = None

    def backward(
        self,
        losses: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
        *,
        num_samples: int | float | None = None,
        retain_graph: bool = False,
    ) -> Report:
        """One training step's backward. A call that fails changes neither ``.grad`` nor the balancer.

        Args:
            losses: As in :func:`mogb.backward`, as are the other arguments.
            num_samples: This rank's number of samples, where the ranks' batches differ.
            retain_graph: Keep the graph for another backward pass.

        Raises:
            ValueError: The number of losses changed between two refreshes; otherwise as :func:`mogb.backward`.
        """
        if self._solution is None or self.step % self.refresh_every == 0:
            report = backward(
                losses,
                self.params,
                self.aggregator,
                num_samples=num_samples,
                process_group=self.process_group,
                exchange=self.exchange,
                retain_graph=retain_graph,
            )
            self._solution = None if report.weights is None else _remembered(report)
        else:
            report = self._reuse(losses, self._solution, num_samples, retain_graph)
        self.step += 1
        return report

    def state_dict(self) -> dict[str, StateValue]:
        """The step, the remembered weights and the state of the method, as tensors and plain numbers."""
        saved: dict[str, StateValue] = {f"aggregator.{k}": v for k, v in self.aggregator.state_dict().items()}
        saved["step"] = self.step
        if self._solution is not None:
            saved["weights"] = torch.from_numpy(self._solution.weights.copy())
            saved["left_out"] = torch.tensor(self._solution.left_out, dtype=torch.int64)
        return saved

    def load_state_dict(self, state: Mapping[str, StateValue]) -> None:
        """Takes over a state, also into a fresh instance: the run goes on bit for bit.

        Raises:
            ValueError: A key that is missing or unknown.
        """
        prefix = "aggregator."
        inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        unknown = sorted(
            key for key in state if not key.startswith(prefix) and key not in ("step", "weights", "left_out")
        )
        if unknown or "step" not in state:
            problem = f"unknown keys {', '.join(unknown)}" if unknown else "no key 'step'"
            raise ValueError(f"This is no state of a Balancer: {problem}. Pass what Balancer.state_dict() returned.")
        self.aggregator.load_state_dict(inner)
        self.step = int(state["step"])
        weights = state.get("weights")
        self._solution = None
        if weights is not None:
            left_out = tuple(torch.as_tensor(state.get("left_out", ())).long().tolist())
            self._solution = Solution(torch.as_tensor(weights).double().cpu().numpy().copy(), left_out=left_out)

    def _reuse(
        self,
        losses: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
        solution: Solution,
        num_samples: int | float | None,
        retain_graph: bool,
    ) -> Report:
        found = as_losses(losses)
        if len(found) != len(solution.weights):
            raise ValueError(
                f"losses has {len(found)} objectives, but the weights of the last refresh are for "
                f"{len(solution.weights)}: keep the number fixed, or use refresh_every=1."
            )
        plan = make_plan(found, self.params)
        step = (*describe_step(len(found), plan.shared, self.aggregator), f"reuse at step {self.step}")
        ranks = find_ranks(self.process_group, num_samples, self.exchange, step=step)
        values = checked_values(found, ranks)
        passes = weighted_backward(found, plan, solution, ranks, retain_graph=retain_graph)
        return make_report(values, found.names, solution, None, passes, refreshed=False)


def _remembered(report: Report) -> Solution:
    assert report.weights is not None
    return Solution(report.weights.numpy().copy(), left_out=report.left_out)
