"""Ranks, and nothing else: which there are, who does what, and what all of them know in the end.

Work is cut by number, and random numbers belong to samples, so that any number of ranks does the same run.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """The processes of a run.

    Attributes:
        rank: Of this process.
        size: How many there are.
        local: Of this process on its machine.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def mine(self, count: int) -> range:
        """This process's part of ``count`` things, a contiguous piece."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def share(self, items: Sequence[int]) -> Sequence[int]:
        """This process's part of a list: every ``size``-th item."""
        return items[self.rank :: self.size]

    def any(self, flag: bool) -> bool:
        """Whether a flag is up on any rank."""
        return self.max(float(flag)) > 0

    def max(self, value: float) -> float:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return value
        carrier = self._carried(torch.tensor(value, dtype=torch.float64))
        dist.all_reduce(carrier, op=dist.ReduceOp.MAX)
        return float(carrier)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks; in place where the values are on a device that ranks exchange."""
        if self.size == 1:
            return values
        carrier = self._carried(values)
        dist.all_reduce(carrier)
        return carrier.to(values.device)

    def gather(self, part: Tensor, count: int) -> Tensor:
        """All rows ``[count, ...]`` from the contiguous pieces of :meth:`mine`."""
        if self.size == 1:
            return part
        longest = -(-count // self.size)
        padded = self._carried(part.new_zeros((longest, *part.shape[1:])))
        padded[: len(part)] = part
        pieces = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(pieces, padded)
        sizes = [len(Ranks(rank, self.size).mine(count)) for rank in range(self.size)]
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)]).to(part.device)

    def _carried(self, values: Tensor) -> Tensor:
        """On the device that the backend exchanges."""
        on_gpu = dist.get_backend() == "nccl" and values.device.type == "cpu"
        return values.to(torch.device("cuda", torch.cuda.current_device())) if on_gpu else values

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()


def start_ranks(device: str = "auto", minutes: float = 30.0) -> Ranks:
    """Joins the other processes that ``torchrun`` or ``accelerate launch`` started; alone under plain ``python``."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", dist.get_rank())))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks()
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=minutes))
    return Ranks(dist.get_rank(), size, local)


def stop_ranks() -> None:
    """Leaves the others."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
