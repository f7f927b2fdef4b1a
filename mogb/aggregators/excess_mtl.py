r"""ExcessMTL: more weight for objectives that are still far from their best, judged by curvature.

The excess risk of an objective is estimated from its own AdaGrad sums,

.. math::  S_k \leftarrow S_k + g_k^2 , \qquad e_k = \sum_n \frac{g_{kn}^2}{\sqrt{S_{kn} + 10^{-7}}} ,

and compared with its value at the beginning:

.. math::  w_k \propto w_k \exp \Bigl( \eta \, \frac{e_k}{e_k^0} \Bigr) .

Shapes: K = objectives.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from mogb.aggregators._ema import check_blocks, wide
from mogb.aggregators._losses import softmax
from mogb.aggregators._state import same_size
from mogb.base import JacobianAggregator, Promise, Reference, Solution, state
from mogb.errors import NonFiniteError
from mogb.jacobian import Jacobian

# Inside the square root, as in the official code: gradients much shorter than its root count as flat.
EPS = 1e-7


@dataclass(kw_only=True)
class ExcessMTL(JacobianAggregator, name="excess_mtl"):
    r"""Robust to label noise: a loss that is large because it cannot be lower gets no extra weight.

    It keeps one AdaGrad sum per objective (K times the size of the model), which grows without end: weights settle.
    The direction is a weighted sum of the gradients, so the report shows weights; but only whole gradients yield them.

    Follows the official code: the first call has the weights 1 and gives the baseline. The paper starts on the simplex
    (``simplex=True``) and measures the baseline over three epochs (``warmup``). An objective whose gradient was always
    zero so far takes its baseline from the first one that is not.

    Args:
        step_size: The :math:`\eta`, at least 0. 0.01 as in LibMTL.
        simplex: Whether the weights sum to 1 or, as in the code, to K.
        warmup: Calls whose mean excess risk is the baseline, at least 1. The weights stay equal meanwhile.

    Raises:
        ValueError: On a call with gradients of another shape than before.

    Examples:
        >>> import torch
        >>> method = ExcessMTL(step_size=1.0)
        >>> method(torch.eye(2))
        tensor([1., 1.])
        >>> method(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        tensor([0.5064, 2.9873])
    """

    reference: ClassVar = Reference(
        authors="Y. He, S. Zhou, G. Zhang, H. Yun, Y. Xu, B. Zeng, T. Chilimbi and H. Zhao",
        title="Robust Multi-Task Learning with Excess Risks",
        venue="ICML",
        year=2024,
        arxiv="2402.02009",
        code="yifei-he/ExcessMTL",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT, Promise.HOMOGENEOUS})

    step_size: float = 0.01
    simplex: bool = False
    warmup: int = 1

    _squares: tuple[Tensor, ...] | None = state(kind="tensors")
    _baseline: Float64[np.ndarray, " K"] | None = state()
    _logits: Float64[np.ndarray, " K"] | None = state()
    _calls: int = state(0, kind="number")

    def _check(self) -> None:
        if not 0 <= self.step_size < np.inf:
            raise ValueError(f"step_size must be at least 0 and finite, but got {self.step_size!r}.")
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int) or self.warmup < 1:
            raise ValueError(f"warmup must be a whole number of calls, at least 1, but got {self.warmup!r}.")

    def _direction(self, jacobian: Jacobian, losses: Float64[np.ndarray, " K"] | None) -> Solution:
        size = len(jacobian)
        baseline, logits = (np.zeros(size) if held is None else held for held in (self._baseline, self._logits))
        same_size(self.name, len(logits), size)
        squares, excess = self._risks(jacobian)
        calls = self._calls + 1
        if calls <= self.warmup:
            baseline = baseline + (excess - baseline) / calls
        else:
            baseline = np.where(baseline > 0, baseline, excess)
            logits = logits + self.step_size * np.divide(excess, baseline, out=np.zeros(size), where=baseline > 0)
        self._squares, self._baseline, self._logits, self._calls = squares, baseline, logits - logits.max(), calls
        weights = softmax(logits) * (1 if self.simplex else size)
        return Solution(weights, details={"excess": excess})

    def _risks(self, jacobian: Jacobian) -> tuple[tuple[Tensor, ...], Float64[np.ndarray, " K"]]:
        """The AdaGrad sums with the present gradients, and the excess risks: row by row, one block at a time."""
        check_blocks(self.name, self._squares, jacobian.blocks)
        excess = np.zeros(len(jacobian))
        squares = []
        for index, block in enumerate(jacobian.blocks):
            total = wide(block).square()
            for k, row in enumerate(total):
                square = row.clone()
                if self._squares is not None:
                    row += self._squares[index][k].to(row.device)
                excess[k] += square.div_((row + EPS).sqrt_()).sum(dtype=torch.float64).item()
            squares.append(total)
        if not np.isfinite(excess).all():
            bad = jacobian.first_non_finite()
            raise NonFiniteError("direction" if bad is None else "gradient", bad)
        return tuple(squares), excess
