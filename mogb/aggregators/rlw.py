r"""RLW: random loss weighting.

.. math::  d = \sum_k w_k \, g_k , \qquad w = \mathrm{softmax}(z), \quad z \sim N(0, I) \text{ anew at every step}

Shapes: K = objectives.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float64

from mogb.base import LossAggregator, Promise, Reference, Solution, state


@dataclass(kw_only=True)
class RLW(LossAggregator, name="rlw"):
    """Draws the weights from a softmax of normal numbers, whatever the losses are: one backward pass.

    Args:
        seed: Of the draws. The same seed draws the weights of the official code under ``torch.manual_seed(seed)``.

    Examples:
        >>> import torch
        >>> RLW(seed=0).weights(losses=torch.tensor([2.0, 0.5]))
        tensor([0.8623, 0.1377])
    """

    reference: ClassVar = Reference(
        authors="B. Lin, F. Ye, Y. Zhang and I. W. Tsang",
        title="Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning",
        venue="Transactions on Machine Learning Research",
        year=2022,
        arxiv="2111.10603",
        code="median-research-group/LibMTL",
    )
    promises: ClassVar = frozenset({Promise.SIMPLEX_WEIGHTS, Promise.HOMOGENEOUS})
    needs_values: ClassVar = False

    seed: int = 0
    _generator: torch.Generator = state(kind="generator")

    def _start(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def _weights(self, losses: Float64[np.ndarray, " K"]) -> Solution:
        draws = torch.randn(len(losses), generator=self._generator).numpy().astype(np.float64)
        weights = np.exp(draws - draws.max())
        return Solution(weights / weights.sum())
