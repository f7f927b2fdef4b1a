r"""Rows spread over ranks: each rank holds all K rows of its share of the columns.

.. math::

    J^{(r)}\,[K, N]
    \;\xrightarrow{\text{reduce-scatter}}\; \bar J_r\,[K, N/W]
    \;\xrightarrow{\text{all-reduce}}\; G = \sum_r \bar J_r \bar J_r^\top
    \;\longrightarrow\; d_r = \bar J_r^\top w
    \;\xrightarrow{\text{all-gather}}\; d .

Averaging the rows on every rank sends 2 K N numbers (times (W-1)/W, in a ring). Here the K N go out once, and only the
N of the direction come back: (K+1) N, or (K+1) / 2K of it. Rows, Gramian and direction take 1/W of the memory and time.

Shapes: K = objectives, N = numbers in one gradient, W = ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float64
from torch import Tensor

from mogb.engines.differentiate import averaged
from mogb.engines.distributed import BUCKET, Ranks, SharedRows, guarded, is_sharded
from mogb.jacobian import Jacobian

# From this many numbers in the rows on, shards are worth a second collective.
SHARD_FROM = 1 << 20

# As PyTorch calls them from 2.13 on, where the older names warn.
_all_gather_single: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or getattr(
    dist, "reduce_scatter_tensor", None
)


@dataclass(frozen=True)
class _Span:
    """Columns ``start`` to ``stop`` of one block."""

    block: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Bucket:
    """Columns that travel together: one dtype, one device; ``share`` of them, padded, end on each rank."""

    spans: tuple[_Span, ...]
    share: int


@dataclass(frozen=True, eq=False)
class ShardedRows:
    """Ties this rank's columns of the mean rows to those of the others: see :class:`mogb.jacobian.Across`."""

    ranks: Ranks
    shapes: tuple[torch.Size, ...]
    buckets: tuple[_Bucket, ...]

    @property
    def sharded(self) -> tuple[bool, ...]:
        return (True,) * len(self.buckets)

    def total(self, part: Float64[np.ndarray, "K K"]) -> Float64[np.ndarray, "K K"]:
        return self.ranks.total(part)

    def agree(self, gramian: Float64[np.ndarray, "K K"]) -> Float64[np.ndarray, "K K"]:
        return self.ranks.agree(gramian)

    def whole(self, direction: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Every rank's columns, put together: the direction as the parameters need it."""
        blocks: dict[int, Tensor] = {}
        for bucket, part in zip(self.buckets, direction, strict=True):
            columns = _all_gather(part, self.ranks)
            offset = 0
            for span in bucket.spans:
                if span.block not in blocks:
                    blocks[span.block] = columns.new_empty(self.shapes[span.block].numel())
                width = span.stop - span.start
                blocks[span.block][span.start : span.stop] = columns[offset : offset + width]
                offset += width
        empty = direction[0].new_empty(0)
        return tuple(blocks.get(index, empty).view(shape) for index, shape in enumerate(self.shapes))

    def all(self, flag: bool) -> bool:
        return flag  # what is asked about is whole again, and the same everywhere


def mean_rows(ranks: Ranks, params: Sequence[Tensor], blocks: list[Tensor], *, whole: bool) -> Jacobian:
    """The mean of the ranks' rows, exchanged as the ranks' ``exchange`` says.

    Args:
        ranks: Those that share the step.
        params: What the blocks are gradients of.
        blocks: This rank's rows. The list is emptied, so that what was sent away is freed.
        whole: Whether single coordinates will be read, as a method does that yields no weights.

    Raises:
        ValueError: ``exchange="shards"`` for such a method.
        DistributedError: Another rank died, or did not answer in time.
    """
    taken = blocks[:]
    blocks.clear()
    if ranks.alone:
        return Jacobian(tuple(taken))
    if whole and ranks.exchange == "shards":
        raise ValueError(
            "exchange='shards' leaves no rank with whole rows, but this method reads them: use exchange='rows', or a "
            "method that yields weights."
        )
    if not whole and not any(is_sharded(param) for param in params) and _pays(ranks, taken):
        return _scatter(ranks, taken)
    rows = averaged(ranks, list(zip(params, taken, strict=True)))
    return Jacobian(tuple(block for _, block in rows), SharedRows(ranks, tuple(params)))


def _pays(ranks: Ranks, blocks: Sequence[Tensor]) -> bool:
    numbers = sum(block.numel() for block in blocks)
    if ranks.exchange != "auto" or not numbers:
        return ranks.exchange == "shards" and numbers > 0
    # Gloo would take a detour over the CPU; a single row is sent as often either way.
    detour = any(ranks.by_gloo(block.device) and not block.is_cpu for block in blocks)
    return len(blocks[0]) > 1 and not detour and numbers >= SHARD_FROM


def _scatter(ranks: Ranks, blocks: list[Tensor]) -> Jacobian:
    """Sends the columns to where they belong, bucket by bucket, and lets go of each block once it is sent."""
    shapes = tuple(block.shape[1:] for block in blocks)
    buckets, parts = tuple(_cut(blocks, ranks.size)), []
    waiting: list[Tensor | None] = [block.reshape(len(block), block.numel() // len(block)) for block in blocks]
    blocks.clear()
    for bucket in buckets:
        first = waiting[bucket.spans[0].block]
        assert first is not None
        rows = first.new_zeros(len(first), bucket.share * ranks.size)
        offset = 0
        for span in bucket.spans:
            block = waiting[span.block]
            assert block is not None
            rows[:, offset : offset + span.stop - span.start] = block[:, span.start : span.stop]
            offset += span.stop - span.start
            if span.stop == block.shape[1]:
                waiting[span.block] = None
        del first, block
        parts.append(_reduce_scatter(rows, ranks))
    return Jacobian(tuple(parts), ShardedRows(ranks, shapes, buckets))


def _cut(blocks: Sequence[Tensor], size: int) -> Iterator[_Bucket]:
    """All columns, in order, in buckets of one dtype and device."""
    limit = max(BUCKET // len(blocks[0]), size)
    spans: list[_Span] = []
    room, kind = limit, None
    for index, block in enumerate(blocks):
        start, stop = 0, block.numel() // len(block)
        if spans and (block.dtype, block.device) != kind:
            yield _bucket(spans, size)
            spans, room = [], limit
        kind = (block.dtype, block.device)
        while start < stop:
            if not room:
                yield _bucket(spans, size)
                spans, room = [], limit
            width = min(room, stop - start)
            spans.append(_Span(index, start, start + width))
            start, room = start + width, room - width
    if spans:
        yield _bucket(spans, size)


def _bucket(spans: list[_Span], size: int) -> _Bucket:
    return _Bucket(tuple(spans), -(-sum(span.stop - span.start for span in spans) // size))


def _reduce_scatter(rows: Tensor, ranks: Ranks) -> Tensor:
    """This rank's columns of the mean over the ranks, ``[K, n] -> [K, n / W]``."""
    parts = rows.view(len(rows), ranks.size, -1).transpose(0, 1).contiguous()  # [W, K, n / W]
    if not ranks.by_gloo(rows.device):
        mine = torch.empty_like(parts[0])
        guarded(lambda: _reduce_scatter_single(mine, parts.flatten(0, 1), group=ranks.group))
        return mine / ranks.size
    sent = parts.cpu()  # gloo's reduce_scatter sends as much as an all-reduce
    received = torch.empty_like(sent)
    guarded(lambda: dist.all_to_all_single(received, sent, group=ranks.group))
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (received.to(rows.device).sum(dim=0, dtype=wide) / ranks.size).to(rows.dtype)


def _all_gather(part: Tensor, ranks: Ranks) -> Tensor:
    """The columns of all ranks, ``[n / W] -> [n]``."""
    sent = part.cpu() if ranks.by_gloo(part.device) else part
    columns = sent.new_empty(len(part) * ranks.size)
    guarded(lambda: _all_gather_single(columns, sent, group=ranks.group))
    return columns.to(part.device)
