r"""One call in place of ``loss.backward()``: K losses in, one direction in every ``param.grad`` out.

.. math::  J_k = \nabla_\theta L_k, \qquad \texttt{param.grad} \mathrel{+}= d(J)

Shapes: K = objectives.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mogb.base import Aggregator
from mogb.engines.choice import Engine, check_engine, choose
from mogb.engines.distributed import Exchange, GroupChoice, describe_step, find_ranks
from mogb.engines.groups import Grouping, Groups, has_state
from mogb.engines.losses import Losses, as_losses
from mogb.engines.plan import Plan, make_plan
from mogb.engines.report import Report
from mogb.engines.representation import RepresentationSource, as_representation, plan_representation
from mogb.engines.scaling import scale_of
from mogb.engines.source import LossSource
from mogb.engines.step import Source, balance


def backward(
    losses: Losses | Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    params: nn.Module | Iterable[Tensor] | None,
    aggregator: Aggregator,
    *,
    shared: Tensor | Iterable[Tensor] | None = None,
    groups: Groups = "whole",
    engine: Engine = "auto",
    scaler: Any = None,
    num_samples: int | float | None = None,
    process_group: GroupChoice = "default",
    exchange: Exchange = "auto",
    retain_graph: bool = False,
) -> Report:
    """Differentiates K losses, combines the gradients, and adds the direction to every ``param.grad``.

    Methods that read only losses cost one backward pass, the others K. Clipping, the optimizer and its schedule come
    after, unchanged. A step that fails leaves every ``.grad`` and the method as they were.

    Args:
        losses: A tensor ``[K]``, a sequence of scalars, or a mapping from names to scalars (names then appear in the
            report). They may share one graph or not.
        params: The parameters to balance (a module stands for its parameters; frozen ones are skipped). None: those
            that two or more losses reach are balanced, and the others, such as the heads of a multi-task model, get
            the plain gradient of the one loss that reaches them.
        aggregator: A method, from :func:`mogb.make`.
        shared: The tensor, or tensors, between the shared part of a model and its heads. The gradients are balanced
            there, which passes only the heads K times, and the direction goes on through the shared part in one pass;
            the heads get the plain gradients of their losses. An approximation: the weights are those of the gradients
            at the representation, as in MGDA-UB. Only parameters in ``params`` get a gradient, unless that is None.
        groups: ``"whole"`` balances all parameters together, ``"module"`` those of each layer (pass the module as
            ``params``), ``"matrix"`` each parameter by itself; or a list of, or a mapping from names to, collections of
            parameters. Each group has weights of its own (``report.groups``). Methods with a state need a
            :class:`mogb.Balancer`, which keeps one for each group.
        engine: ``"sequential"`` takes K backward passes; ``"batched"`` one that is vectorized, where the graph can be;
            ``"streaming"`` K passes that drop the rows block by block and one for the direction, for methods that read
            no whole rows; ``"auto"`` is sequential unless the rows are very large. See docs/engines.md.
        scaler: A ``torch.amp.GradScaler``. Pass the losses unscaled. The gradients are scaled on their way down, the
            method sees them unscaled, and ``.grad`` is left scaled, so that ``scaler.unscale_``, ``scaler.step`` and
            ``scaler.update`` follow as always. If a gradient overflows, the step is skipped: ``.grad`` holds Inf,
            ``report.skipped`` is True, and the method has not seen the step.
        num_samples: This rank's number of samples, where the ranks' batches differ: its share of the mean gradient.
        process_group: The ranks whose gradients are averaged before the Gramian: those of ``torch.distributed`` if it
            is initialised, another group, or None to balance this process alone. Models may be plain, wrapped in
            ``DistributedDataParallel``, or sharded by ``fully_shard`` (pass the module or its parameters then: the
            graph does not show them). Every rank gets the same weights, to the bit.
        exchange: How ranks average rows that all of them hold: ``"rows"`` (one bucketed all-reduce), ``"shards"``
            (each rank keeps some columns of all rows, and the direction is gathered: (K+1) / 2K of the bytes, 1/W of
            the memory), or ``"auto"``: shards from 2^20 numbers in the rows on, unless the method reads whole rows.
        retain_graph: Keep the graph for another backward pass.

    Raises:
        TypeError: Inputs of the wrong kind, or complex or sparse gradients.
        ValueError: Losses without a graph or that reach none of the parameters, parameters that need no gradient, or
            an engine or groups that don't fit the method.
        NonFiniteError: NaN or Inf in a loss or a gradient; it names the objective. Every ``.grad`` is untouched.
        DistributedError: Another rank died, or did not answer in time.
        RuntimeError: The graph was already freed, or can't be vectorized.

    Examples:
        >>> import mogb
        >>> weight = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> losses = torch.stack([(weight - 2).square().sum(), weight.square().sum()])
        >>> report = mogb.backward(losses, [weight], mogb.make("mgda"))
        >>> weight.grad
        tensor([0., 0.])
    """
    if not isinstance(aggregator, Aggregator):
        raise TypeError(f"aggregator must be a method, such as mogb.make('mgda'), but got {aggregator!r}.")
    check_engine(engine, aggregator, groups=groups)
    if isinstance(params, Tensor):
        raise TypeError("params must be a collection of tensors, but got one tensor: write [tensor].")
    params = params if params is None or isinstance(params, nn.Module) else tuple(params)
    grouping = Grouping(aggregator, groups, params)
    if not grouping.whole and aggregator.reads != "losses" and has_state(aggregator):
        raise ValueError(
            f"groups= needs a state of {aggregator.name!r} for each group, which mogb.backward has nowhere to keep: "
            "use mogb.Balancer(aggregator, params, groups=...)."
        )
    source = make_source(
        losses,
        params,
        aggregator,
        shared=shared,
        grouping=grouping,
        engine=engine,
        scaler=scaler,
        num_samples=num_samples,
        process_group=process_group,
        exchange=exchange,
        retain_graph=retain_graph,
    )
    return balance(source, grouping).report


def make_source(
    losses: Losses | Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    params: nn.Module | Iterable[Tensor] | None,
    aggregator: Aggregator,
    *,
    shared: Tensor | Iterable[Tensor] | None,
    grouping: Grouping,
    engine: Engine,
    scaler: Any,
    num_samples: int | float | None,
    process_group: GroupChoice,
    exchange: Exchange,
    retain_graph: bool,
    doing: str = "balance",
) -> Source:
    """Checks the arguments of :func:`backward`, and says what is differentiated and how.

    ``doing`` is what the ranks must agree to do, besides what the other arguments say.
    """
    found = as_losses(losses)
    scale = scale_of(scaler, found.scalars[0].device)
    if shared is not None:
        if engine != "auto" or not grouping.whole:
            raise ValueError("shared= fixes how gradients are taken: leave out engine= and groups=.")
        tensors = as_representation(shared)
        plan = plan_representation(found, tensors, params)
        doing = f"shared, {doing}"
        ranks = find_ranks(process_group, num_samples, exchange, step=_step(found, plan, aggregator, doing))
        return RepresentationSource(found, plan, tensors, ranks, scale, retain_graph=retain_graph)
    plan = make_plan(found, params)
    choice = choose(engine, found, plan, aggregator, whole=grouping.whole)
    doing = f"{choice.describe()}, {doing}"
    ranks = find_ranks(process_group, num_samples, exchange, step=_step(found, plan, aggregator, doing))
    if ranks.alone and plan.sharded:
        raise ValueError(
            "process_group=None balances this process alone, but the parameters are sharded over several: leave "
            "process_group out, or pass the group that they are sharded over."
        )
    if not ranks.alone and plan.sharded and not aggregator.yields_weights:
        raise ValueError(
            f"{aggregator.name!r} reads whole rows of the Jacobian, but the parameters are sharded: no rank has whole "
            "rows. Use a method that yields weights, or DistributedDataParallel."
        )
    return LossSource(found, plan, choice.agreed(ranks), ranks, scale, retain_graph=retain_graph)


def _step(losses: Losses, plan: Plan, aggregator: Aggregator, doing: str) -> tuple[str, ...]:
    return (*describe_step(len(losses), plan.shared, aggregator), doing)
