r"""Do gradients pull apart, and does a direction agree with all of them?

Between gradients: cosines, magnitude similarity and curvature, pair by pair. Between a direction d and the gradients
of the same or of other data: :math:`\cos(d, g_k)` over many mini-batches, which is the harmony diagnostic of MARBLE
(arXiv 2605.06507, Table S1).

A zero gradient has no direction: its cosines are NaN, and shares and means leave it out.

Shapes: K = objectives, N = numbers in one gradient, T = mini-batches.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

from mogb.metrics._arrays import Array, as_array, same_width


def cosines(jacobian: Float[Array, "K N"]) -> Float64[np.ndarray, "K K"]:
    """Cosines between the gradients; NaN where one is zero.

    Raises:
        ValueError: A wrong shape, NaN or Inf.
    """
    units = _units(as_array(jacobian, "jacobian", "K N"))
    return np.clip(units @ units.T, -1.0, 1.0)


def conflict_share(jacobian: Float[Array, "K N"]) -> float:
    """Share of the pairs of non-zero gradients whose cosine is negative; 0 where there is no pair.

    Raises:
        ValueError: A wrong shape, NaN or Inf.
    """
    table = cosines(jacobian)
    pairs = table[np.triu_indices(len(table), k=1)]
    pairs = pairs[~np.isnan(pairs)]
    return float((pairs < 0).mean()) if len(pairs) else 0.0


def magnitude_similarity(jacobian: Float[Array, "K N"]) -> Float64[np.ndarray, "K K"]:
    r"""Gradient-magnitude similarity, :math:`2 \|g_i\| \|g_j\| / (\|g_i\|^2 + \|g_j\|^2)`; NaN where both are zero.

    1 for equal norms, towards 0 the more they differ (Yu et al., PCGrad, NeurIPS 2020, Definition 2).

    Raises:
        ValueError: A wrong shape, NaN or Inf.
    """
    ratio = _norm_ratios(as_array(jacobian, "jacobian", "K N"))
    return 2 * ratio / (1 + ratio**2)


def curvature(jacobian: Float[Array, "K N"]) -> Float64[np.ndarray, "K K"]:
    r"""Multi-task curvature bounding measure; NaN where a gradient is zero or two are opposite.

    .. math::  (1 - \cos^2_{ij}) \, \frac{\|g_i - g_j\|^2}{\|g_i + g_j\|^2}

    (Yu et al., PCGrad, NeurIPS 2020, Definition 3 and Theorem 2.)

    Raises:
        ValueError: A wrong shape, NaN or Inf.
    """
    rows = as_array(jacobian, "jacobian", "K N")
    cosine, ratio = cosines(rows), _norm_ratios(rows)
    twice = 2 * ratio * cosine
    with np.errstate(invalid="ignore", divide="ignore"):
        measure = (1 - cosine**2) * (1 + ratio**2 - twice) / (1 + ratio**2 + twice)
    return np.where(np.isfinite(measure), measure, np.nan)


def condition_number(jacobian: Float[Array, "K N"]) -> float:
    """The largest over the smallest non-zero singular value of the Jacobian; 1 where all gradients are zero.

    Raises:
        ValueError: A wrong shape, NaN or Inf.
    """
    rows = as_array(jacobian, "jacobian", "K N")
    values = np.linalg.svd(rows, compute_uv=False)
    values = values[values > values.max(initial=0.0) * max(rows.shape) * np.finfo(np.float64).eps]
    return float(values.max() / values.min()) if len(values) else 1.0


@dataclass(frozen=True, eq=False)
class Harmony:
    r"""How directions agree with gradients, over T mini-batches.

    Of the K cosines :math:`\cos(d, g_k)` of a mini-batch, the minimum, the mean and the (population) variance are
    taken, and these are averaged over the mini-batches.

    Attributes:
        minimum: The mean of the smallest cosine.
        mean: The mean of the cosines.
        variance: The mean of their variance over the objectives.
        conflict_rate: Share of the mini-batches whose smallest cosine is negative.
        worst: The smallest cosine of all.
        cosines: ``[T, K]``; NaN where the direction or the gradient is zero.
    """

    minimum: float
    mean: float
    variance: float
    conflict_rate: float
    worst: float
    cosines: Float64[np.ndarray, "T K"]


def harmony(directions: Float[Array, "T N"], gradients: Float[Array, "T K N"], *, tolerance: float = 1e-12) -> Harmony:
    r"""Cosines between directions and gradients, summed up as in MARBLE's Table S1.

    Compared with the gradients that a direction was made from, methods built on the min-norm point score a conflict
    rate of 0 by algebra. Pass the gradients of *other* data, or exact ones (repeated T times), to learn whether a
    method helps.

    Args:
        directions: One per mini-batch.
        gradients: K per mini-batch.
        tolerance: Cosines above minus this count as no conflict: it is what rounding leaves of a right angle.

    Raises:
        ValueError: A wrong shape, NaN or Inf, no mini-batch in which a direction meets a non-zero gradient.
    """
    steps, rows = as_array(directions, "directions", "T N"), as_array(gradients, "gradients", "T K N")
    same_width(steps, rows, "directions", "gradients")
    if len(steps) != len(rows):
        raise ValueError(f"directions and gradients must cover the same T, but got {len(steps)} and {len(rows)}.")
    table = np.clip(np.einsum("tn,tkn->tk", _units(steps), _units(rows)), -1.0, 1.0)
    heard = table[~np.isnan(table).all(1)]
    if len(heard) == 0:
        raise ValueError("No mini-batch has both a non-zero direction and a non-zero gradient: nothing to compare.")
    smallest = np.nanmin(heard, axis=1)
    return Harmony(
        minimum=float(smallest.mean()),
        mean=float(np.nanmean(heard, axis=1).mean()),
        variance=float(np.nanvar(heard, axis=1).mean()),
        conflict_rate=float((smallest < -tolerance).mean()),
        worst=float(smallest.min()),
        cosines=table,
    )


def _norm_ratios(rows: Float64[np.ndarray, "K N"]) -> Float64[np.ndarray, "K K"]:
    """The shorter over the longer norm of every pair; NaN where both are zero."""
    largest = np.abs(rows).max(1, initial=0.0)
    scaled = np.divide(rows, largest[:, None], out=np.zeros_like(rows), where=largest[:, None] > 0)
    norms = largest * np.linalg.norm(scaled, axis=1)
    with np.errstate(invalid="ignore"):
        return np.minimum(norms[:, None], norms) / np.maximum(norms[:, None], norms)


def _units(rows: Float64[np.ndarray, "... N"]) -> Float64[np.ndarray, "... N"]:
    """Rows of length 1; NaN for zero rows. Safe for norms whose squares overflow or underflow."""
    largest = np.abs(rows).max(-1, keepdims=True, initial=0.0)
    with np.errstate(invalid="ignore"):
        scaled = rows / largest
    return scaled / np.linalg.norm(scaled, axis=-1, keepdims=True)
