"""A balancing method in a training loop: full balancing now and then, one weighted backward pass in between.

Shapes: K = objectives.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn

from mogb.base import Aggregator, Solution, StateValue, needs_losses
from mogb.engines.accumulation import Pending
from mogb.engines.backward import make_source
from mogb.engines.choice import Engine, check_engine
from mogb.engines.distributed import Exchange, GroupChoice, find_ranks
from mogb.engines.groups import PREFIX, Grouping, Groups
from mogb.engines.losses import Losses
from mogb.engines.per_sample import PerSample
from mogb.engines.report import Report, make_report
from mogb.engines.step import (
    Outcome,
    Source,
    add_weighted,
    balance,
    checked_values,
    from_rows,
    reuse,
    seen_by,
    skipped_or_raised,
)
from mogb.errors import NonFiniteError

Coefficients: TypeAlias = Literal["norm_corrected", "raw"]
GivenLosses: TypeAlias = Losses | Tensor | Sequence[Tensor] | Mapping[str, Tensor]
KEYS = ("step", "weights", "left_out")


class Balancer:
    """Replaces ``loss.backward()`` in a training loop, and remembers the weights between refreshes.

    Every ``refresh_every``-th call, the first included, balances in full, as :func:`mogb.backward` does. The calls in
    between reuse the last weights: one backward pass of ``weights @ losses``. With ``refresh_every=1`` every call is a
    full one. No moving average is added to that of the method.

    Micro-batches: call :meth:`accumulate` for all but the last, and :meth:`backward` for that one. The rows of the
    Jacobian add up, and are balanced once. Where the weights are known beforehand (between refreshes, or methods that
    look neither at losses nor at gradients) the gradient of every micro-batch goes into ``.grad`` at once.

    Args:
        aggregator: A method, from :func:`mogb.make`.
        params: As in :func:`mogb.backward`.
        refresh_every: Steps from one full balancing to the next, at least 1.
        coefficients: What the steps between refreshes put on the raw gradients. ``"norm_corrected"``: the weights of
            the last refresh. ``"raw"``: of a method that balances unit gradients, such as ``marble``, the weights on
            those, as if all gradients had the same length; for any other method there is no difference.
        engine: As in :func:`mogb.backward`; or ``"per_sample"``, or a :class:`~mogb.engines.per_sample.PerSample`, for
            :meth:`backward_terms`. The word makes one for the module ``params``, and attaches it.
        groups: As in :func:`mogb.backward`. The method is copied for every group, and each copy has its own state.
            With groups, every step is a full one.
        process_group: As in :func:`mogb.backward`.
        exchange: As in :func:`mogb.backward`.

    Attributes:
        step: Steps so far. A step that a gradient scaler skips does not count.
        per_sample: The engine of :meth:`backward_terms`, if there is one.

    Raises:
        ValueError: ``refresh_every`` below 1, or above 1 for a method that yields no weights or with groups; an engine
            that does not fit.

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
        coefficients: Coefficients = "norm_corrected",
        engine: Engine | Literal["per_sample"] | PerSample = "auto",
        groups: Groups = "whole",
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
        if coefficients not in get_args(Coefficients):
            raise ValueError(f"coefficients must be 'norm_corrected' or 'raw', but got {coefficients!r}.")
        self.aggregator = aggregator
        self.params = params if params is None or isinstance(params, nn.Module) else tuple(params)
        self.refresh_every = refresh_every
        self.coefficients = coefficients
        self.process_group = process_group
        self.exchange: Exchange = exchange
        self.step = 0
        self.per_sample = _as_per_sample(engine, self.params)
        self.engine: Engine = "auto" if isinstance(engine, PerSample) or engine == "per_sample" else engine
        check_engine(self.engine, aggregator, groups=groups)
        self._grouping = Grouping(aggregator, groups, self.params)
        self._solution: Solution | None = None
        self._pending: Pending | None = None
        self._last: Source | None = None
        if not self._grouping.whole and (refresh_every > 1 or self.per_sample is not None):
            raise ValueError(
                "groups= has weights for each group, which one weighted backward pass can't have: use groups='whole', "
                "or refresh_every=1 and no per-sample engine."
            )

    def backward(
        self,
        losses: GivenLosses,
        *,
        shared: Tensor | Iterable[Tensor] | None = None,
        scaler: Any = None,
        num_samples: int | float | None = None,
        retain_graph: bool = False,
    ) -> Report:
        """One training step's backward. A call that fails changes neither ``.grad`` nor the balancer.

        After :meth:`accumulate`, this is the last micro-batch of the step. The report then is about the whole step;
        one that fails drops what was accumulated.

        Args:
            losses: As in :func:`mogb.backward`, as are the other arguments.
            shared: The representation to balance on; not with micro-batches.
            scaler: A gradient scaler.
            num_samples: This rank's number of samples, where the ranks' batches differ.
            retain_graph: Keep the graph for another backward pass.

        Raises:
            ValueError: The number of losses changed between two refreshes; otherwise as :func:`mogb.backward`.
        """
        source = self._source(losses, shared, scaler, num_samples, retain_graph, adds=self._pending is not None)
        return self._step(source)

    def accumulate(
        self,
        losses: GivenLosses,
        *,
        scaler: Any = None,
        num_samples: int | float | None = None,
        retain_graph: bool = False,
    ) -> None:
        """A micro-batch that is not the last one of its step: its gradients are added to what the step has so far.

        Gradients and loss values add up: divide every loss by the number of micro-batches for their mean. Under
        ``torch.distributed``, all ranks need the same number of micro-batches; rows travel once, at the end.

        Raises:
            ValueError: ``engine="streaming"``, which keeps no rows; otherwise as :meth:`backward`. What was
                accumulated is dropped, and the method's state is what it was before the step; between refreshes,
                ``.grad`` keeps what earlier micro-batches added.
        """
        self._accumulate(self._source(losses, None, scaler, num_samples, retain_graph, adds=True))

    def backward_terms(
        self,
        terms: Tensor | Sequence[Tensor],
        coefficients: Tensor | np.ndarray,
        *,
        names: Sequence[str] | None = None,
        rows: str = "auto",
        scaler: Any = None,
        num_samples: int | float | None = None,
        retain_graph: bool = False,
    ) -> Report:
        """One training step's backward for losses that are linear in per-sample terms, without K backward passes.

        Args:
            terms: As in :meth:`mogb.engines.per_sample.PerSample.backward`, as are the other arguments.
            coefficients: Of the terms in the losses.
            names: Of the objectives.
            rows: Whether rows are kept.
            scaler: A gradient scaler.
            num_samples: This rank's number of samples, where the ranks' batches differ.
            retain_graph: Keep the graph for another backward pass.

        Raises:
            ValueError: The balancer has no per-sample engine; otherwise as :meth:`backward`.
        """
        pending = self._pending is not None
        options = {"rows": "keep" if pending else rows, "store": "dense" if pending else "auto"}
        return self._step(self._terms(terms, coefficients, names, scaler, num_samples, retain_graph, options))

    def accumulate_terms(
        self,
        terms: Tensor | Sequence[Tensor],
        coefficients: Tensor | np.ndarray,
        *,
        names: Sequence[str] | None = None,
        scaler: Any = None,
        num_samples: int | float | None = None,
        retain_graph: bool = False,
    ) -> None:
        """:meth:`accumulate` for per-sample terms."""
        options = {"rows": "keep", "store": "dense"}
        self._accumulate(self._terms(terms, coefficients, names, scaler, num_samples, retain_graph, options))

    def finish(self) -> Report:
        """Ends a step whose micro-batches were all given to :meth:`accumulate`.

        Raises:
            RuntimeError: There was none.
        """
        if self._pending is None or self._last is None:
            raise RuntimeError("There is nothing to finish: call accumulate() first, or backward().")
        pending, last = self._pending, self._last
        source, rows = pending.total(last)
        try:
            if pending.skipped:
                raise NonFiniteError("direction", None)
            outcome = self._finished(pending, source) if pending.solution else from_rows(source, rows, self._grouping)
        except NonFiniteError as error:
            self.discard()
            return skipped_or_raised(source, error).report
        except BaseException:
            self.discard()
            raise
        self._pending = self._last = None
        return self._done(outcome)

    def discard(self) -> None:
        """Drops a step that is under way. ``.grad`` stays as it is."""
        if self._pending is not None and self._pending.undo is not None:
            self.aggregator._recall(self._pending.undo)
        self._pending = self._last = None

    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What the optimizer has to learn for the method: see :meth:`mogb.Aggregator.parameters`."""
        return tuple(param for method in self._grouping.aggregators() for param in method.parameters())

    def update(self, losses: GivenLosses | Sequence[float], *, num_samples: int | float | None = None) -> None:
        """The second phase of a two-phase method such as FAMO: the losses of the same batch after the optimizer step.

        Nothing happens for other methods. Under ``torch.distributed``, every rank passes its own losses, and the
        method sees their mean.

        Args:
            losses: The K losses, evaluated again.
            num_samples: As in :meth:`backward`.

        Raises:
            NonFiniteError: NaN or Inf in a loss. Nothing is learned from this step, and the next one may follow.
        """
        methods = [method for method in self._grouping.aggregators() if "update" in method.phases]
        if not methods:
            return
        ranks = find_ranks(self.process_group, num_samples)
        given: Any = losses.scalars if isinstance(losses, Losses) else losses
        if not ranks.alone:
            items = given.values() if isinstance(given, Mapping) else given
            given = torch.from_numpy(ranks.mean_losses(np.array([float(item) for item in items])))
        for method in methods:
            method.update(given)

    def end_epoch(self) -> None:
        """Tells a method that compares epochs, such as DWA, that one is over. Nothing happens for other methods."""
        for method in self._grouping.aggregators():
            method.end_epoch()

    def state_dict(self) -> dict[str, StateValue]:
        """The step, the remembered weights and the state of the method, as tensors and plain numbers.

        Raises:
            RuntimeError: Micro-batches are under way.
        """
        if self._pending is not None:
            raise RuntimeError("A step is under way, whose rows are not part of the state: finish() or discard() it.")
        saved: dict[str, StateValue] = {f"aggregator.{k}": v for k, v in self.aggregator.state_dict().items()}
        saved |= self._grouping.state_dict()
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
        groups = {key: value for key, value in state.items() if key.startswith(PREFIX)}
        unknown = sorted(key for key in state if not key.startswith(prefix) and key not in (*KEYS, *groups))
        unknown += sorted(groups) if self._grouping.whole else []
        if unknown or "step" not in state:
            problem = f"unknown keys {', '.join(unknown)}" if unknown else "no key 'step'"
            raise ValueError(f"This is no state of a Balancer: {problem}. Pass what Balancer.state_dict() returned.")
        self.discard()
        before, groups_before = self.aggregator.state_dict(), self._grouping.state_dict()
        try:
            step, solution = int(state["step"]), _solution_in(state)
            self.aggregator.load_state_dict(inner)
            self._grouping.load_state_dict(groups)
        except BaseException:
            self.aggregator.load_state_dict(before)
            self._grouping.load_state_dict(groups_before)
            raise
        self.step, self._solution = step, solution

    @property
    def _remembered(self) -> Solution | None:
        """The weights that this step reuses; None if it is a full one."""
        return None if self.step % self.refresh_every == 0 else self._solution

    def _source(
        self,
        losses: GivenLosses,
        shared: Tensor | Iterable[Tensor] | None,
        scaler: Any,
        num_samples: int | float | None,
        retain_graph: bool,
        *,
        adds: bool,
    ) -> Source:
        """The losses of a step, or of a micro-batch that adds to one."""
        if shared is not None and self._pending is not None:
            raise ValueError("shared= does not go with micro-batches: each has a representation of its own.")
        keeps_rows = adds or self._remembered is not None  # or needs none: nothing to choose
        return make_source(
            losses,
            self.params,
            self.aggregator,
            shared=shared,
            grouping=self._grouping,
            engine="sequential" if self.engine == "auto" and keeps_rows and shared is None else self.engine,
            scaler=scaler,
            num_samples=num_samples,
            process_group=self.process_group,
            exchange=self.exchange,
            retain_graph=retain_graph,
            doing=self._doing,
        )

    @property
    def _doing(self) -> str:
        """What all ranks must be about to do."""
        return f"step {self.step}, {'balance' if self._remembered is None else 'reuse'}"

    def _terms(
        self,
        terms: Tensor | Sequence[Tensor],
        coefficients: Tensor | np.ndarray,
        names: Sequence[str] | None,
        scaler: Any,
        num_samples: int | float | None,
        retain_graph: bool,
        options: dict[str, Any],
    ) -> Source:
        if self.per_sample is None:
            raise ValueError(
                "This balancer has no per-sample engine: make it with Balancer(method, model, engine='per_sample')."
            )
        return self.per_sample.source(
            terms,
            coefficients,
            self.aggregator,
            names=names,
            scaler=scaler,
            num_samples=num_samples,
            process_group=self.process_group,
            exchange=self.exchange,
            retain_graph=retain_graph,
            doing=self._doing,
            **options,
        )

    def _step(self, source: Source) -> Report:
        if self._pending is not None:
            self._accumulate(source)
            return self.finish()
        solution = self._remembered
        if solution is None:
            return self._done(balance(source, self._grouping))
        _check_count(source, solution)
        return self._done(reuse(source, solution))

    def _done(self, outcome: Outcome) -> Report:
        if not outcome.report.skipped:
            if outcome.report.refreshed:
                self._solution = None if outcome.solution is None else self._to_reuse(outcome.solution)
            self.step += 1
        return outcome.report

    def _to_reuse(self, solution: Solution) -> Solution:
        raw = self.coefficients == "raw" and "unit" in solution.details
        weights = solution.details["unit"] if raw else solution.weights
        return Solution(weights.copy(), left_out=solution.left_out)

    def _accumulate(self, source: Source) -> None:
        try:
            if source.streams:
                raise ValueError(
                    "engine='streaming' keeps no rows, which micro-batches need: use engine='sequential', or refresh "
                    "on one large batch."
                )
            checked_values(source.values, source.names)
            if self._pending is None:
                self._pending = self._begin(source)
            self._pending.check(source)
            self._last = source
            self._add(self._pending, source)
        except BaseException:
            self.discard()
            raise

    def _begin(self, source: Source) -> Pending:
        """Weights that no micro-batch can change are settled with the first one."""
        solution = self._remembered
        if solution is not None:
            _check_count(source, solution)
            return Pending(source, solution, None)
        method = self.aggregator
        if method.reads != "losses" or needs_losses(method):
            return Pending(source, None, None)
        before = method._remember()
        with method.undone_on_failure():
            return Pending(source, method._checked(None, seen_by(method, source.values)), before)

    def _add(self, pending: Pending, source: Source) -> None:
        if pending.solution is None:
            pending.add_rows(source)
            return
        try:
            pending.count(source, add_weighted(source, pending.solution))
        except NonFiniteError as error:
            skipped_or_raised(source, error)
            pending.skipped = True

    def _finished(self, pending: Pending, source: Source) -> Outcome:
        assert pending.solution is not None
        report = make_report(source.values, source.names, pending.solution, None, pending.passes, engine="weighted")
        return Outcome(replace(report, refreshed=self._remembered is None), pending.solution)


def _as_per_sample(engine: object, params: object) -> PerSample | None:
    if isinstance(engine, PerSample):
        return engine
    if engine != "per_sample":
        return None
    if not isinstance(params, nn.Module):
        raise ValueError("engine='per_sample' taps the layers of a module: pass it as params, or pass a PerSample.")
    return PerSample(params).attach()


def _solution_in(state: Mapping[str, StateValue]) -> Solution | None:
    weights = state.get("weights")
    if weights is None:
        return None
    left_out = tuple(torch.as_tensor(state.get("left_out", ())).long().tolist())
    return Solution(torch.as_tensor(weights).double().cpu().numpy().copy(), left_out=left_out)


def _check_count(source: Source, solution: Solution) -> None:
    if len(source.values) != len(solution.weights):
        raise ValueError(
            f"losses has {len(source.values)} objectives, but the weights of the last refresh are for "
            f"{len(solution.weights)}: keep the number fixed, or use refresh_every=1."
        )
