r"""K gradients without K backward passes, for losses that are linear in terms of single samples.

.. math::  L_k(\theta) = \sum_{i=1}^{B} \sum_{j=1}^{J} W_{kij} \, t_{ij}(\theta), \qquad
           g_k = \sum_{ij} W_{kij} \, \nabla_\theta t_{ij}

The coefficients W are constant and each sample goes through the network on its own. Then the K gradients are K
mixtures of the same per-sample gradients, which J backward passes yield, whatever K is; one pass, where the J terms
send parallel cotangents into the network.

Shapes: K = objectives, B = samples, J = terms, P = numbers in the parameters.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from mogb.base import Aggregator, Solution
from mogb.engines.distributed import Exchange, GroupChoice, Ranks, describe_step, find_ranks, is_sharded
from mogb.engines.groups import Grouping
from mogb.engines.losses import as_parameters
from mogb.engines.per_sample.attachment import Attachment
from mogb.engines.per_sample.balance import Means, TermSource
from mogb.engines.per_sample.check import deviations, judge, norm_deviations
from mogb.engines.per_sample.errors import PerSampleError, UnsupportedLayerError
from mogb.engines.per_sample.gram import GramianStore, LateContributionError
from mogb.engines.per_sample.passes import Basis, plan_passes, run_passes
from mogb.engines.per_sample.problem import Problem, as_problem
from mogb.engines.per_sample.rows import RowStore, row_dtype
from mogb.engines.per_sample.step import (
    PerSampleReport,
    Situation,
    Step,
    added,
    as_matrix,
    check_choice,
    check_rows,
    without_probe,
)
from mogb.engines.per_sample.tape import checkpoint
from mogb.engines.report import Report
from mogb.engines.scaling import scale_of
from mogb.engines.step import add_weighted, balance
from mogb.errors import NonFiniteError
from mogb.jacobian import Jacobian

Coefficients = Float[Tensor, "K B J"] | Float[Tensor, "K B"] | np.ndarray


class PerSample:
    """Takes K gradients sample by sample: a few backward passes, whatever K is.

    Attach it, run the model as usual, and ask for the gradients of K losses that are linear in per-sample terms::

        engine = PerSample(model).attach()
        terms = per_sample_loss(model(inputs))                    # [B] or [B, J], on the graph
        jacobian = engine.gradients(terms, coefficients)          # coefficients [K, B] or [K, B, J]

    While attached, the model trains as before: ordinary backward passes are PyTorch's own.

    Linear, Embedding, Conv1d, Conv2d, LayerNorm, RMSNorm, GroupNorm and BatchNorm in eval mode have a rule; any other
    layer is differentiated sample by sample on its own. Parameters may be shared by layers, and layers may be used
    repeatedly. What can't be split over the samples (layers that couple samples, parameters used outside of a layer)
    is found by a self-check against an ordinary backward pass.

    Args:
        model: Any module. Its samples must go through it independently of each other.
        params: Parameters whose gradients are wanted; None means those of the model. Frozen ones are skipped.
        batch_dim: Which dimension of the layers' tensors counts the samples; a mapping from prefixes of module names
            to dimensions where that differs. A first dimension that is a multiple of B holds the rows of a sample
            behind one another, as after ``flatten(0, 1)``.
        units: Types of modules that use parameters of modules inside without calling those modules; each is
            differentiated sample by sample as a whole. MultiheadAttention and parametrized modules are known.
        self_check: ``"first"`` compares with an ordinary backward pass when layers or batch sizes are seen for the
            first time; ``"always"`` at every call; ``"off"`` never.
        on_failure: ``"exact"`` uses K ordinary backward passes from then on, with a warning; ``"error"`` raises.

    Attributes:
        report: What the last call did.

    Raises:
        TypeError, ValueError: As for the parameters of :func:`mogb.backward`.

    Examples:
        >>> from mogb.engines.per_sample import PerSample
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> with PerSample(model) as engine:
        ...     losses = model(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))[:, 0]
        ...     groups = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])  # the means over two groups of samples
        ...     jacobian = engine.gradients(losses, groups)
        >>> jacobian.blocks[0].flatten(1)
        tensor([[1.0000, 0.0000],
                [0.5000, 1.0000]])
    """

    def __init__(
        self,
        model: nn.Module,
        params: nn.Module | Iterable[Tensor] | None = None,
        *,
        batch_dim: int | Mapping[str, int] = 0,
        units: Iterable[type[nn.Module]] = (),
        self_check: str = "first",
        on_failure: str = "exact",
    ) -> None:
        check_choice("self_check", self_check, ("first", "always", "off"))
        check_choice("on_failure", on_failure, ("exact", "error"))
        self.model = model
        self.params = as_parameters(model if params is None else params)
        if any(is_sharded(param) for param in self.params):
            raise ValueError(
                "The parameters are sharded (DTensor), which PerSample does not support: use mogb.backward."
            )
        self.self_check = self_check
        self.on_failure = on_failure
        self.report: PerSampleReport | None = None
        self._attachment = Attachment(model, self.params, batch_dim, units)
        self._verified: set[frozenset[tuple[str, int]]] = set()
        self._failure = ""
        self._shared: set[int] = set()  # parameters that get contributions from several calls

    def attach(self) -> "PerSample":
        """Puts forward hooks on the layers. Forward passes from now on can be taken apart."""
        if not self._attachment.attached:
            self._attachment.attach()
        return self

    def detach(self) -> None:
        """Takes the hooks away: the model is as it was."""
        self._attachment.detach()

    def __enter__(self) -> "PerSample":
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.detach()

    @property
    def unsupported(self) -> dict[str, str]:
        """Parameters that no layer with a rule owns, and why. They are a problem only if a loss depends on them."""
        return {self._attachment.names[n]: reason for n, reason in self._attachment.unsupported.items()}

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a function or a module, keeps only its arguments, and computes it again in the backward pass.

        A replacement of :func:`torch.utils.checkpoint.checkpoint` (which works as well, but computes again for every
        pass): :meth:`gradients` computes each segment once more for all of its passes. Ordinary backward passes work,
        also with ``autograd.grad``. Random numbers and autocast are repeated as they were.

        Args:
            function: A module, a method of one, or any function of the model's parameters.
            args: Its arguments; tensors may be anywhere in nested lists, tuples and dicts.
            kwargs: The same, by name.
        """
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        return checkpoint(self._attachment.hub, self.model, function, *args, **kwargs)

    def gradients(
        self,
        terms: Tensor | Sequence[Tensor],
        coefficients: Coefficients,
        *,
        basis: Basis = "auto",
        store: str = "auto",
        add_to: Jacobian | None = None,
        retain_graph: bool = False,
    ) -> Jacobian:
        """The gradients of ``L_k = sum_ij coefficients[k, i, j] * terms[i, j]``, with respect to ``params``.

        Args:
            terms: ``[B, J]``, ``[B]``, or J tensors ``[B]``, on the graph of one or more forward passes.
            coefficients: Constants ``[K, B, J]``; ``[K, B]`` for one term. Masks, averages over groups and
                advantages go in here.
            basis: Which combinations of the terms are sent backward. ``"auto"`` compares the cotangents that arrive at
                the model's output and takes as few orthogonal ones as are needed; ``"terms"`` takes the terms as they
                are; a matrix names the combinations.
            store: K rows (``"dense"``), or one row per sample and pass and the combinations (``"factored"``): cheaper
                where K is larger. ``"auto"`` takes what is smaller.
            add_to: Dense rows of earlier micro-batches, which the new ones are added to in place.
            retain_graph: Keep the graph for another backward pass.

        Returns:
            A :class:`~mogb.jacobian.Jacobian`, with one block ``[K, *shape]`` per parameter.

        Raises:
            ValueError: Terms and coefficients that don't fit, or are not finite.
            PerSampleError: The gradients can't be had sample by sample, and ``on_failure="error"``.
        """
        check_choice("store", store, ("auto", "dense", "factored"))
        problem = as_problem(terms, coefficients).checked()
        if add_to is not None:
            check_rows(add_to, store, len(problem), self.params)
        return self._gradients(self._prepare(problem, basis), store, add_to, retain_graph)

    def _gradients(self, step: Step, store: str, add_to: Jacobian | None, retain_graph: bool) -> Jacobian:
        problem, passes = step.problem, step.passes
        if passes is None:
            return self._exact(step, add_to, retain_graph)
        needed = len(passes) * problem.samples
        factored = store == "factored" or (store == "auto" and add_to is None and len(problem) > needed)
        rows = RowStore(self.params, passes.mixing, factored=factored, rows=None if step.check else add_to)
        keep = retain_graph or step.check
        try:
            rounding = run_passes(passes, self._attachment, problem.samples, rows, retain_graph=keep)
        except UnsupportedLayerError as error:
            if add_to is not None and not step.check:
                raise PerSampleError(f"{error} The rows in add_to are spoiled: begin the accumulation anew.") from error
            return self._exact(self._give_up(step, str(error), keep or len(passes) > 1), add_to, retain_graph)
        jacobian, deviation = rows.finish(), None
        if step.check:
            probe = jacobian.combine(np.eye(len(step.asked))[-1])
            deviation, reason = judge(deviations(probe, self._probe(step)), self._attachment.names, rounding)
            if reason:
                return self._exact(self._give_up(step, reason), add_to, retain_graph)
            self._vouch_for(step, deviation)
            jacobian = added(without_probe(jacobian), add_to)
        self._note(step, "factored" if factored else "dense", deviation)
        return jacobian

    def gramian(
        self,
        terms: Tensor | Sequence[Tensor],
        coefficients: Coefficients,
        *,
        basis: Basis = "auto",
    ) -> Float64[np.ndarray, "K K"]:
        """The inner products of the K gradients, without the gradients.

        Parameter by parameter, per-sample gradients are multiplied and dropped: nothing of the size of K gradients is
        kept. :meth:`weighted_backward`, for which the graph is kept, then gives the direction in one more pass. The
        arguments are those of :meth:`gradients`. Gramians of micro-batches do not add up to that of the batch: where
        gradients accumulate, use :meth:`gradients`.

        The self-check compares the norm of every parameter's gradient.
        """
        return self._gramian(self._prepare(as_problem(terms, coefficients).checked(), basis))

    def _gramian(self, step: Step) -> Float64[np.ndarray, "K K"]:
        if step.passes is None:
            return self._exact(step, None, retain_graph=True).gramian()
        while True:
            store = GramianStore(self.params, step.passes.mixing, frozenset(self._shared))
            try:
                rounding = run_passes(step.passes, self._attachment, step.problem.samples, store, retain_graph=True)
                break
            except LateContributionError as late:  # a layer was called again: from now on, wait for that
                self._shared.add(late.index)
            except UnsupportedLayerError as error:
                return self._exact(self._give_up(step, str(error)), None, retain_graph=True).gramian()
        gramian, deviation = store.gramian(), None
        if step.check:
            found = norm_deviations(store.squares, self._probe(step))
            deviation, reason = judge(found, self._attachment.names, rounding)
            if reason:
                return self._exact(self._give_up(step, reason), None, retain_graph=True).gramian()
            self._vouch_for(step, deviation)
            gramian = gramian[:-1, :-1]
        self._note(step, "gramian", deviation)
        return gramian

    def weighted_backward(
        self,
        terms: Tensor | Sequence[Tensor],
        coefficients: Coefficients,
        weights: Tensor | np.ndarray,
        *,
        retain_graph: bool = False,
    ) -> None:
        """Adds the gradient of ``sum_k weights[k] * L_k`` to every ``param.grad``: one ordinary backward pass.

        Raises:
            ValueError: Terms, coefficients and weights that don't fit.
            NonFiniteError: NaN or Inf in the gradient. Every ``.grad`` is untouched.
        """
        problem = as_problem(terms, coefficients)
        array = np.asarray(weights.detach().cpu() if isinstance(weights, Tensor) else weights, dtype=float)
        if array.shape != (len(problem),):
            raise ValueError(
                f"weights must have one number per objective, {len(problem)}, but got the shape {list(array.shape)}."
            )
        source = self._source(problem, "auto", None, Ranks(None), None, streams=False, retain_graph=retain_graph)
        try:
            add_weighted(source, Solution(array))
        except NonFiniteError as error:
            raise source.blame(error.index) from None

    def backward(
        self,
        terms: Tensor | Sequence[Tensor],
        coefficients: Coefficients,
        aggregator: Aggregator,
        *,
        names: Sequence[str] | None = None,
        basis: Basis = "auto",
        rows: str = "auto",
        scaler: Any = None,
        num_samples: int | float | None = None,
        process_group: GroupChoice = "default",
        exchange: Exchange = "auto",
        retain_graph: bool = False,
    ) -> Report:
        """Balances the K losses, and adds the direction to every ``param.grad``: :func:`mogb.backward` for terms.

        :meth:`mogb.Balancer.backward_terms` does the same in a training loop that refreshes weights now and then or
        accumulates micro-batches.

        Args:
            terms: As in :meth:`gradients`.
            coefficients: As in :meth:`gradients`.
            aggregator: A method, from :func:`mogb.make`.
            names: Of the objectives, for the report.
            basis: As in :meth:`gradients`.
            rows: ``"keep"`` takes the gradients, ``"drop"`` only their Gramian, and one more backward pass for the
                direction; ``"auto"`` estimates what is cheaper. Methods that read the whole Jacobian keep them.
            scaler: As in :func:`mogb.backward`.
            num_samples: As in :func:`mogb.backward`: this rank's number of samples, where they differ.
            process_group: As in :func:`mogb.backward`: the ranks whose rows are averaged. Run the forward pass of a
                ``DistributedDataParallel`` under ``no_sync()``.
            exchange: As in :func:`mogb.backward`.
            retain_graph: Keep the graph for another backward pass.

        Raises:
            TypeError, ValueError: Arguments of the wrong kind.
            NonFiniteError: NaN or Inf in a loss or a gradient. Every ``.grad`` is untouched.
            PerSampleError: As in :meth:`gradients`.
        """
        if not isinstance(aggregator, Aggregator):
            raise TypeError(f"aggregator must be a method, such as mogb.make('mgda'), but got {aggregator!r}.")
        source = self.source(
            terms,
            coefficients,
            aggregator,
            names=names,
            basis=basis,
            rows=rows,
            scaler=scaler,
            num_samples=num_samples,
            process_group=process_group,
            exchange=exchange,
            retain_graph=retain_graph,
        )
        return balance(source, Grouping(aggregator, "whole", self.params)).report

    def source(
        self,
        terms: Tensor | Sequence[Tensor],
        coefficients: Coefficients,
        aggregator: Aggregator,
        *,
        names: Sequence[str] | None = None,
        basis: Basis = "auto",
        rows: str = "auto",
        store: str = "auto",
        scaler: Any = None,
        num_samples: int | float | None = None,
        process_group: GroupChoice = "default",
        exchange: Exchange = "auto",
        retain_graph: bool = False,
        doing: str = "balance",
    ) -> TermSource:
        """For balancers: the checked losses of :meth:`backward`, with ``store`` as in :meth:`gradients`.

        ``doing`` is what the ranks must agree to do, besides what the other arguments say.
        """
        check_choice("rows", rows, ("auto", "keep", "drop"))
        problem = as_problem(terms, coefficients)
        step = (*describe_step(len(problem), self.params, aggregator), f"per sample, {doing}")
        ranks = find_ranks(process_group, num_samples, exchange, step=step)
        labels = None if names is None else tuple(names)
        if labels is not None and len(labels) != len(problem):
            raise ValueError(f"names must have one entry per objective, {len(problem)}, but got {len(labels)}.")
        if not ranks.alone and rows == "drop":
            raise ValueError("rows='drop' needs one process: Gramians of ranks do not add up. Use rows='auto'.")
        drop = rows == "drop" or (rows == "auto" and ranks.alone and self._gramian_is_cheaper(problem))
        return self._source(
            problem,
            basis,
            labels,
            ranks,
            scale_of(scaler, problem.outputs[0].device),
            store=store if ranks.alone else "dense",
            streams=drop and aggregator.yields_weights,
            retain_graph=retain_graph,
        )

    def _source(
        self,
        problem: Problem,
        basis: Basis,
        names: tuple[str, ...] | None,
        ranks: Ranks,
        scale: float | None,
        *,
        store: str = "auto",
        streams: bool,
        retain_graph: bool,
    ) -> TermSource:
        values = ranks.mean_losses(problem.losses())
        factor = ranks.share * (1.0 if scale is None else scale)
        scaled = problem if factor == 1.0 else Problem(problem.outputs, problem.coefficients * factor)

        def rows(add_to: Jacobian | None) -> Jacobian:
            return self._gradients(self._prepare(scaled, basis), store, add_to, retain_graph)

        means = Means(rows, lambda: self._gramian(self._prepare(scaled, basis)), lambda: self.report)
        return TermSource(
            scaled,
            self.params,
            means,
            values=values,
            names=names,
            ranks=ranks,
            scale=scale,
            streams=streams,
            retain_graph=retain_graph,
        )

    def _prepare(self, problem: Problem, basis: Basis) -> Step:
        if not isinstance(basis, Tensor):
            check_choice("basis", basis, ("auto", "terms"))
        situation = self._situation(problem)
        reason = self._obstacle()
        if reason:
            return Step(problem, problem, None, situation, check=False, reason=reason)
        check = self.self_check == "always" or (self.self_check == "first" and situation not in self._verified)
        asked = problem.with_probe(as_matrix(basis)) if check else problem
        passes = plan_passes(asked, self._attachment, basis)
        if len(passes) >= len(problem):
            return Step(problem, problem, None, situation, check=False)
        return Step(problem, asked, passes, situation, check=check)

    def _obstacle(self) -> str:
        """Why samples can't be told apart at this call, as far as that is known beforehand."""
        if not self._attachment.attached:
            raise PerSampleError("The engine is not attached: call attach(), or use it in a with statement.")
        if (name := self._attachment.replaced()) is not None:
            raise PerSampleError(
                f"The parameter {name!r} was replaced or frozen after the engine was made: make a new PerSample."
            )
        if (name := self._attachment.coupling()) is not None:
            return f"layer {name!r} normalizes over the batch, which couples the samples"
        return self._failure

    def _situation(self, problem: Problem) -> Situation:
        """What the self-check vouches for: these layers, with this number of samples."""
        seen = self._attachment.hub.seen
        situation = frozenset(seen) | {("samples", problem.samples), ("training", int(self.model.training))}
        seen.clear()
        return situation

    def _probe(self, step: Step) -> tuple[Tensor | None, ...]:
        """The gradient of the random objective, in an ordinary backward pass."""
        seeds = step.asked.seeds(step.asked.coefficients[-1])
        return torch.autograd.grad(step.asked.outputs, self.params, seeds, retain_graph=True, allow_unused=True)

    def _vouch_for(self, step: Step, deviation: float) -> None:
        """The self-check passed; where gradients are not finite, it said nothing."""
        if np.isfinite(deviation):
            self._verified.add(step.situation)

    def _give_up(self, step: Step, reason: str, graph_is_there: bool = True) -> Step:
        """Remembers that samples can't be told apart."""
        self._failure = reason
        if self.on_failure == "exact":
            if not graph_is_there:
                raise PerSampleError(
                    f"{reason} The graph is gone by now: repeat the forward pass, and K backward passes will be used."
                )
            warnings.warn(f"PerSample falls back to one backward pass per objective: {reason}", stacklevel=4)
        return Step(step.problem, step.problem, None, step.situation, check=False, reason=reason)

    def _exact(self, step: Step, add_to: Jacobian | None, retain_graph: bool) -> Jacobian:
        """K ordinary backward passes: because they are not more, or for the reason given."""
        if step.reason and self.on_failure == "error":
            raise PerSampleError(f"The gradients can't be taken sample by sample: {step.reason}")
        problem = step.problem
        if add_to is None:
            shapes = [(len(problem), *param.shape) for param in self.params]
            blocks = [p.new_zeros(shape, dtype=row_dtype(p)) for p, shape in zip(self.params, shapes, strict=True)]
        else:
            blocks = list(add_to.blocks)
        for k, matrix in enumerate(problem.coefficients):
            keep = retain_graph or k < len(problem) - 1
            seeds = problem.seeds(matrix)
            grads = torch.autograd.grad(problem.outputs, self.params, seeds, retain_graph=keep, allow_unused=True)
            for block, grad in zip(blocks, grads, strict=True):
                if grad is not None:
                    block[k] += grad
        self._note(step, "dense", None)
        return Jacobian(tuple(blocks))

    def _note(self, step: Step, store: str, deviation: float | None) -> None:
        problem, passes = step.problem, step.passes
        self.report = PerSampleReport(
            objectives=len(problem),
            samples=problem.samples,
            terms=problem.terms,
            passes=len(problem) if passes is None else len(passes) + step.check,
            rank=None if passes is None else len(passes),
            store=store,
            reason=step.reason,
            check_error=deviation,
        )

    def _gramian_is_cheaper(self, problem: Problem) -> bool:
        """Whether one more backward pass costs less than mixing the rows, in multiplications per sample."""
        rank = min(problem.terms, 2)
        height = min(len(problem), rank * problem.samples)
        own = sum(param.numel() for param in self.params)
        everything = sum(param.numel() for param in self.model.parameters())
        tokens = self._attachment.tokens()
        pairs = sum(min(param.numel(), tokens**2 * sum(_sides(param))) for param in self.params)
        gramian = rank**2 * problem.samples / 2 * pairs  # every sample with every other, once
        return rank * height * own > 2 * tokens * (everything + own) + gramian


def _sides(param: Tensor) -> tuple[int, int]:
    """Height and width of a parameter as a matrix."""
    height = param.shape[0] if param.ndim > 1 else 1
    return height, param.numel() // max(height, 1)
