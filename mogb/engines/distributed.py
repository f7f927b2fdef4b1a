r"""Gradients averaged over ranks *before* the Gramian. Only this file and ``shards.py`` know about ranks.

The Gramian is quadratic: the mean of the ranks' Gramians is not the Gramian of the mean gradient. So the rows are
averaged first, and only then multiplied. Replicated ones (plain or ``DistributedDataParallel``) are averaged by one
bucketed all-reduce, or spread over the ranks where they are large (:mod:`mogb.engines.shards`). Sharded ones
(``fully_shard``, DTensor) arrive averaged already, one shard a rank: their partial Gramians are summed over the shards,
K × K numbers instead of K × N. Every rank then solves the same problem, to the bit: the Gramian is that of the group's
first rank.

Ranks whose batches differ are weighted by their sample counts: rank r by :math:`n_r / \sum_s n_s`.

Shapes: K = objectives.
"""

import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float64
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.weak import WeakIdKeyDictionary

from mogb.engines.graph import nodes_below
from mogb.errors import DistributedError

GroupChoice: TypeAlias = Any  # a torch.distributed.ProcessGroup, "default" or None
Exchange: TypeAlias = Literal["auto", "rows", "shards"]
BUCKET = 1 << 24  # numbers in one collective
_WALKED = WeakIdKeyDictionary()  # parameters of models whose graph was looked at


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks that share one step.

    Attributes:
        group: Their process group; None when this process balances alone.
        share: What this rank's losses are multiplied with, so that a plain mean over ranks weights the ranks by their
            sample counts; 1 when all counts are equal.
        exchange: How rows that every rank holds are averaged: all of them on every rank (``"rows"``), each rank some
            of their columns (``"shards"``), or the better one for their size (``"auto"``).
    """

    group: Any
    share: float = 1.0
    exchange: Exchange = "auto"

    @property
    def alone(self) -> bool:
        return self.group is None

    @property
    def size(self) -> int:
        """How many there are."""
        return 1 if self.alone else dist.get_world_size(self.group)

    def by_gloo(self, device: torch.device) -> bool:
        """Whether tensors of this device travel by gloo, which knows few of the collectives, and on the CPU only."""
        backends = dict(pair.split(":") for pair in dist.get_backend_config(self.group).split(","))
        return backends.get(device.type, "gloo") == "gloo"

    def mean_losses(self, losses: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, " K"]:
        """The loss values of the whole batch. NaN on one rank is NaN on all, so that all of them stop."""
        if self.alone:
            return losses
        return self.total(losses * self.share) / self.size

    def average(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The means of tensors over the ranks, in buckets. Contiguous tensors are overwritten."""
        if self.alone:
            return list(tensors)
        averaged = [tensor.contiguous() for tensor in tensors]
        for bucket in _buckets(averaged):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket]) if len(bucket) > 1 else bucket[0].reshape(-1)
            guarded(lambda flat=flat: dist.all_reduce(flat, group=self.group))
            flat /= self.size
            offset = 0
            for tensor in bucket:
                tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
                offset += tensor.numel()
        return averaged

    def agree(self, gramian: Float64[np.ndarray, "K K"]) -> Float64[np.ndarray, "K K"]:
        """The first rank's copy, to the bit: equal up to rounding is not enough for equal weights."""
        if self.alone:
            return gramian
        carrier = self._carrier(gramian)
        guarded(lambda: dist.broadcast(carrier, src=dist.get_global_rank(self.group, 0), group=self.group))
        return carrier.cpu().numpy()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        return flag if self.alone else bool(self.total(np.array([float(flag)]))[0])

    def total(self, values: np.ndarray) -> np.ndarray:
        """The sum over the ranks."""
        carrier = self._carrier(values)
        guarded(lambda: dist.all_reduce(carrier, group=self.group))
        return carrier.cpu().numpy()

    def _carrier(self, values: np.ndarray) -> Tensor:
        on_cpu = "gloo" in str(dist.get_backend(self.group))
        return torch.from_numpy(values.copy()).to(
            "cpu" if on_cpu else torch.device("cuda", torch.cuda.current_device())
        )


