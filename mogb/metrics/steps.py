"""How many steps it takes to get close.

Shapes: T = recorded moments, S = starting points.
"""

import numpy as np
from jaxtyping import Float, Int

from mogb.metrics._arrays import Array, as_array


def steps_to_tolerance(
    steps: Int[Array, " T"], distances: Float[Array, "T S"], tolerance: float, *, stay: bool = False
) -> Float[np.ndarray, " S"]:
    """The first recorded step at which the distance is at most the tolerance; infinite where it never is.

    Args:
        steps: When the distances were recorded, in rising order.
        distances: To the front, say. NaN counts as far.
        tolerance: What counts as close.
        stay: Whether the distance must also stay within the tolerance until the end of the record.

    Raises:
        ValueError: A wrong shape, steps out of order, or a tolerance that is not a number of at least 0.
    """
    times = as_array(steps, "steps", "T")
    far = as_array(distances, "distances", "T S", finite=False)
    if len(times) != len(far):
        raise ValueError(f"steps and distances must cover the same T, but got {len(times)} and {len(far)}.")
    if (np.diff(times) <= 0).any():
        raise ValueError("steps must rise from one record to the next.")
    if not 0 <= tolerance < np.inf:
        raise ValueError(f"tolerance must be a number of at least 0, but got {tolerance}.")
    near = far <= tolerance
    if stay:
        near = np.logical_and.accumulate(near[::-1])[::-1]
    if len(times) == 0:
        return np.full(far.shape[1], np.inf)
    return np.where(near.any(0), times[near.argmax(0)], np.inf)
