r"""How well a set of points covers a known front. All losses are minimized.

Distances are Euclidean in the space of the losses: divide by the ranges of the losses first where these differ
(``Problem.units``).

Shapes: P = points, M = samples of the front, K = objectives.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Float64

from mogb.metrics._arrays import Array, as_array, same_width

CHUNK = 1 << 21  # differences that are held at once


def non_dominated(points: Float[Array, "P K"]) -> Bool[np.ndarray, " P"]:
    """Which points no other point dominates: none is at least as good everywhere and better somewhere.

    Of several equal points, all stay.

    Raises:
        ValueError: A wrong shape, NaN or Inf.
    """
    values = as_array(points, "points", "P K")
    keep = np.ones(len(values), dtype=bool)
    # Sorted by their sums, a point can only be dominated by one before it; it is enough to ask those that stayed.
    staying = np.empty_like(values)
    count = 0
    for index in np.lexsort((*values.T, values.sum(1))):
        point, before = values[index], staying[:count]
        if ((before <= point).all(1) & (before < point).any(1)).any():
            keep[index] = False
        else:
            staying[count] = point
            count += 1
    return keep


def distance_to_samples(points: Float[Array, "P K"], front: Float[Array, "M K"]) -> Float64[np.ndarray, " P"]:
    """Distance from every point to the nearest sample of a front.

    Raises:
        ValueError: A wrong shape, no samples, NaN or Inf.
    """
    values, samples = _pair(points, front)
    return _reduce(values, samples, lambda gaps: np.linalg.norm(gaps, axis=2).min(1))


def distance_to_polyline(points: Float[Array, "P K"], vertices: Float[Array, "M K"]) -> Float64[np.ndarray, " P"]:
    """Distance from every point to the polyline through the vertices of a one-dimensional front, in their order.

    Raises:
        ValueError: A wrong shape, no vertices, NaN or Inf.
    """
    values, corners = _pair(points, vertices)
    if len(corners) == 1:
        return np.linalg.norm(values - corners, axis=1)
    edges = np.diff(corners, axis=0)
    lengths = np.maximum((edges**2).sum(1), np.finfo(np.float64).tiny)

    def nearest(gaps: Float64[np.ndarray, "p m K"]) -> Float64[np.ndarray, " p"]:
        along = np.clip((gaps * edges).sum(2) / lengths, 0.0, 1.0)
        return np.linalg.norm(gaps - along[:, :, None] * edges, axis=2).min(1)

    return _reduce(values, corners[:-1], nearest)


def igd(points: Float[Array, "P K"], front: Float[Array, "M K"]) -> float:
    """Inverted generational distance: the mean over the front of the distance to the nearest point.

    Raises:
        ValueError: A wrong shape, no points or samples, NaN or Inf.
    """
    values, samples = _pair(points, front)
    return float(_reduce(samples, values, lambda gaps: np.linalg.norm(gaps, axis=2).min(1)).mean())


def igd_plus(points: Float[Array, "P K"], front: Float[Array, "M K"]) -> float:
    r"""IGD+: as :func:`igd`, but only the losses in which the point is worse count.

    .. math::  \frac1M \sum_{z \in \text{front}} \min_{a} \| \max(a - z, 0) \|

    Unlike :func:`igd` it never prefers a dominated set (Ishibuchi et al., EMO 2015, Eq. 18).

    Raises:
        ValueError: A wrong shape, no points or samples, NaN or Inf.
    """
    values, samples = _pair(points, front)
    return float(_reduce(samples, values, lambda gaps: np.linalg.norm(np.minimum(gaps, 0.0), axis=2).min(1)).mean())


def epsilon_plus(points: Float[Array, "P K"], front: Float[Array, "M K"]) -> float:
    r"""Additive epsilon: how far all points have to be lowered in every loss until they weakly dominate the front.

    .. math::  \max_{z \in \text{front}} \min_{a} \max_k \, (a_k - z_k)

    Raises:
        ValueError: A wrong shape, no points or samples, NaN or Inf.
    """
    values, samples = _pair(points, front)
    return float(_reduce(samples, values, lambda gaps: (-gaps).max(2).min(1)).max())


def spacing(points: Float[Array, "P K"]) -> float:
    r"""Schott's spacing: the standard deviation of the Manhattan distances to the nearest other point; 0 is even.

    .. math::  \sqrt{\tfrac{1}{P - 1} \sum_i (d_i - \bar d)^2}, \qquad d_i = \min_{j \ne i} \sum_k |f_{ik} - f_{jk}|

    Raises:
        ValueError: A wrong shape, fewer than two points, NaN or Inf.
    """
    values = as_array(points, "points", "P K")
    if len(values) < 2:
        raise ValueError(f"spacing needs at least two points, but got {len(values)}.")
    gaps = np.abs(values[:, None] - values).sum(2)
    np.fill_diagonal(gaps, np.inf)
    return float(gaps.min(1).std(ddof=1))


def _pair(points: Array, front: Array) -> tuple[Float64[np.ndarray, "P K"], Float64[np.ndarray, "M K"]]:
    values, samples = as_array(points, "points", "P K"), as_array(front, "front", "M K")
    same_width(values, samples, "points", "front")
    for name, array in (("points", values), ("front", samples)):
        if len(array) == 0:
            raise ValueError(f"{name} must hold at least one point, but is empty.")
    return values, samples


def _reduce(
    points: Float64[np.ndarray, "P K"],
    others: Float64[np.ndarray, "M K"],
    summarize: Callable[[np.ndarray], np.ndarray],
) -> Float64[np.ndarray, " P"]:
    """Summarizes the differences ``points - others``, ``[p, M, K]``, for a few points at a time."""
    step = max(1, CHUNK // others.size)
    parts = [summarize(points[i : i + step, None] - others) for i in range(0, len(points), step)]
    return np.concatenate(parts)