def find_ranks(
    process_group: GroupChoice,
    num_samples: int | float | None,
    exchange: Exchange = "auto",
    *,
    step: Sequence[object] = (),
) -> Ranks:
    """The ranks that take part, from the arguments of :func:`mogb.backward`.

    Args:
        process_group: A group, ``"default"`` or None.
        num_samples: Of this rank.
        exchange: See :class:`Ranks`.
        step: What all ranks must have in common, such as the number of losses and the method. It is compared.

    Raises:
        ValueError: ``num_samples`` is negative or not finite, or no rank has a sample; an unknown group or exchange;
            ranks that differ in what they are about to do.
    """
    if num_samples is not None and not (np.isfinite(num_samples) and num_samples >= 0):
        raise ValueError(f"num_samples must be this rank's number of samples, at least 0, but got {num_samples!r}.")
    if exchange not in get_args(Exchange):
        raise ValueError(f"exchange must be one of {', '.join(get_args(Exchange))}, but got {exchange!r}.")
    if isinstance(process_group, str):
        if process_group != "default":
            raise ValueError(
                f"process_group must be a ProcessGroup, 'default' or None (off), but got {process_group!r}."
            )
        process_group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if process_group is None or dist.get_world_size(process_group) == 1:
        return Ranks(None)
    ranks = Ranks(process_group, exchange=exchange)
    size, known = ranks.size, num_samples is not None
    mark = float(zlib.crc32(repr((exchange, *step)).encode()) & 0xFFFFF)  # its square is exact in float64
    total, answers, marks, squares = ranks.total(np.array([float(num_samples or 0.0), float(known), mark, mark * mark]))
    if marks * marks != size * squares:  # equal on all ranks, or the squares would add up to more
        raise ValueError(
            "The ranks are about to do different things, and would wait for each other: all of them must pass the same "
            "number of losses, the same parameters, the same method with the same options and seed, and the same "
            f"exchange. This rank: {', '.join(map(str, (*step, f'exchange={exchange!r}')))}."
        )
    if answers not in (0, size):
        raise ValueError(
            f"num_samples was given on {int(answers)} of {size} ranks: give it on all of them, or on none."
        )
    if not known:
        return ranks
    if total == 0:
        raise ValueError("num_samples is 0 on every rank: there is nothing to balance.")
    assert num_samples is not None
    return Ranks(process_group, float(num_samples) * size / total, exchange)


def describe_step(losses: int, params: Sequence[Tensor], aggregator: object) -> tuple[str, ...]:
    """What all ranks must have in common, in words, for :func:`find_ranks`."""
    shapes = zlib.crc32(repr([tuple(param.shape) for param in params]).encode())
    options = re.sub(r" at 0x[0-9a-f]+", "", repr(aggregator))  # of a class of the user's, without a repr of its own
    return (f"{losses} losses", f"{len(params)} balanced parameters (shapes {shapes:08x})", options)


def parameters_of(module: nn.Module) -> Iterator[Tensor]:
    """The parameters that an optimizer updates: of modules sharded by ``fully_shard``, always the shards.

    After a forward pass such a module may hold the gathered parameters instead (its root does, until the backward
    pass); they are given back, and gathered again when they are needed.
    """
    if _may_be_sharded():
        from torch.distributed.fsdp import FSDPModule

        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
    yield from module.parameters()


def refuse_gathered(leaves: Iterable[Tensor]) -> None:
    """Refuses what ``fully_shard`` gathered for a while: no optimizer ever sees the gradients of such parameters.

    Raises:
        ValueError: One of the leaves is such a parameter.
    """
    if not _may_be_sharded():
        return
    gathered = {id(param) for param in _gathered()}
    for leaf in leaves:
        if id(leaf) in gathered:
            raise ValueError(
                f"A parameter of shape {list(leaf.shape)} was gathered by fully_shard for this step: its gradient "
                "belongs to the shards. Pass the module as params, or its parameters from before the forward pass."
            )


