r"""Inner products of K gradients without the gradients.

.. math::  G = C A C^\top, \qquad A_{(r i)(s j)} = \sum_p \langle S^{(r)}_{ip}, S^{(s)}_{jp} \rangle

Parameter by parameter, the per-sample gradients S of all passes are multiplied and dropped. Where it is cheaper, they
are not even formed: for matrices, with x the inputs and y the cotangents of a layer,

.. math::  \langle S_i, S_j \rangle = \sum_{t t'} (x_{it} \cdot x_{jt'}) (y_{it} \cdot y_{jt'}) .

Shapes: K = objectives, R = passes, B = samples, T = tokens per sample.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from mogb.engines.per_sample.contributions import Contribution, Lookup, Outer
from mogb.engines.per_sample.rows import Collector, row_dtype

# The largest matrix of token-by-token products, and how many numbers are multiplied in one go, in float64 if few.
MAX_TOKEN_PAIRS = 1 << 23
COLUMNS = 1 << 16
SMALL = 1 << 17


class LateContributionError(Exception):
    """A layer was called again after the inner products of its parameter had been taken: name it as shared.

    Attributes:
        index: Of the parameter.
    """

    def __init__(self, index: int) -> None:
        super().__init__(f"Parameter {index} got a contribution too late.")
        self.index = index


class GramianStore(Collector):
    """Collects the inner products of ``passes x B`` per-sample gradients.

    Args:
        params: The parameters.
        mixing: For every pass, the weights of the B samples in the K objectives, ``[K, B]``.
        shared: Parameters that more than one call contributes to.

    Attributes:
        squares: For every parameter, the squared norm of its part of the last objective's gradient.
    """

    def __init__(
        self, params: Sequence[Tensor], mixing: Sequence[Float64[np.ndarray, "K B"]], shared: frozenset[int]
    ) -> None:
        self.squares = [0.0] * len(params)
        self._params, self._shared = params, shared
        self._coefficients = np.concatenate(mixing, axis=1)
        self._passes, self._samples = len(mixing), mixing[0].shape[1]
        self._total = np.zeros((self._coefficients.shape[1],) * 2)
        self._held: dict[int, list[list[tuple[int, Contribution]]]] = defaultdict(lambda: [[] for _ in mixing])
        self._done: set[int] = set()

    def collect(self, index: int, start: int, contribution: Contribution) -> None:
        if index in self._done:
            raise LateContributionError(index)
        last = self.current == self._passes - 1
        self._held[index][self.current].append((start, contribution if last else contribution.compact()))
        whole = start == 0 and contribution.size == self._params[index].numel()
        if last and whole and index not in self._shared:
            self._finish(index)

    def segment_done(self) -> None:
        for index in [index for index in self._held if index not in self._shared]:
            self._finish(index)

    def gramian(self) -> Float64[np.ndarray, "K K"]:
        """The inner products of the K gradients."""
        for index in list(self._held):
            self._finish(index)
        gramian = self._coefficients @ self._total @ self._coefficients.T
        return (gramian + gramian.T) / 2

    def _finish(self, index: int) -> None:
        self._done.add(index)
        products = inner_products(self._held.pop(index), self._params[index], self._samples)
        self._total += products
        last = self._coefficients[-1]
        self.squares[index] = float(last @ products @ last)


def inner_products(
    parts: Sequence[Sequence[tuple[int, Contribution]]], param: Tensor, samples: int
) -> Float64[np.ndarray, "RB RB"]:
    """Those of the per-sample gradients of one parameter, whose contributions are given for every pass."""
    alone = [part[0][1] for part in parts if len(part) == 1 and part[0][1].size == param.numel()]
    if len(alone) == len(parts):
        if all(isinstance(one, Outer) for one in alone):
            outers = [one for one in alone if isinstance(one, Outer)]
            return _by_tokens(outers) if _tokens_are_cheaper(outers) else _by_chunks(outers)
        if all(isinstance(one, Lookup) for one in alone):
            alone = [one.compressed() for one in alone if isinstance(one, Lookup)]
            return _product(torch.cat([one.dense(row_dtype(param)) for one in alone]))
    rows = torch.zeros(len(parts), samples, param.numel(), dtype=row_dtype(param), device=param.device)
    for row, part in zip(rows, parts, strict=True):
        for start, contribution in part:
            contribution.write(row[:, start : start + contribution.size], add=True)
    return _product(rows.flatten(0, 1))


def _tokens_are_cheaper(outers: Sequence[Outer]) -> bool:
    samples, tokens, inputs = outers[0].inputs.shape
    outputs, rows = outers[0].cotangents.shape[2], len(outers) * samples
    pairs = (samples * tokens) ** 2
    formed = rows * inputs * outputs * (tokens + rows)
    return pairs <= MAX_TOKEN_PAIRS and pairs * (inputs + outputs * len(outers) ** 2) < formed


def _by_tokens(outers: Sequence[Outer]) -> Float64[np.ndarray, "RB RB"]:
    samples, tokens, _ = outers[0].inputs.shape
    inputs = _wide(outers[0].inputs).flatten(0, 1)
    inputs = inputs @ inputs.mT  # [B T, B T]
    flat = [_wide(outer.cotangents).flatten(0, 1) for outer in outers]
    blocks = [
        [((left @ right.mT) * inputs).unflatten(1, (samples, tokens)).unflatten(0, (samples, tokens)) for right in flat]
        for left in flat
    ]
    summed = [torch.cat([block.sum((1, 3), dtype=torch.float64) for block in row], 1) for row in blocks]
    return torch.cat(summed).cpu().numpy()


def _by_chunks(outers: Sequence[Outer]) -> Float64[np.ndarray, "RB RB"]:
    rows = sum(outer.samples for outer in outers)
    total = np.zeros((rows, rows))
    for start, stop in outers[0].row_ranges(len(outers)):
        formed = [_wide(torch.bmm(o.cotangents[:, :, start:stop].mT, o.inputs)).flatten(1) for o in outers]
        total += _product(torch.cat(formed))
    return total


def _product(rows: Tensor) -> Float64[np.ndarray, "n n"]:
    """``rows @ rows.T``; short sums are formed in float64, long ones slice by slice."""
    rows = rows.double() if rows.numel() <= SMALL else _wide(rows)
    parts = [(part @ part.mT).double() for part in rows.split(COLUMNS, dim=1)]
    return torch.stack(parts).sum(0).cpu().numpy()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
