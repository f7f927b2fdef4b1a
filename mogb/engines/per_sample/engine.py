r"""K gradients without K backward passes, for losses that are linear in terms of single samples.

.. math::  L_k(\theta) = \sum_{i=1}^{B} \sum_{j=1}^{J} W_{kij} \, t_{ij}(\theta), \qquad
           g_k = \sum_{ij} W_{kij} \, \nabla_\theta t_{ij}

The coefficients W are constant and each sample goes through the network on its own. Then the K gradients are K
mixtures of the same per-sample gradients, which J backward passes yield, whatever K is; one pass, where the J terms
send parallel cotangents into the network.

Shapes: K = objectives, B = samples, J = terms, P = numbers in the parameters.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mogb.engines.losses import as_parameters
from mogb.engines.per_sample.attachment import Attachment
from mogb.engines.per_sample.check import compare
from mogb.engines.per_sample.errors import PerSampleError, UnsupportedLayerError
from mogb.engines.per_sample.passes import plan_passes, run_passes
from mogb.engines.per_sample.problem import Problem, as_problem
from mogb.engines.per_sample.rows import FactoredJacobian, RowStore, row_dtype
from mogb.jacobian import Jacobian

Store = Literal["auto", "dense", "factored"]


@dataclass(frozen=True, eq=False)
class PerSampleReport:
    """What the last call did.

    Attributes:
        objectives: K.
        samples: B.
        terms: J.
        passes: Backward passes spent, that of the self-check included.
        rank: Passes that the terms needed: J, or fewer where their cotangents are dependent.
        store: ``"dense"`` for K rows, ``"factored"`` for ``rank * B`` rows and K combinations of them.
        exact_passes: Whether K ordinary backward passes were used instead.
        reason: Why, if so.
        check_error: The relative deviation that the self-check found; None where it did not run.
    """

    objectives: int
    samples: int
    terms: int
    passes: int
    rank: int
    store: str
    exact_passes: bool = False
    reason: str = ""
    check_error: float | None = None


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
        self_check: Literal["first", "always", "off"] = "first",
        on_failure: Literal["exact", "error"] = "exact",
    ) -> None:
        if self_check not in ("first", "always", "off"):
            raise ValueError(f"self_check must be 'first', 'always' or 'off', but got {self_check!r}.")
        if on_failure not in ("exact", "error"):
            raise ValueError(f"on_failure must be 'exact' or 'error', but got {on_failure!r}.")
        self.model = model
        self.params = as_parameters(model if params is None else params)
        self.self_check = self_check
        self.on_failure = on_failure
        self.report: PerSampleReport | None = None
        self._attachment = Attachment(model, self.params, batch_dim)
        self._verified: set[frozenset[tuple[str, int]]] = set()
        self._failure = ""

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

    def gradients(
        self,
        terms: Tensor | Sequence[Tensor],
        coefficients: Float[Tensor, "K B J"] | Float[Tensor, "K B"] | np.ndarray,
        *,
        basis: Literal["auto", "terms"] | Float[Tensor, "R J"] = "auto",
        store: Store = "auto",
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
        problem = as_problem(terms, coefficients)
        problem.losses()
        if add_to is not None:
            _check_rows(add_to, store, len(problem), self.params)
        if reason := self._obstacle():
            return self._exact(problem, reason, add_to, retain_graph)
        situation = self._situation(problem)
        check = self.self_check == "always" or (self.self_check == "first" and situation not in self._verified)
        asked = problem.with_probe(_matrix(basis)) if check else problem
        passes = plan_passes(asked, self._attachment, basis)
        if len(passes) >= len(problem):
            return self._exact(problem, None, add_to, retain_graph)
        factored = store == "factored" or (
            store == "auto" and add_to is None and len(problem) > len(passes) * problem.samples
        )
        rows = RowStore(self.params, passes.mixing, factored=factored, rows=None if check else add_to)
        keep = retain_graph or check
        try:
            rounding = run_passes(passes, self._attachment, problem.samples, rows, retain_graph=keep)
        except UnsupportedLayerError as error:
            return self._give_up(problem, str(error), add_to, retain_graph, graph_is_there=keep or len(passes) > 1)
        jacobian, deviation = rows.finish(), None
        if check:
            deviation, reason = self._check(asked, jacobian, rounding)
            if reason:
                return self._give_up(problem, reason, add_to, retain_graph, graph_is_there=True)
            self._verified.add(situation)
            jacobian = _added(_without_probe(jacobian), add_to)
        self.report = PerSampleReport(
            objectives=len(problem),
            samples=problem.samples,
            terms=problem.terms,
            passes=len(passes) + check,
            rank=len(passes),
            store="factored" if factored else "dense",
            check_error=deviation,
        )
        return jacobian

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

    def _situation(self, problem: Problem) -> frozenset[tuple[str, int]]:
        """What the self-check vouches for: these layers, with this number of samples."""
        seen = self._attachment.hub.seen
        situation = frozenset(seen) | {("samples", problem.samples)}
        seen.clear()
        return situation

    def _check(self, asked: Problem, jacobian: Jacobian, rounding: float) -> tuple[float, str]:
        """Takes the gradient of the last objective in an ordinary backward pass, and compares."""
        seeds = asked.seeds(asked.coefficients[-1])
        truth = torch.autograd.grad(asked.outputs, self.params, seeds, retain_graph=True, allow_unused=True)
        last = np.zeros(len(asked))
        last[-1] = 1
        return compare(jacobian.combine(last), truth, self._attachment.names, rounding)

    def _give_up(
        self, problem: Problem, reason: str, add_to: Jacobian | None, retain_graph: bool, *, graph_is_there: bool
    ) -> Jacobian:
        """Remembers that samples can't be told apart, and does without."""
        self._failure = reason
        if self.on_failure == "exact":
            warnings.warn(f"PerSample falls back to one backward pass per objective: {reason}", stacklevel=3)
            if graph_is_there:
                return self._exact(problem, reason, add_to, retain_graph)
            reason += " The graph is gone by now: repeat the forward pass, the next call uses K backward passes."
        raise PerSampleError(reason)

    def _exact(self, problem: Problem, reason: str | None, add_to: Jacobian | None, retain_graph: bool) -> Jacobian:
        """K ordinary backward passes: because they are not more, or for the reason given."""
        if reason is not None and self.on_failure == "error":
            raise PerSampleError(f"The gradients can't be taken sample by sample: {reason}")
        count = len(problem)
        blocks = [param.new_zeros((count, *param.shape), dtype=row_dtype(param)) for param in self.params]
        blocks = blocks if add_to is None else list(add_to.blocks)
        for k, matrix in enumerate(problem.coefficients):
            keep = retain_graph or k < count - 1
            seeds = problem.seeds(matrix)
            grads = torch.autograd.grad(problem.outputs, self.params, seeds, retain_graph=keep, allow_unused=True)
            for block, grad in zip(blocks, grads, strict=True):
                if grad is not None:
                    block[k] += grad
        self.report = PerSampleReport(
            objectives=count,
            samples=problem.samples,
            terms=problem.terms,
            passes=count,
            rank=problem.terms,
            store="dense",
            exact_passes=True,
            reason=reason or f"K = {count} passes are not more than the terms need",
        )
        return Jacobian(tuple(blocks))