def refuse_static_graph(roots: Iterable[Tensor | GradientEdge], params: Sequence[Tensor]) -> None:
    """Refuses ``DistributedDataParallel(static_graph=True)`` that has not seen a backward pass of its own.

    It learns from its first one which parameters get gradients. From a balanced one, which leaves its hooks alone, it
    would learn that none does, and never average again. Looked for once for a model: the graph is walked.

    Raises:
        ValueError: The losses come from such a model.
    """
    if not (dist.is_available() and dist.is_initialized()) or not params or params[0] in _WALKED:
        return
    for node in nodes_below(roots):
        if type(node).__name__ == "_DDPSinkBackward" and getattr(node.ddp_weakref(), "static_graph", False):
            raise ValueError(
                "DistributedDataParallel(static_graph=True) must see a plain loss.backward() before the first balanced "
                "step, or it averages no gradient ever after: run one, or use static_graph=False."
            )
    _WALKED[params[0]] = True


def _may_be_sharded() -> bool:
    return "torch.distributed.fsdp" in sys.modules and dist.is_available() and dist.is_initialized()


def _gathered() -> Iterator[Tensor]:
    """What PyTorch alone knows, and tells nobody: so nothing is known where its names change."""
    states = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", {})
    for reference in list(states.values()):
        state = reference() if callable(reference) else reference
        group = getattr(state, "_fsdp_param_group", None)
        for found in getattr(state, "_fsdp_param_groups", None) or ([group] if group else []):
            for param in getattr(found, "fsdp_params", ()):
                if (tensor := getattr(param, "_unsharded_param", None)) is not None:
                    yield tensor


def is_sharded(param: Tensor) -> bool:
    """Whether a parameter is a DTensor with a shard on every rank."""
    return hasattr(param, "placements") and any(placement.is_shard() for placement in param.placements)


def local_part(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor; any other tensor is returned as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def sharded_like(param: Any, part: Tensor) -> Tensor:
    """A DTensor laid out as a parameter, from this rank's part."""
    made: Tensor = type(param.data).from_local(
        part.to(param.dtype),
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
    return made


@dataclass(frozen=True, eq=False)
class SharedRows:
    """Ties the blocks of one process to those of the others: see :class:`mogb.jacobian.Across`."""

    ranks: Ranks
    params: tuple[Tensor, ...]

    @property
    def sharded(self) -> tuple[bool, ...]:
        return tuple(is_sharded(param) for param in self.params)

    def __post_init__(self) -> None:
        layouts = {_layout(param) for param in self.params if is_sharded(param)}
        if len(layouts) > 1:
            raise ValueError(
                f"The parameters are sharded in {len(layouts)} different ways: balance those of one mesh and placement "
                "at a time."
            )

    def total(self, part: Float64[np.ndarray, "K K"]) -> Float64[np.ndarray, "K K"]:
        sample = next(param for param in self.params if is_sharded(param))
        carrier = torch.from_numpy(part.copy()).to(local_part(sample.detach()).device)
        for group in _shard_groups(sample):
            guarded(lambda group=group: dist.all_reduce(carrier, group=group))
        return carrier.cpu().numpy()

    def agree(self, gramian: Float64[np.ndarray, "K K"]) -> Float64[np.ndarray, "K K"]:
        return self.ranks.agree(gramian)

    def whole(self, direction: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(direction)  # shards of parameters take shards of the direction

    def all(self, flag: bool) -> bool:
        return not self.ranks.any(not flag) if any(self.sharded) else flag


def _layout(param: Any) -> tuple[Any, ...]:
    return (param.device_mesh, *param.placements)


def _shard_groups(param: Any) -> list[Any]:
    """The process groups along which a DTensor is sharded."""
    return [param.device_mesh.get_group(d) for d, placement in enumerate(param.placements) if placement.is_shard()]


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    for tensor in tensors:
        last = buckets[-1] if buckets else []
        same = last and last[0].dtype == tensor.dtype and last[0].device == tensor.device
        if same and sum(other.numel() for other in last) + tensor.numel() <= BUCKET:
            last.append(tensor)
        else:
            buckets.append([tensor])
    return buckets


def guarded(collective: Callable[[], object]) -> None:
    """Runs a collective.

    Raises:
        DistributedError: It failed.
    """
    try:
        collective()
    except RuntimeError as error:
        raise DistributedError(
            "A collective of the balanced step failed: another rank died, raised an error, or did not answer within "
            f"the process group's timeout. Look at the logs of the other ranks. ({error})"
        ) from error
