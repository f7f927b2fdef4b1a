r"""Where per-sample gradients go: K rows, or a basis with one row per sample that K rows are combinations of.

.. math::  J = C S, \qquad G = C (S S^\top) C^\top, \qquad d = J^\top w = S^\top (C^\top w)

Shapes: K = objectives, M = rows of the basis, B = samples.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from mogb.engines.per_sample.contributions import Contribution
from mogb.jacobian import Jacobian

# Columns that are mixed at once when the rows themselves are asked for.
COLUMNS = 1 << 16


class FactoredJacobian(Jacobian):
    """K gradients as combinations of M < K others, so that nothing of the size of K gradients is kept.

    It answers what a :class:`~mogb.jacobian.Jacobian` answers; ``blocks`` and :meth:`dense` form the K rows.

    Attributes:
        basis: The M rows.
        coefficients: The combinations C, ``[K, M]``.
    """

    basis: Jacobian
    coefficients: Float64[np.ndarray, "K M"]

    def __init__(self, basis: Jacobian, coefficients: Float64[np.ndarray, "K M"]) -> None:
        object.__setattr__(self, "across", None)
        object.__setattr__(self, "basis", basis)
        object.__setattr__(self, "coefficients", coefficients)

    @property
    def blocks(self) -> tuple[Tensor, ...]:
        """The K rows, formed anew at every access."""
        return tuple(_mixed(block, self.coefficients) for block in self.basis.blocks)

    def __len__(self) -> int:
        return len(self.coefficients)

    def __add__(self, other: Jacobian) -> Jacobian:
        raise TypeError(
            "Factored rows can't be added: every micro-batch has its own basis. Ask for gradients(..., store='dense') "
            "when gradients accumulate, or convert with dense() first."
        )

    def dense(self) -> Jacobian:
        """The same gradients, with all K rows formed."""
        return Jacobian(self.blocks)

    def gramian(self) -> Float64[np.ndarray, "K K"]:
        gramian = self.coefficients @ self.basis.gramian() @ self.coefficients.T
        return (gramian + gramian.T) / 2

    def combine(self, weights: Float64[np.ndarray, " K"]) -> tuple[Tensor, ...]:
        return self.basis.combine(weights @ self.coefficients)

    def products(self, direction: Sequence[Tensor]) -> Float64[np.ndarray, " K"]:
        return self.coefficients @ self.basis.products(direction)

    def map(self, combine: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        def mixed_slices(rows: Tensor) -> Tensor:
            slices = rows.split(COLUMNS, dim=1)
            return torch.cat([combine(_mixed(part, self.coefficients)) for part in slices])

        return self.basis.map(mixed_slices)

    def first_non_finite(self) -> int | None:
        """The first of the K rows that a non-finite row of the basis enters."""
        for row in range(len(self.basis)):
            if not all(bool(torch.isfinite(block[row]).all()) for block in self.basis.blocks):
                return int(np.argmax(self.coefficients[:, row] != 0))
        return None


class Collector:
    """Takes per-sample gradients while backward passes run.

    Attributes:
        current: The number of the pass.
    """

    current: int = 0

    def collect(self, index: int, start: int, contribution: Contribution) -> None:
        """Takes those of the parameter ``index``, from its ``start``-th number on."""
        raise NotImplementedError

    def segment_done(self) -> None:
        """All passes went through the same checkpointed part of the model."""


class RowStore(Collector):
    """Collects K mixed rows, or ``passes x B`` rows of a basis, parameter by parameter.

    Args:
        params: The parameters, in the order of the blocks.
        mixing: For every pass, the weights of the B samples in the K objectives, ``[K, B]``.
        factored: Keep the per-sample rows instead of mixing them.
        rows: Dense rows to add to, ``[K, *shape]`` per parameter.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        mixing: Sequence[Float64[np.ndarray, "K B"]],
        *,
        factored: bool,
        rows: Jacobian | None = None,
    ) -> None:
        self._params = params
        self._mixing = mixing
        self._factored = factored
        count, self._samples = mixing[0].shape
        self._height = self._samples * len(mixing) if factored else count
        self._blocks: dict[int, Tensor] = {}
        self._touched: set[tuple[int, int]] = set()
        self._weights: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._spans = [_span(weights) for weights in mixing]
        if rows is not None:
            self._blocks = {index: block.view(count, -1) for index, block in enumerate(rows.blocks)}
            self._touched = {(index, 0) for index in self._blocks}

    def collect(self, index: int, start: int, contribution: Contribution) -> None:
        rows = self._rows(index, self.current)
        key = (index, self.current if self._factored else 0)
        add = key in self._touched
        first, last = (0, len(rows)) if self._factored else self._spans[self.current]
        if not add and (contribution.size < rows.shape[1] or last - first < len(rows)):
            rows.zero_()
            add = True
        self._touched.add(key)
        target = rows[first:last, start : start + contribution.size]
        if self._factored:
            contribution.write(target, add=add)
        elif last > first:
            contribution.mix(self._mixing_weights(rows)[first:last], target, add=add)

    def finish(self) -> Jacobian:
        """The rows; zero where a parameter took no part."""
        for index in range(len(self._params)):
            for part in range(len(self._mixing) if self._factored else 1):
                if (index, part) not in self._touched:
                    self._rows(index, part).zero_()
        blocks = (self._blocks[index].view(-1, *param.shape) for index, param in enumerate(self._params))
        jacobian = Jacobian(tuple(blocks))
        return FactoredJacobian(jacobian, np.concatenate(self._mixing, axis=1)) if self._factored else jacobian

    def _rows(self, index: int, part: int) -> Tensor:
        if index not in self._blocks:
            param = self._params[index]
            shape = (self._height, param.numel())
            self._blocks[index] = torch.empty(shape, dtype=row_dtype(param), device=param.device)
        block = self._blocks[index]
        return block[part * self._samples : (part + 1) * self._samples] if self._factored else block

    def _mixing_weights(self, like: Tensor) -> Tensor:
        key = (self.current, like.dtype, like.device)
        if key not in self._weights:
            self._weights[key] = torch.from_numpy(self._mixing[self.current]).to(like.device, like.dtype)
        return self._weights[key]


def _span(weights: Float64[np.ndarray, "K B"]) -> tuple[int, int]:
    """From the first to after the last objective that a pass says anything about; (0, 0) if it is none."""
    found = np.flatnonzero(weights.any(axis=1))
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 0)


def row_dtype(param: Tensor) -> torch.dtype:
    """Rows of half-precision parameters add up in float32."""
    return torch.promote_types(param.dtype, torch.float32)


def _mixed(block: Tensor, coefficients: Float64[np.ndarray, "K M"]) -> Tensor:
    mixing = torch.from_numpy(coefficients).to(block.device, block.dtype)
    return (mixing @ block.reshape(len(block), -1)).reshape(-1, *block.shape[1:])