def _matrix(basis: object) -> np.ndarray | None:
    return basis.detach().to("cpu", torch.float64).numpy() if isinstance(basis, Tensor) else None


def _check_rows(rows: Jacobian, store: Store, count: int, params: Sequence[Tensor]) -> None:
    if store == "factored" or isinstance(rows, FactoredJacobian):
        raise ValueError(
            "Rows of several micro-batches add up only in the dense form: ask for store='dense' from the first one on."
        )
    if [tuple(block.shape) for block in rows.blocks] != [(count, *param.shape) for param in params]:
        raise ValueError(
            f"add_to holds {len(rows)} rows of {len(rows.blocks)} parameters, which does not fit {count} objectives "
            f"and {len(params)} parameters: pass what gradients() returned for an earlier micro-batch."
        )


def _without_probe(jacobian: Jacobian) -> Jacobian:
    if isinstance(jacobian, FactoredJacobian):
        return FactoredJacobian(jacobian.basis, jacobian.coefficients[:-1])
    return Jacobian(tuple(block[:-1] for block in jacobian.blocks))


def _added(jacobian: Jacobian, rows: Jacobian | None) -> Jacobian:
    if rows is None:
        return jacobian
    for block, more in zip(rows.blocks, jacobian.blocks, strict=True):
        block.add_(more)
    return rows
