"""Weights that are spread over the ranks, with their gradients and the optimizer's state: ``fully_shard`` (FSDP2).

Each rank keeps 1/W of every tensor, and gathers the weights of one block of the transformer at a time. A checkpoint
holds whole tensors, so that any number of ranks goes on from it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mogb.engines.distributed import is_sharded, local_part, sharded_like
from mogb_diffusion.distributed import Ranks

__all__ = ["averages_for", "gathered", "is_sharded", "local_part", "optimizer_state_for", "part_of", "shard",
           "sharded_like", "unload"]  # fmt: skip


def shard(transformer: Any, ranks: Ranks) -> None:
    """Spreads the parameters of a transformer over the ranks, block by block; they become DTensors, in place.

    What was gathered for a forward pass is let go of after it, in the outermost module, too: the next forward pass may
    be that of another policy, whose weights have taken their place.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(transformer.parameters()).device.type, (ranks.size,))
    for module in (*transformer.transformer_blocks, transformer):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def unload(transformer: nn.Module) -> None:
    """Lets go of all weights that are gathered."""
    from torch.distributed.fsdp import FSDPModule

    for module in transformer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def gathered(value: Any, keep: bool) -> Any:
    """A nested state with whole tensors on the CPU. All ranks take part; one that keeps nothing gets empty ones."""
    if isinstance(value, Tensor) and is_sharded(value):
        whole: Tensor = value.full_tensor()  # type: ignore[attr-defined]
        return whole.cpu() if keep else whole.new_empty(0)
    if isinstance(value, dict):
        return {key: gathered(item, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(item, keep) for item in value)
    return value


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, laid out as a parameter; the same tensor where that is not spread."""
    if not is_sharded(like):
        return whole
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    pieces, rank = whole.chunk(mesh.size(), 0), mesh.get_local_rank()
    mine = pieces[rank] if rank < len(pieces) else whole[:0]
    return sharded_like(like, mine.to(like.device))


def optimizer_state_for(parameters: Sequence[Tensor], state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer with whole tensors, as this rank takes it."""
    parts = {
        index: {
            name: part_of(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in entries.items()
        }
        for index, entries in state["state"].items()
    }
    return {**state, "state": parts}


def averages_for(parameters: Sequence[Tensor], state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a :class:`~mogb_diffusion.policy_schedule.ParameterEMA`, as :func:`optimizer_state_for`."""
    return {
        name: part_of(value, parameters[int(name.removeprefix("averages."))]) if isinstance(value, Tensor) else value
        for name, value in state.items()
    }
