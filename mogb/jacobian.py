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
from jaxtyping import Float32, Float64
from scipy.linalg.lapack import dpotrf
from torch import Tensor

# Numbers that are converted or multiplied at once, so that the work stays in the cache, and on an accelerator.
CHUNK = 1 << 22
CHUNK_WIDE = 1 << 19
CHUNK_CUDA = 1 << 24
# Float32 sums are short and added up in float64, as one long float32 sum over a million columns loses up to five
# digits. Columns of one sum: in matrix products, and in the single inner products that beat them for few long rows.
SHORT, SHORT_ALONE = 1 << 12, 1 << 15
# Long rows that are neither few nor many are multiplied in one batch of products, whose sums are rounded more coarsely.
SHORT_IN_BATCH = 1 << 11
MANY_COLUMNS = 1 << 14
FEW_ROWS, MANY_ROWS = 5, 32
# Up to this many numbers, float32 rows are multiplied in float64: it costs microseconds.
SMALL = 1 << 16
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
        with np.errstate(over="ignore", invalid="ignore"):  # such numbers are looked for below
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
        if self.across is None and len(self.blocks) == 1:
            return _block_gramian(_rows(self.blocks[0]), wide)
        sharded = self.across.sharded if self.across is not None else [False] * len(self.blocks)
        whole, parts = np.zeros((len(self), len(self))), np.zeros((len(self), len(self)))
        for block, is_part in zip(self.blocks, sharded, strict=True):
            (parts if is_part else whole).__iadd__(_block_gramian(_rows(block), wide))
        if self.across is None:
            return whole
        return self.across.agree(whole + self.across.total(parts) if any(sharded) else whole)


def all_finite(direction: Sequence[Tensor]) -> bool:
    """Whether a direction is finite. One pass, and a second one only where its squared norm overflowed."""
    return all(math.isfinite(_squared_norm(part)) or bool(torch.isfinite(part).all()) for part in direction)


def _squared_norm(part: Tensor) -> float:
    """Of one tensor; no pass is cheaper, and NaN and Inf come through. Halves would overflow: they are summed up."""
    if part.dtype not in (torch.float32, torch.float64):
        return part.sum(dtype=torch.float32).item()
    flat = part.reshape(-1)
    return flat.dot(flat).item()


def _rows(block: Tensor) -> Tensor:
    return block if block.ndim == 2 else block.reshape(len(block), block.numel() // len(block))


def _slices(rows: Tensor, numbers: int) -> tuple[Tensor, ...]:
    return _split(rows, max(1, numbers // len(rows)))


def _split(rows: Tensor, width: int) -> tuple[Tensor, ...]:
    return rows.split(width, dim=1) if rows.shape[1] > width else (rows,)


def _block_gramian(rows: Tensor, wide: bool) -> Float64[np.ndarray, "K K"]:
    rows = rows.detach()
    if rows.is_cuda:
        parts = [part.double() for part in _slices(rows, CHUNK_CUDA)]
        return torch.stack([part @ part.mT for part in parts]).sum(0).cpu().numpy()
    products: list[np.ndarray] = []
    if wide or rows.dtype == torch.float64:
        for part in _slices(rows, CHUNK_WIDE):
            exact = part.cpu().double()  # other accelerators may lack float64
            products.append((exact @ exact.mT).numpy())
    else:
        for part in _slices(rows, CHUNK):
            products += _short_products(part.cpu().float())
    return products[0].astype(float, copy=False) if len(products) == 1 else np.sum(products, 0, dtype=float)


def _short_products(rows: Float32[Tensor, "K n"]) -> list[np.ndarray]:
    """Parts of ``rows @ rows.T``, none of which is a long sum in float32."""
    if rows.shape[1] <= MANY_COLUMNS or len(rows) >= MANY_ROWS:
        return [(part @ part.mT).numpy() for part in _split(rows, SHORT)]
    if len(rows) <= FEW_ROWS:
        return [_inner_products(part.numpy()) for part in _split(rows, SHORT_ALONE)]
    whole = rows.shape[1] // SHORT_IN_BATCH * SHORT_IN_BATCH
    pieces = rows[:, :whole].unflatten(1, (-1, SHORT_IN_BATCH)).transpose(0, 1)
    rest = rows[:, whole:]
    return [torch.bmm(pieces, pieces.mT).sum(0, dtype=torch.float64).numpy(), (rest @ rest.mT).numpy()]


def _inner_products(rows: Float32[np.ndarray, "K n"]) -> Float32[np.ndarray, "K K"]:
    products = np.empty((len(rows), len(rows)), rows.dtype)
    for i, row in enumerate(rows):
        for j in range(i, len(rows)):
            products[i, j] = products[j, i] = row.dot(rows[j])
    return products


def _weighted_sum(block: Tensor, weights: Float64[np.ndarray, " K"]) -> Tensor:
    if block.dtype in (torch.float16, torch.bfloat16):
        return _weighted_sum_of_halves(_rows(block), weights).reshape(block.shape[1:])
    coefficients = torch.from_numpy(weights).to(block.device, block.dtype)
    return coefficients @ block if block.ndim == 2 else (coefficients @ _rows(block)).reshape(block.shape[1:])


def _weighted_sum_of_halves(rows: Tensor, weights: Float64[np.ndarray, " K"]) -> Tensor:
    """In float32, slice by slice: weights on short rows may be larger than half precision can hold."""
    coefficients = torch.from_numpy(weights).to(rows.device, torch.float32)
    numbers = CHUNK_WIDE if rows.is_cpu else CHUNK_CUDA
    return torch.cat([(coefficients @ part.float()).to(rows.dtype) for part in _slices(rows, numbers)])


def _is_delicate(gramian: Float64[np.ndarray, "K K"]) -> bool:
    squares = gramian.diagonal()
    if not math.isfinite(squares.sum()) or squares.min() < SAFE_SQUARES[0] or squares.max() > SAFE_SQUARES[1]:
        return True
    scale = 1 / np.sqrt(squares)
    unit = gramian * scale * scale[:, None]
    unit.flat[:: len(unit) + 1] -= SAFE_EIGENVALUE
    return bool(dpotrf(unit, lower=True, clean=False, overwrite_a=True)[1] != 0)  # no Cholesky factor
