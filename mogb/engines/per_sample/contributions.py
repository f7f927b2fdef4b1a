r"""The gradient of one parameter from one call of its layer, split over the samples but not yet formed.

A layer that multiplies by a matrix has, for sample i with T tokens,

.. math::  S_i = \sum_{t=1}^{T} y_{it} \, x_{it}^\top

with x what went in and y the cotangent of what came out. Often S is not needed: only the mixtures
:math:`\sum_i w_{ki} S_i`, or the inner products :math:`\langle S_i, S_j \rangle`.

Shapes: B = samples, T = tokens per sample, K = objectives, n = numbers in the parameter.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# Numbers formed at once before they are mixed: small enough to stay in the cache of a CPU.
CHUNK = 1 << 18
CHUNK_CUDA = 1 << 25


class Contribution(ABC):
    """Per-sample gradients ``S [B, n]`` of one parameter, or of a run of its rows.

    Attributes:
        samples: B.
        size: n.
    """

    samples: int
    size: int

    @abstractmethod
    def write(self, rows: Float[Tensor, "B n"], *, add: bool) -> None:
        """Stores S in ``rows``, or adds it to them."""

    @abstractmethod
    def mix(self, weights: Float[Tensor, "K B"], rows: Float[Tensor, "K n"], *, add: bool) -> None:
        """Stores ``weights @ S`` in ``rows``, or adds it to them."""

    @property
    @abstractmethod
    def cotangent(self) -> Tensor:
        """What is kept of the backward pass while S is not formed."""

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "B n"]:
        """S itself."""
        rows = torch.empty(self.samples, self.size, dtype=dtype, device=self.cotangent.device)
        self.write(rows, add=False)
        return rows

    def compact(self) -> "Contribution":
        """The same, in the form that needs less memory."""
        if self.samples * self.size >= self.cotangent.numel():
            return self
        return Formed(self.dense(torch.promote_types(self.cotangent.dtype, torch.float32)))


@dataclass(frozen=True, eq=False)
class Formed(Contribution):
    """Per-sample gradients that are there already: those of a bias, a scale, or from a layer's own derivative."""

    gradients: Float[Tensor, "B n"]

    @property
    def cotangent(self) -> Tensor:
        return self.gradients

    @property
    def samples(self) -> int:  # type: ignore[override]
        return self.gradients.shape[0]

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.gradients.shape[1]

    def write(self, rows: Float[Tensor, "B n"], *, add: bool) -> None:
        if add:
            rows.add_(self.gradients)
        else:
            rows.copy_(self.gradients)

    def mix(self, weights: Float[Tensor, "K B"], rows: Float[Tensor, "K n"], *, add: bool) -> None:
        rows.addmm_(weights, self.gradients.to(rows.dtype), beta=int(add))


