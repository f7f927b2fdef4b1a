"""Ranks, and nothing else: which there are, who does what, and what all of them know in the end.

Work is cut by number, and random numbers belong to samples, so that any number of ranks does the same run.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from mogb_diffusion.errors import CheckpointError, InputError, RewardFailure

_KINDS: tuple[type[Exception], ...] = (InputError, CheckpointError, RewardFailure, OSError)


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

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails within the block on one rank fails on all of them at once, with the same message.

        Every rank has to get there; the block may hold no exchange that another rank would miss.

        Raises:
            Exception: The error of the first rank that has one: of the same kind where it is one of this package or an
                OSError, a RuntimeError otherwise. That rank itself raises what it had.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            failure = error
        if self.size == 1:
            return
        source = self.size - round(self.max(0.0 if failure is None else float(self.size - self.rank)))
        if source == self.size:
            return
        told = self._told(failure, source)
        if failure is not None:
            raise failure
        kind, text = told
        raise (_KINDS[kind] if kind >= 0 else RuntimeError)(text if kind >= 0 else f"rank {source}: {text}")

    def _told(self, failure: Exception | None, source: int) -> tuple[int, str]:
        """The kind and the text of one rank's error, on all of them."""
        said = b""
        if failure is not None and self.rank == source:
            kind = next((n for n, known in enumerate(_KINDS) if isinstance(failure, known)), -1)
            text = str(failure) if kind >= 0 else f"{type(failure).__name__}: {failure}"
            said = json.dumps([kind, text]).encode()
        length = round(self.max(float(len(said))))
        carrier = torch.zeros(length, dtype=torch.int32)
        carrier[: len(said)] = torch.tensor(list(said), dtype=torch.int32)
        kind, text = json.loads(bytes(self.sum(carrier).tolist()))
        return int(kind), str(text)

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
