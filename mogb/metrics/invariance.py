"""Does rescaling one loss move the end point?

The Pareto set of a problem does not depend on the scales of its losses, and neither should a method that claims to be
scale-free: from the same starting points it should end where it ended before.

Shapes: S = starting points, N = numbers in x.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

from mogb.metrics._arrays import Array, as_array


@dataclass(frozen=True, eq=False)
class Shift:
    """How far end points moved.

    Attributes:
        each: The distance that every end point moved; infinite where exactly one of the two runs diverged, NaN where
            both did.
        largest: The largest of these, NaN left out.
        median: Their median, NaN left out.
        moved: Share of the starting points whose end points moved by more than the tolerance, NaN left out.
    """

    each: Float64[np.ndarray, " S"]
    largest: float
    median: float
    moved: float


def end_point_shift(
    ends: Float[Array, "S N"], rescaled_ends: Float[Array, "S N"], *, extent: float = 1.0, tolerance: float = 0.05
) -> Shift:
    """Compares the end points of a problem with those of the same problem after one loss was rescaled.

    Args:
        ends: Where a method ended.
        rescaled_ends: Where it ended from the same starting points with the rescaled loss.
        extent: What counts as a distance of 1: the length of the Pareto set, say.
        tolerance: A larger distance counts as a move.

    Raises:
        ValueError: Shapes that differ, no starting point, no run that stayed finite, or an extent that is not positive.
    """
    first = as_array(ends, "ends", "S N", finite=False)
    second = as_array(rescaled_ends, "rescaled_ends", "S N", finite=False)
    if first.shape != second.shape:
        raise ValueError(f"ends and rescaled_ends must have one shape, but got {first.shape} and {second.shape}.")
    if not 0 < extent < np.inf:
        raise ValueError(f"extent must be a positive number, but got {extent}.")
    fine, also_fine = np.isfinite(first).all(1), np.isfinite(second).all(1)
    each = np.where(fine | also_fine, np.inf, np.nan)
    both = fine & also_fine
    each[both] = np.linalg.norm(first[both] - second[both], axis=1) / extent
    known = each[~np.isnan(each)]
    if len(known) == 0:
        raise ValueError("No starting point has a finite end point: there is nothing to compare.")
    return Shift(each, float(known.max()), float(np.median(known)), float((known > tolerance).mean()))
