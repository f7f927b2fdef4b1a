r"""Hypervolume: the volume between a set of points and a reference point. All losses are minimized.

.. math::  \operatorname{vol} \Bigl( \bigcup_p \, [f_p, r] \Bigr)

Exact and our own for up to three objectives, exact through moocore (extra ``metrics``) for more, and sampled with a
standard error wherever that is asked for.

Shapes: P = points, K = objectives.
"""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

from mogb.metrics._arrays import Array, as_array, same_width

BATCH = 1 << 22  # comparisons that are held at once


@dataclass(frozen=True)
class Estimate:
    """A number known up to chance.

    Attributes:
        value: The estimate.
        standard_error: Its standard deviation.
    """

    value: float
    standard_error: float


def hypervolume(points: Float[Array, "P K"], reference: Float[Array, " K"]) -> float:
    """The exact hypervolume; points that do not lie below the reference in every loss add nothing.

    Takes O(P log P) for two objectives, at most O(P²) for three. Beyond, moocore's time grows quickly with K: at
    K = 8, a few hundred points take tens of seconds, and :func:`estimate_hypervolume` is the way out.

    Raises:
        ValueError: A wrong shape, NaN or Inf.
        ImportError: More than three objectives without moocore.

    Examples:
        >>> hypervolume(np.array([[1.0, 2.0], [2.0, 1.0]]), np.array([3.0, 3.0]))
        3.0
    """
    values, corner = _inside(points, reference)
    if len(values) == 0:
        return 0.0
    if values.shape[1] == 1:
        return float(corner[0] - values.min())
    if values.shape[1] == 2:
        return _area(values, corner)
    if values.shape[1] == 3:
        return _volume(values, corner)
    return _by_moocore(values, corner)


def estimate_hypervolume(
    points: Float[Array, "P K"], reference: Float[Array, " K"], *, samples: int = 100_000, seed: int = 0
) -> Estimate:
    """The hypervolume from uniform draws in the box between the best value of every loss and the reference.

    Raises:
        ValueError: A wrong shape, NaN or Inf, fewer than two samples.
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, but got {samples}.")
    values, corner = _inside(points, reference)
    if len(values) == 0:
        return Estimate(0.0, 0.0)
    lowest = values.min(0)
    box = float(np.prod(corner - lowest))
    generator = np.random.default_rng(seed)
    hits, left, step = 0, samples, max(1, BATCH // values.size)
    while left > 0:
        count = min(step, left)
        draws = generator.uniform(lowest, corner, size=(count, len(corner)))
        hits += int(np.any(np.all(values <= draws[:, None], axis=2), axis=1).sum())
        left -= count
    share = hits / samples
    return Estimate(box * share, box * float(np.sqrt(share * (1 - share) / (samples - 1))))


def _inside(points: Array, reference: Array) -> tuple[Float64[np.ndarray, "P K"], Float64[np.ndarray, " K"]]:
    values, corner = as_array(points, "points", "P K"), as_array(reference, "reference", "K")
    same_width(values, corner, "points", "reference")
    return values[(values < corner).all(1)], corner


def _area(values: Float64[np.ndarray, "P 2"], corner: Float64[np.ndarray, " 2"]) -> float:
    """The staircase from left to right: each step is as high as the lowest point so far."""
    ordered = values[np.lexsort((values[:, 1], values[:, 0]))]
    lowest = np.minimum.accumulate(ordered[:, 1])
    widths = np.diff(ordered[:, 0], append=corner[0])
    return float(widths @ (corner[1] - lowest))


def _volume(values: Float64[np.ndarray, "P 3"], corner: Float64[np.ndarray, " 3"]) -> float:
    """Slices along the third loss: the area of the staircase of all points below, times the height of the slice."""
    ordered = values[np.lexsort(values.T)]
    heights = np.diff(ordered[:, 2], append=corner[2])
    right, top = float(corner[0]), float(corner[1])
    xs: list[float] = []  # the corners of the staircase, from left to right; ys falls
    ys: list[float] = []
    area = volume = 0.0
    for (x, y, _), height in zip(ordered.tolist(), heights.tolist(), strict=True):
        area += _insert(xs, ys, x, y, right, top)
        volume += area * height
    return volume


def _insert(xs: list[float], ys: list[float], x: float, y: float, right: float, top: float) -> float:
    """Adds a point to a staircase; returns the area it adds."""
    first = bisect_left(xs, x)
    level = ys[first - 1] if first > 0 else top  # height of the staircase just left of x
    if y >= level or (first < len(xs) and xs[first] == x and ys[first] <= y):
        return 0.0
    added, left, last = 0.0, x, first
    while last < len(xs) and ys[last] >= y:  # corners that the new point hides
        added += (xs[last] - left) * (level - y)
        left, level, last = xs[last], ys[last], last + 1
    end = xs[last] if last < len(xs) else right
    added += (end - left) * (level - y)
    xs[first:last], ys[first:last] = [x], [y]
    return added


def _by_moocore(values: Float64[np.ndarray, "P K"], corner: Float64[np.ndarray, " K"]) -> float:
    try:
        import moocore
    except ImportError as error:
        raise ImportError(
            f"The exact hypervolume of {len(corner)} objectives needs moocore: pip install 'mogb[metrics]'. "
            "Without it, estimate_hypervolume samples."
        ) from error
    return float(moocore.hypervolume(values, ref=corner))