@dataclass(frozen=True, eq=False)
class Outer(Contribution):
    """Sums of outer products: the gradient of a matrix."""

    inputs: Float[Tensor, "B T i"]
    cotangents: Float[Tensor, "B T o"]

    @property
    def cotangent(self) -> Tensor:
        return self.cotangents

    @property
    def samples(self) -> int:  # type: ignore[override]
        return self.cotangents.shape[0]

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.cotangents.shape[2] * self.inputs.shape[2]

    def write(self, rows: Float[Tensor, "B n"], *, add: bool) -> None:
        target = rows.unflatten(1, (-1, self.inputs.shape[2]))
        if target.dtype == self.cotangents.dtype:
            target.baddbmm_(self.cotangents.mT, self.inputs, beta=int(add))
        elif add:
            target.add_(torch.bmm(self.cotangents.mT, self.inputs))
        else:
            target.copy_(torch.bmm(self.cotangents.mT, self.inputs))

    def mix(self, weights: Float[Tensor, "K B"], rows: Float[Tensor, "K n"], *, add: bool) -> None:
        if self.inputs.shape[1] == 1 or (len(weights) == 1 and rows.dtype == self.cotangents.dtype):
            self._mix_weighted(weights, rows, add)
            return
        width = self.inputs.shape[2]
        for start, stop in self.row_ranges():
            formed = torch.bmm(self.cotangents[:, :, start:stop].mT, self.inputs).flatten(1)
            rows[:, start * width : stop * width].addmm_(weights, formed.to(rows.dtype), beta=int(add))

    def _mix_weighted(self, weights: Float[Tensor, "K B"], rows: Float[Tensor, "K n"], add: bool) -> None:
        """Weights the cotangents instead: with one token a sample, S is larger than what it is made of."""
        target = rows.unflatten(1, (-1, self.inputs.shape[2]))
        inputs = self.inputs.flatten(0, 1).to(rows.dtype)
        cotangents = self.cotangents.to(rows.dtype)
        for weight, row in zip(weights, target, strict=True):
            row.addmm_((cotangents * weight[:, None, None]).flatten(0, 1).mT, inputs, beta=int(add))

    def row_ranges(self, copies: int = 1) -> Iterator[tuple[int, int]]:
        """Ranges of rows of the matrix whose per-sample gradients are formed at once."""
        count = self.cotangents.shape[2]
        limit = CHUNK_CUDA if self.cotangents.is_cuda else CHUNK
        step = max(1, limit // max(1, copies * self.samples * self.inputs.shape[2]))
        return ((start, min(start + step, count)) for start in range(0, count, step))


@dataclass(frozen=True, eq=False)
class Lookup(Contribution):
    """The gradient of a table whose rows are looked up."""

    indices: Int[Tensor, "B T"]
    cotangents: Float[Tensor, "B T d"]
    table_rows: int

    @property
    def cotangent(self) -> Tensor:
        return self.cotangents

    @property
    def samples(self) -> int:  # type: ignore[override]
        return self.cotangents.shape[0]

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.table_rows * self.cotangents.shape[2]

    def compressed(self) -> "Lookup":
        """The same without the rows of the table that nobody looked up: inner products do not need them."""
        used, indices = torch.unique(self.indices, return_inverse=True)
        return Lookup(indices, self.cotangents, len(used))

    def write(self, rows: Float[Tensor, "B n"], *, add: bool) -> None:
        target = rows.unflatten(1, (self.table_rows, -1))
        if not add:
            target.zero_()
        for row, indices, cotangents in zip(target, self.indices, self.cotangents.to(rows.dtype), strict=True):
            row.index_add_(0, indices, cotangents)

    def mix(self, weights: Float[Tensor, "K B"], rows: Float[Tensor, "K n"], *, add: bool) -> None:
        target = rows.unflatten(1, (self.table_rows, -1))
        if not add:
            target.zero_()
        indices = self.indices.flatten()
        cotangents = self.cotangents.to(rows.dtype)
        for row, weight in zip(target, weights, strict=True):
            row.index_add_(0, indices, (cotangents * weight[:, None, None]).flatten(0, 1))


@dataclass(frozen=True, eq=False)
class Windows(Contribution):
    """The gradient of a convolution's kernel: outer products over the windows of the input.

    The windows are several times the size of the input, so they are laid out for a few samples at a time.

    Attributes:
        images: The padded input; m images of a sample lie behind one another.
        cotangents: Of the output, one column per window.
        geometry: ``kernel_size``, ``dilation``, ``stride`` and ``groups``.
        samples: B.
    """

    images: Float[Tensor, "Bm C H W"]
    cotangents: Float[Tensor, "Bm o L"]
    geometry: dict[str, Any]
    samples: int

    @property
    def cotangent(self) -> Tensor:
        return self.cotangents

    @property
    def size(self) -> int:  # type: ignore[override]
        kernel = self.geometry["kernel_size"]
        channels = self.images.shape[1] // self.geometry["groups"]
        return self.cotangents.shape[1] * channels * kernel[0] * kernel[1]

    def write(self, rows: Float[Tensor, "B n"], *, add: bool) -> None:
        for start, stop, part in self._parts():
            part.write(rows[start:stop], add=add)

    def mix(self, weights: Float[Tensor, "K B"], rows: Float[Tensor, "K n"], *, add: bool) -> None:
        for start, stop, part in self._parts():
            part.mix(weights[:, start:stop], rows, add=add or start > 0)

    def _parts(self) -> Iterator[tuple[int, int, Contribution]]:
        images = self.images.unflatten(0, (self.samples, -1))
        cotangents = self.cotangents.unflatten(0, (self.samples, -1))
        kernel = self.geometry["kernel_size"]
        laid_out = images[0].shape[:2].numel() * kernel[0] * kernel[1] * cotangents.shape[-1]
        step = max(1, (CHUNK_CUDA if images.is_cuda else CHUNK) // laid_out)
        for start in range(0, self.samples, step):
            stop = min(start + step, self.samples)
            yield start, stop, self._outer(images[start:stop], cotangents[start:stop])

    def _outer(self, images: Float[Tensor, "b m C H W"], cotangents: Float[Tensor, "b m o L"]) -> Contribution:
        groups = self.geometry["groups"]
        sizes = {name: value for name, value in self.geometry.items() if name != "groups"}
        windows = F.unfold(images.flatten(0, 1), **sizes).unflatten(0, images.shape[:2])  # [b, m, C k k, L]
        if groups == 1:
            return Outer(windows.transpose(2, 3).flatten(1, 2), cotangents.transpose(2, 3).flatten(1, 2))
        grouped = windows.unflatten(2, (groups, -1)), cotangents.unflatten(2, (groups, -1))
        return Formed((grouped[1] @ grouped[0].mT).sum(1).flatten(1))  # [b, groups, o / groups, C k k / groups]
