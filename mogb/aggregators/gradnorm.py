r"""GradNorm: weights that bring the gradients' norms together, and slow objectives forward.

With :math:`n_k = w_k \|g_k\|`, their mean :math:`\bar n`, and the relative inverse training rates
:math:`r_k = \frac{L_k / L_k(0)}{\operatorname{mean}_j L_j / L_j(0)}`, the weights descend on

.. math::  \sum_k \bigl| n_k - \bar n \, r_k^\alpha \bigr| ,

whose targets :math:`\bar n r_k^\alpha` count as constants (equations 1 and 2 of the paper).

Shapes: K = objectives, L = live objectives, those that take part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64

from mogb.aggregators._losses import require_above
from mogb.aggregators._state import everyone, nobody, positive_numbers, same_size
from mogb.base import GramianLossAggregator, Promise, Reference, Solution, state

# Of the Adam step on the logits.
DECAYS = (0.9, 0.999)
EPS = 1e-8


@dataclass(kw_only=True)
class GradNorm(GramianLossAggregator, name="gradnorm"):
    r"""Learned weights, positive and with the sum K, that take one step for every training step.

    The weights are :math:`K \operatorname{softmax}(v)`, as in LibMTL; the paper keeps the sum by rescaling, which can
    make weights negative. The step on v is one of Adam with its own moments, on the slope of the objective divided by
    the mean gradient norm (so that scaling all the losses changes nothing); it takes effect at the *next* call, as in
    the paper's algorithm 1. The first call has equal weights, and its losses become :math:`L_k(0)`. LibMTL spends the
    first epoch on that instead, with the mean loss of the epoch: give it as ``initial_losses``.

    The paper measures the norms on the last shared layer: pass its parameters, or balance on the representation, for
    that; otherwise they are those of all balanced parameters.

    Args:
        alpha: Strength of the pull toward equal training rates. 1.5 as in the paper's NYUv2 experiments and LibMTL.
        lr: Of the step on v. There is no official code; 0.025 is what the benchmarks of Nash-MTL and FAMO use for the
            learned parameters of a method.
        initial_losses: :math:`L_k(0) > 0`, such as log C for a classifier of C classes; None takes the first ones seen.

    Raises:
        ValueError: On a call with a loss that is not positive: rates are ratios of losses.

    Examples:
        >>> import torch
        >>> GradNorm().weights(torch.eye(2), torch.tensor([1.0, 2.0]))
        tensor([1., 1.])
    """

    reference: ClassVar = Reference(
        authors="Z. Chen, V. Badrinarayanan, C.-Y. Lee and A. Rabinovich",
        title="GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks",
        venue="ICML",
        year=2018,
        arxiv="1711.02257",
    )
    promises: ClassVar = frozenset({Promise.PERMUTATION_EQUIVARIANT, Promise.HOMOGENEOUS})

    alpha: float = 1.5
    lr: float = 0.025
    initial_losses: Sequence[float] | None = None

    _initial: Float64[np.ndarray, " K"] | None = state()
    _logits: Float64[np.ndarray, " K"] | None = state()
    _moments: Float64[np.ndarray, "2 K"] | None = state()
    _calls: Float64[np.ndarray, " K"] | None = state()

    @property
    def needs_positive_losses(self) -> bool:
        return True

    def _check(self) -> None:
        if self.initial_losses is not None:
            self.initial_losses = positive_numbers(self.initial_losses, "initial_losses")
        if not 0 <= self.alpha < np.inf:
            raise ValueError(f"alpha must be at least 0 and finite, but got {self.alpha}.")
        if not 0 < self.lr < np.inf:
            raise ValueError(f"lr must be positive and finite, but got {self.lr}.")

    def _weights(self, gramian: Float64[np.ndarray, "K K"], losses: Float64[np.ndarray, " K"]) -> Solution:
        return self._solve_live(gramian, losses, everyone(len(losses)))

    def _solve_live(
        self,
        gramian: Float64[np.ndarray, "K K"] | None,
        losses: Float64[np.ndarray, " K"] | None,
        live: Bool[np.ndarray, " K"],
    ) -> Solution:
        assert gramian is not None
        assert losses is not None
        require_above(self.name, losses, everyone(len(losses)))
        initial, logits = self._begun(losses)
        if not live.any():
            return nobody(len(losses))
        shares = np.exp(logits[live] - logits[live].max())
        shares /= shares.sum()
        rates = losses[live] / initial[live]
        rates /= rates.mean()
        norms = np.sqrt(np.maximum(gramian.diagonal()[live], 0.0))
        self._learn(live, _slope(shares, norms, rates**self.alpha))
        return Solution(len(shares) * shares, details={"rates": rates}).among(live)

    def _begun(self, losses: Float64[np.ndarray, " K"]) -> tuple[Float64[np.ndarray, " K"], Float64[np.ndarray, " K"]]:
        """The initial losses and the logits; the first call makes them."""
        size = len(losses)
        if self._initial is None or self._logits is None:
            initial = losses.copy() if self.initial_losses is None else np.array(self.initial_losses)
            if len(initial) != size:
                raise ValueError(f"initial_losses must have one number per objective, {size}, but got {list(initial)}.")
            self._initial, self._logits = initial, np.zeros(size)
            self._moments, self._calls = np.zeros((2, size)), np.zeros(size)
        same_size(self.name, len(self._logits), size)
        return self._initial, self._logits

    def _learn(self, live: Bool[np.ndarray, " K"], slope: Float64[np.ndarray, " L"]) -> None:
        """One step of Adam on the logits of the live objectives."""
        assert self._logits is not None
        assert self._moments is not None
        assert self._calls is not None
        decays = np.array(DECAYS)[:, None]
        logits, moments, calls = self._logits.copy(), self._moments.copy(), self._calls + live
        moments[:, live] = decays * moments[:, live] + (1 - decays) * np.stack([slope, slope**2])
        mean, square = moments[:, live] / (1 - decays ** calls[live])
        logits[live] -= self.lr * mean / (np.sqrt(square) + EPS)
        self._logits, self._moments, self._calls = logits, moments, calls


def _slope(
    shares: Float64[np.ndarray, " L"], norms: Float64[np.ndarray, " L"], pulls: Float64[np.ndarray, " L"]
) -> Float64[np.ndarray, " L"]:
    """Of the objective with respect to the logits, where the mean gradient norm is 1."""
    if norms.max() > 0:
        norms = norms / norms.mean()
    weights = len(shares) * shares
    lengths = weights * norms
    by_weight = np.sign(lengths - lengths.mean() * pulls) * norms
    return weights * (by_weight - shares @ by_weight)
