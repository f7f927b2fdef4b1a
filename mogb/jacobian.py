r"""K gradients kept as they come out of autograd: one block per parameter, never concatenated.

Every operation on N numbers that mogb needs is here: the Gramian, a weighted sum of rows, a finite check.

.. math::  G = J J^\top = \sum_{\text{blocks}} B B^\top, \qquad d = J^\top w .

Shapes: K = objectives, N = all numbers in one gradient; a block is ``[K, ...]``.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

# Columns that are converted and multiplied at once, so that the work stays in the cache: for inner products of few
# rows, for matrix products, and on an accelerator. Float32 sums are short (SHORT terms in matrix products), and added
# up in float64: one long float32 sum over a million columns loses up to five digits.
CHUNK = 1 << 13
CHUNK_MANY_ROWS = 1 << 16
CHUNK_CUDA = 1 << 22
SHORT = 1 << 10
# Below this many numbers, float32 rows are multiplied in float64: it costs microseconds.
SMALL = 1 << 17
# Up to this many rows, single inner products beat a matrix product.
FEW_ROWS = 8
# Squared norms outside of this range may have lost digits to underflow or overflow in float32.
SAFE_SQUARES = (1e-25, 1e30)
# Unit-diagonal Gramians with a smaller eigenvalue than this are formed again in float64.
SAFE_EIGENVALUE = 1e-5


@runtime_checkable
class Across(Protocol):
    """How one process's blocks belong to those of others."""

    @property
    def sharded(self) -> Sequence[bool]:
        """For every block, whether it is one shard of rows that are spread over processes."""

    def total(self, part: Float64[np.ndarray, "K K"]) -> Float64[np.ndarray, "K K"]:
        """The sum of the shards' parts of the Gramian."""

    def agree(self, gramian: Float64[np.ndarray, "K K"]) -> Float64[np.ndarray, "K K"]:
        """The same bits on every process."""

    def whole(self, direction: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A weighted sum of the rows in the form in which the parameters take it."""

    def all(self, flag: bool) -> bool:
        """Whether the flag is up on every process, asked about what :meth:`whole` gave."""


@dataclass(frozen=True, eq=False)
class Jacobian:
    """The gradients of K losses, as blocks ``[K, *shape]``, one per parameter.

    Attributes:
        blocks: At least one tensor; all with the same first dimension K.
        across: Set where several processes hold the rows together.
    """

    blocks: tuple[Tensor, ...]
    across: Across | None = None

    @classmethod
    def of(cls, blocks: Tensor | Iterable[Tensor]) -> "Jacobian":
        """A Jacobian from one tensor ``[K, N]`` or from one tensor ``[K, *shape]`` per parameter."""
        return cls((blocks,) if isinstance(blocks, Tensor) else tuple(blocks))

    def __len__(self) -> int:
        return self.blocks[0].shape[0]

    def __add__(self, other: "Jacobian") -> "Jacobian":
        """Rows add over micro-batches: the gradient of a sum is the sum of the gradients."""
        return Jacobian(tuple(a + b for a, b in zip(self.blocks, other.blocks, strict=True)), self.across)

    def gramian(self) -> Float64[np.ndarray, "K K"]:
        """The inner products of the rows, in float64.

        Float32 rows are multiplied in float32, slice by slice, and the slices are added in float64. Rows that are few
        and short, nearly dependent (where rounding would be amplified), or so long or short that their squares leave
        the range of float32 are multiplied in float64 instead.
        """
        spread = self.across is not None and any(self.across.sharded)  # then sizes differ, but decisions may not
        wide = not spread and sum(block.numel() for block in self.blocks) <= SMALL
        gramian = self._accumulate(wide)
        if not wide and self.blocks[0].dtype != torch.float64 and _is_delicate(gramian):
            gramian = self._accumulate(wide=True)
        return gramian

    def combine(self, weights: Float64[np.ndarray, " K"]) -> tuple[Tensor, ...]:
        """The weighted sum of the rows, one tensor ``[*shape]`` per block."""
        direction = tuple(_weighted_sum(block, weights) for block in self.blocks)
        return direction if self.across is None else self.across.whole(direction)

    def is_finite(self, direction: Sequence[Tensor]) -> bool:
        """Whether a direction is finite, on every process that holds a part of it."""
        fine = all_finite(direction)
        return fine if self.across is None else self.across.all(fine)

    def products(self, direction: Sequence[Tensor]) -> Float64[np.ndarray, " K"]:
        """The inner product of every row with a direction given block by block."""
        total = torch.zeros(len(self), dtype=torch.float64)
        for block, part in zip(self.blocks, direction, strict=True):
            total += (_rows(block) @ part.reshape(-1).to(block.dtype)).to("cpu", torch.float64)
        return total.numpy()

    def map(self, combine: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        """Applies a coordinate-wise rule ``[K, n] -> [n]`` to every block."""
        return tuple(combine(_rows(block)).reshape(block.shape[1:]) for block in self.blocks)

    def first_non_finite(self) -> int | None:
        """The first row that holds NaN or Inf. Reads everything: call it only once something looked wrong."""
        for row in range(len(self)):
            if not all(bool(torch.isfinite(block[row]).all()) for block in self.blocks):
                return row
        return None

    def _accumulate(self, wide: bool) -> Float64[np.ndarray, "K K"]:
        sharded = self.across.sharded if self.across is not None else [False] * len(self.blocks)
        whole, parts = np.zeros((len(self), len(self))), np.zeros((len(self), len(self)))
        for block, is_part in zip(self.blocks, sharded, strict=True):
            (parts if is_part else whole).__iadd__(_block_gramian(_rows(block), wide))
        if self.across is None:
            return whole
        return self.across.agree(whole + self.across.total(parts) if any(sharded) else whole)


def all_finite(direction: Sequence[Tensor]) -> bool:
    """Whether a direction is finite. One pass, and a second one only where a sum overflowed."""
    return all(math.isfinite(part.sum().item()) or bool(torch.isfinite(part).all()) for part in direction)


def _rows(block: Tensor) -> Tensor:
    return block if block.ndim == 2 else block.reshape(len(block), block.numel() // len(block))


def _slices(rows: Tensor, width: int) -> tuple[Tensor, ...]:
    return rows.split(width, dim=1) if rows.shape[1] > width else (rows,)


def _block_gramian(rows: Tensor, wide: bool) -> Float64[np.ndarray, "K K"]:
    rows = rows.detach()
    if rows.is_cuda:
        parts = [part.double() for part in _slices(rows, CHUNK_CUDA)]
        return torch.stack([part @ part.mT for part in parts]).sum(0).cpu().numpy()
    few = len(rows) <= FEW_ROWS
    gramian = np.zeros((len(rows), len(rows)))
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks at the result, and repeats it in float64
        for slice_ in _slices(rows, CHUNK if few else CHUNK_MANY_ROWS):
            part = slice_.cpu()  # other accelerators may lack float64
            exact = part.double() if wide else part.to(torch.promote_types(part.dtype, torch.float32))
            gramian += _inner_products(exact.numpy()) if few else _short_products(exact).numpy()
    return gramian


def _inner_products(rows: np.ndarray) -> Float64[np.ndarray, "K K"]:
    gramian = np.empty((len(rows), len(rows)))
    for i, row in enumerate(rows):
        for j in range(i, len(rows)):
            gramian[i, j] = gramian[j, i] = row.dot(rows[j])
    return gramian


def _short_products(rows: Tensor) -> Tensor:
    """``rows @ rows.T``, as a float64 sum of products over few columns each."""
    whole = rows.shape[1] // SHORT * SHORT
    pieces = rows[:, :whole].unflatten(1, (-1, SHORT)).transpose(0, 1) if whole else None
    rest = rows[:, whole:]
    total = (rest @ rest.mT).double()
    return total if pieces is None else total + torch.bmm(pieces, pieces.mT).sum(0, dtype=torch.float64)


def _weighted_sum(block: Tensor, weights: Float64[np.ndarray, " K"]) -> Tensor:
    if block.dtype in (torch.float16, torch.bfloat16):
        return _weighted_sum_of_halves(_rows(block), weights).reshape(block.shape[1:])
    coefficients = torch.from_numpy(weights).to(block.device, block.dtype)
    return coefficients @ block if block.ndim == 2 else (coefficients @ _rows(block)).reshape(block.shape[1:])


def _weighted_sum_of_halves(rows: Tensor, weights: Float64[np.ndarray, " K"]) -> Tensor:
    """In float32, slice by slice: weights on short rows may be larger than half precision can hold."""
    coefficients = torch.from_numpy(weights).to(rows.device, torch.float32)
    width = CHUNK_MANY_ROWS if rows.is_cpu else CHUNK_CUDA
    return torch.cat([(coefficients @ part.float()).to(rows.dtype) for part in _slices(rows, width)])


def _is_delicate(gramian: Float64[np.ndarray, "K K"]) -> bool:
    squares = gramian.diagonal()
    if not np.isfinite(gramian).all() or squares.min() < SAFE_SQUARES[0] or squares.max() > SAFE_SQUARES[1]:
        return True
    norms = np.sqrt(squares)
    return bool(np.linalg.eigvalsh(gramian / np.outer(norms, norms))[0] < SAFE_EIGENVALUE)
