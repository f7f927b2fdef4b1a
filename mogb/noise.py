r"""How much of every gradient is noise, measured with two half-batches, and Gramians without that noise.

Let :math:`J_1, J_2` be the gradients of the K losses on two independent halves of a batch, M their mean (the gradient
of the whole batch) and D half their difference. Then

.. math::  \underbrace{\tfrac12 (J_1 J_2^\top + J_2 J_1^\top)}_{S, \;\text{signal}} = M M^\top - D D^\top , \qquad
           \mathbb E S = \bar J \bar J^\top , \qquad
           \mathbb E D D^\top = \operatorname{Cov} M ,

with the expected gradients :math:`\bar J`: the Gramian of one batch is too large by the noise :math:`D D^\top`, most of
all on its diagonal, and S is not. The share of signal in a squared norm is :math:`S_{kk} / (M M^\top)_{kk}`; for a
whole batch of B samples :math:`(1 - \text{share}) / \text{share} \cdot B` is the simple noise scale of McCandlish et
al. (arXiv 1812.06162, equations 2.8 and A.4), objective by objective.

**S is right on average and wilder at every step.** It need not be positive semidefinite, and where gradients are mostly
noise its entries are too: a single S then balances worse than the Gramian that it corrects. ``benchmarks/noise.py``
measures when it helps; ``docs/choosing.md`` has the answer. Look at :attr:`NoiseEstimate.signal_share` first.

Shapes: K = objectives, N = numbers in one gradient.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor, nn

from mogb.base import Aggregator, Promise, Solution, Wrapper, state
from mogb.engines.backward import backward
from mogb.engines.distributed import GroupChoice
from mogb.engines.losses import Losses, as_losses
from mogb.engines.report import Report, make_report
from mogb.jacobian import Jacobian

Rows = Jacobian | Tensor | Iterable[Tensor]
Repair = Literal["clip", "shrink", "none"]

# Eigenvalues of a unit-diagonal Gramian below this are rounding.
ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class NoiseEstimate:
    """The Gramian of a batch, taken apart. Float64 on the CPU.

    One estimate is noisy itself: average several with :func:`pooled` before you believe a small share.

    Attributes:
        signal: Unbiased for the Gramian of the expected gradients; symmetric, in general not positive semidefinite.
        noise: Unbiased for the covariance of the gradients of the whole batch; positive semidefinite.
    """

    signal: Float64[Tensor, "K K"]
    noise: Float64[Tensor, "K K"]

    @property
    def gramian(self) -> Float64[Tensor, "K K"]:
        """Of the gradients of the whole batch: signal and noise."""
        return self.signal + self.noise

    @property
    def signal_share(self) -> Float64[Tensor, " K"]:
        r"""Estimates :math:`\|\mathbb E g_k\|^2 / \mathbb E \|g_k\|^2`; negative by chance, NaN for zero gradients."""
        return self.signal.diagonal() / _or_nan(self.gramian.diagonal())

    @property
    def batches_needed(self) -> Float64[Tensor, " K"]:
        """How many batches like this one make the share of signal one half; infinite where no signal was seen."""
        signal = self.signal.diagonal()
        needed = self.noise.diagonal() / _or_nan(signal.clamp(min=0.0))
        return torch.where(signal > 0, needed, torch.full_like(needed, torch.inf))

    @property
    def cosines(self) -> Float64[Tensor, "K K"]:
        """Between the expected gradients; NaN where no signal was seen, and beyond [-1, 1] by chance.

        Those of a batch are drawn toward 0 by independent noise, and toward the noise's own by a common one.
        """
        norms = _or_nan(self.signal.diagonal().clamp(min=0.0)).sqrt()
        return self.signal / torch.outer(norms, norms)


def estimate_noise(first: Rows, second: Rows) -> NoiseEstimate:
    """Takes the Gramian of a batch apart, given the gradients of its two halves.

    Args:
        first: The K gradients on one half: a tensor ``[K, N]``, a :class:`~mogb.jacobian.Jacobian`, or its blocks
            ``[K, *shape]``.
        second: The same losses' gradients on the other half, which holds as many samples and shares none.

    Raises:
        ValueError: The two differ in the number of gradients or in the shapes of their blocks.

    Examples:
        >>> first, second = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]])
        >>> found = estimate_noise(first, second)
        >>> found.signal, found.noise
        (tensor([[4.]], dtype=torch.float64), tensor([[1.]], dtype=torch.float64))
        >>> found.signal_share
        tensor([0.8000], dtype=torch.float64)
    """
    one, other = (item if isinstance(item, Jacobian) else Jacobian.of(item) for item in (first, second))
    shapes = [[list(block.shape) for block in jacobian.blocks] for jacobian in (one, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"first and second must hold the same gradients on two halves of a batch, but their shapes are "
            f"{shapes[0]} and {shapes[1]}."
        )
    blocks = tuple(torch.cat(pair) for pair in zip(one.blocks, other.blocks, strict=True))
    return _estimate(*_taken_apart(Jacobian(blocks, one.across).gramian()))


def pooled(estimates: Iterable[NoiseEstimate]) -> NoiseEstimate:
    """The mean of several estimates, as from several batches at the same parameters.

    Raises:
        ValueError: There is none.
    """
    found = tuple(estimates)
    if not found:
        raise ValueError("estimates is empty: pass at least one NoiseEstimate.")
    signal, noise = (torch.stack([getattr(one, part) for one in found]).mean(0) for part in ("signal", "noise"))
    return NoiseEstimate(signal, noise)


@dataclass
class Unbiased(Wrapper):
    r"""Shows the method inside the Gramian without the noise, given the 2 K gradients of two half-batches.

    Every method that reads the Gramian can wear it, and everything that takes a method takes it, but with 2 K losses,
    first those of one half and then those of the other, in the same order; :func:`backward_halves` does that. The
    weights on both halves of an objective are half of its weight, so that the direction is the weighted sum of the
    gradients of the whole batch. The method inside sees the mean of the two losses. It costs the 2 K backward passes
    over half as many samples each.

    S may be indefinite, which no small problem can use. ``repair="shrink"`` takes away only as much of the noise as
    leaves it positive semidefinite, :math:`M M^\top - (1 - t) D D^\top` with the smallest t; ``"clip"`` sets negative
    eigenvalues to 0, in units of the gradients' lengths in the batch. Neither sees the scales of the losses. An
    objective without any signal, :math:`S_{kk} \le 0`, is left out.

    Args:
        inner: The method.
        decay: Of a moving average of signal and noise over the steps, in [0, 1); 0 is none. The average is corrected
            for its start. Of a Gramian it is worth more than of the weights: those of a nonlinear method stay biased.
        repair: ``"shrink"``, ``"clip"``, or ``"none"`` for methods that take any matrix, such as ``modo``.

    Raises:
        ValueError: On a call with an odd number of gradients.

    Examples:
        >>> import mogb
        >>> first, second = torch.tensor([[2.0, 0.0], [1.0, 2.0]]), torch.tensor([[2.0, 0.0], [-1.0, 2.0]])
        >>> unbiased = Unbiased(mogb.make("mgda"))  # the second gradient is noise in its first coordinate
        >>> unbiased.weights(torch.cat([first, second]) @ torch.cat([first, second]).T)
        tensor([0.2143, 0.2857, 0.2143, 0.2857])
        >>> unbiased.estimate.signal_share
        tensor([1.0000, 0.7500], dtype=torch.float64)
    """

    needs_gramian = True

    inner: Aggregator
    decay: float = 0.0
    repair: Repair = "shrink"

    _signal: Float64[np.ndarray, "K K"] | None = state()
    _noise: Float64[np.ndarray, "K K"] | None = state()
    _mass: float = state(0.0, kind="number")

    def _check(self) -> None:
        super()._check()
        if self.inner.reads == "losses":
            raise ValueError(
                f"inner must be a method that reads the Gramian, but {self.inner.name!r} reads only losses, in which "
                "noise leaves no bias."
            )
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), but got {self.decay!r}.")
        if self.repair not in get_args(Repair):
            raise ValueError(f"repair must be one of {', '.join(get_args(Repair))}, but got {self.repair!r}.")

    @property
    def promises(self) -> frozenset[Promise]:  # type: ignore[override]
        return self.inner.keeps & {Promise.SIMPLEX_WEIGHTS, Promise.HOMOGENEOUS}

    @property
    def estimate(self) -> NoiseEstimate | None:
        """What is known of the noise, over the steps that the average covers; None before the first step."""
        if self._signal is None or self._noise is None:
            return None
        return _estimate(self._signal / self._mass, self._noise / self._mass)

    def _solve_live(
        self,
        gramian: Float64[np.ndarray, "N N"] | None,
        losses: Float64[np.ndarray, " N"] | None,
        live: Bool[np.ndarray, " N"],
    ) -> Solution:
        assert gramian is not None
        if len(gramian) % 2:
            raise ValueError(
                f"Unbiased needs the gradients of two half-batches, an even number, but got {len(gramian)}. Pass the K "
                "losses of one half and then those of the other, or use mogb.noise.backward_halves."
            )
        size = len(gramian) // 2
        signal, noise = self._averaged(*_taken_apart(gramian))
        mean = None if losses is None else (losses[:size] + losses[size:]) / 2
        part = live[:size] & live[size:] & (signal.diagonal() > 0)
        solution = self.inner._solve_live(_repaired(signal, noise, part, self.repair), mean, part)
        return replace(
            solution,
            weights=np.tile(solution.weights / 2, 2),
            left_out=(*solution.left_out, *(size + index for index in solution.left_out)),
            details={**solution.details, "signal": signal, "noise": noise},
        )

    def _update(self, losses: Float64[np.ndarray, " N"] | None) -> None:
        self.inner._update(None if losses is None else losses.reshape(2, -1).mean(0))

    def _averaged(
        self, signal: Float64[np.ndarray, "K K"], noise: Float64[np.ndarray, "K K"]
    ) -> tuple[Float64[np.ndarray, "K K"], Float64[np.ndarray, "K K"]]:
        if self._signal is not None and self._noise is not None and self.decay > 0:
            if self._signal.shape != signal.shape:
                raise ValueError(
                    f"Unbiased averages the Gramians of {len(self._signal)} objectives, but got {len(signal)}. Call "
                    "reset() when the objectives change."
                )
            signal = self.decay * self._signal + (1 - self.decay) * signal
            noise = self.decay * self._noise + (1 - self.decay) * noise
            mass = self.decay * self._mass + (1 - self.decay)
        else:
            mass = 1 - self.decay
            signal, noise = mass * signal, mass * noise
        self._signal, self._noise, self._mass = signal, noise, mass
        return signal / mass, noise / mass


Given = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def backward_halves(
    first: Given,
    second: Given,
    params: nn.Module | Iterable[Tensor],
    aggregator: Aggregator,
    *,
    num_samples: int | float | None = None,
    process_group: GroupChoice = "default",
    retain_graph: bool = False,
) -> Report:
    """One balanced step from two half-batches: the direction is that of the whole batch, the weights are unbiased.

    Args:
        first: The K losses on one half of the batch, as in :func:`mogb.backward`: means over its samples.
        second: The same losses on the other half, which holds as many samples and shares none.
        params: The parameters to balance. Unlike in :func:`mogb.backward` they must be given: every parameter is
            reached by two losses here.
        aggregator: A method that reads the Gramian. Wrap it in :class:`Unbiased` yourself for options, or to read
            its :attr:`~Unbiased.estimate` afterwards.
        num_samples: As in :func:`mogb.backward`, as are the other arguments.
        process_group: Whose gradients are averaged before the Gramian.
        retain_graph: Keep the graphs for another backward pass.

    Returns:
        The report of the step for K objectives. Its Gramian and cosines are those of the whole batch, noise included.

    Raises:
        ValueError: The halves differ in their objectives; otherwise as :func:`mogb.backward`.

    Examples:
        >>> import mogb
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> batch = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 2.0], [3.0, 2.0]])
        >>> def losses_of(part):
        ...     return [(weight - part).square().sum(1).mean(), weight[1].square() - weight[1]]
        >>> unbiased = Unbiased(mogb.make("mgda"))
        >>> report = backward_halves(losses_of(batch[::2]), losses_of(batch[1::2]), [weight], unbiased)
        >>> report.weights
        tensor([0., 1.], dtype=torch.float64)
    """
    if params is None:
        raise TypeError("params must be given: every parameter is reached by two losses, one of each half.")
    unbiased = aggregator if isinstance(aggregator, Unbiased) else Unbiased(aggregator)
    one, other = as_losses(first), as_losses(second)
    if len(one) != len(other) or one.names != other.names:
        raise ValueError(
            f"first and second must hold the same losses on two halves of a batch, but have {one.names or len(one)} "
            f"and {other.names or len(other)}."
        )
    report = backward(
        _joined(one, other), params, unbiased,
        num_samples=num_samples, process_group=process_group, retain_graph=retain_graph,
    )  # fmt: skip
    assert report.gramian is not None
    assert report.weights is not None
    size = len(one)
    whole = np.add(*_taken_apart(report.gramian.numpy()))
    mean = report.losses.numpy().reshape(2, size).mean(0)
    seen = make_report(mean, one.names, Solution(report.weights.numpy()[:size] * 2), whole, report.backward_passes)
    return replace(
        report, weights=seen.weights, gramian=seen.gramian, cosines=seen.cosines, min_cosine=seen.min_cosine,
        conflicts=seen.conflicts, losses=seen.losses, names=one.names,
        left_out=tuple(index for index in report.left_out if index < size),
    )  # fmt: skip


def _joined(one: Losses, other: Losses) -> Losses:
    """The 2 K losses; errors call those of the halves by their names."""
    names = None
    if one.names is not None:
        names = tuple(f"{name}, half {half}" for half in (1, 2) for name in one.names)
    return Losses(one.scalars + other.scalars, one.roots + other.roots, one.seeds + other.seeds, names)


def _taken_apart(
    gramian: Float64[np.ndarray, "N N"],
) -> tuple[Float64[np.ndarray, "K K"], Float64[np.ndarray, "K K"]]:
    """Signal and noise, from the Gramian of the 2 K gradients of both halves."""
    size = len(gramian) // 2
    one, other, cross = gramian[:size, :size], gramian[size:, size:], gramian[:size, size:]
    signal = (cross + cross.T) / 2
    return signal, ((one + other) / 2 - signal) / 2


def _repaired(
    signal: Float64[np.ndarray, "K K"],
    noise: Float64[np.ndarray, "K K"],
    part: Bool[np.ndarray, " K"],
    repair: Repair,
) -> Float64[np.ndarray, "K K"]:
    """Positive semidefinite among the objectives that take part; the others do not count."""
    if repair == "none" or not part.any():
        return signal
    some = np.ix_(part, part)
    lengths = np.sqrt((signal + noise).diagonal()[part])
    units = np.outer(lengths, lengths)
    signals, noises = signal[some] / units, noise[some] / units
    fixed = _clipped(signals) if repair == "clip" else signals + _least_noise(signals, noises) * noises
    result = np.zeros_like(signal)
    result[some] = fixed * units
    return result


def _clipped(matrix: Float64[np.ndarray, "L L"]) -> Float64[np.ndarray, "L L"]:
    values, vectors = np.linalg.eigh(matrix)
    return matrix if values[0] >= 0 else (vectors * np.maximum(values, 0.0)) @ vectors.T


def _least_noise(signal: Float64[np.ndarray, "L L"], noise: Float64[np.ndarray, "L L"]) -> float:
    r"""The smallest t in [0, 1] for which :math:`S + t D D^\top` is positive semidefinite.

    Seen from the axes in which :math:`S + D D^\top` is the identity, S has an eigenvalue :math:`\mu < 0` for every
    direction that needs noise, and :math:`\mu + t (1 - \mu) = 0`. Where the whole Gramian is singular, S is minus the
    noise, and all of it has to stay.
    """
    values, vectors = np.linalg.eigh(signal + noise)
    flat = values <= ROUNDING * values[-1]
    lost = vectors[:, flat]
    if flat.any() and np.einsum("if,ij,jf->f", lost, noise, lost).max() > ROUNDING:
        return 1.0
    axes = vectors[:, ~flat] / np.sqrt(values[~flat])
    smallest = float(np.linalg.eigvalsh(axes.T @ signal @ axes)[0])
    return 0.0 if smallest >= 0 else -smallest / (1 - smallest)


def _estimate(signal: Float64[np.ndarray, "K K"], noise: Float64[np.ndarray, "K K"]) -> NoiseEstimate:
    return NoiseEstimate(torch.from_numpy(signal.copy()), torch.from_numpy(noise.copy()))


def _or_nan(values: Tensor) -> Tensor:
    """NaN in place of 0."""
    return torch.where(values == 0, torch.full_like(values, torch.nan), values)
