"""What methods that read losses have in common: refusals in the user's words, points in the space of losses.

Shapes: K = objectives.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64

from mogb.aggregators._options import preference_array


def require_above(
    method: str,
    losses: Float64[np.ndarray, " K"],
    live: Bool[np.ndarray, " K"],
    bounds: Float64[np.ndarray, " K"] | None = None,
    *,
    option: str = "",
) -> None:
    """Refuses losses at or below their bounds, by default 0; only live objectives count.

    Raises:
        ValueError: It names the first offending objective and the remedy.
    """
    gaps = losses if bounds is None else losses - bounds
    if np.all(gaps[live] > 0):
        return
    index = int(np.argmax(live & (gaps <= 0)))
    bound = 0.0 if bounds is None else float(bounds[index])
    remedy = f"Lower its bound in {option}" if option else "Add a constant that keeps it positive"
    raise ValueError(
        f"{method!r} needs losses above {bound:g}, but the loss of objective {index} is {losses[index]:.6g}. {remedy}, "
        "or choose a method that takes no logarithms or ratios of losses."
    )


def as_point(values: Sequence[float] | None, name: str) -> tuple[float, ...] | None:
    """An option that is a point in the space of losses; None stays None.

    Raises:
        ValueError: It is empty or not finite.
    """
    if values is None:
        return None
    numbers = tuple(float(value) for value in values)
    if not numbers or not np.isfinite(numbers).all():
        raise ValueError(f"{name} must hold finite numbers, one per objective, but got {list(numbers)}.")
    return numbers


def point_array(point: Sequence[float] | None, size: int, name: str) -> Float64[np.ndarray, " K"]:
    """The point for K objectives; the origin for None.

    Raises:
        ValueError: It is for another number of objectives.
    """
    if point is None:
        return np.zeros(size)
    if len(point) != size:
        raise ValueError(f"{name} must have one number per objective, {size}, but has {len(point)}.")
    return np.array(point)


def softmax(values: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, " K"]:
    """Exponentials that sum to 1."""
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def check_epoch(method: str, steps: int, limit: int) -> None:
    """Refuses another step of an epoch that has lasted too long to be one.

    Raises:
        RuntimeError: ``limit`` steps without an end of the epoch.
    """
    if steps >= limit:
        raise RuntimeError(
            f"{method!r} compares epochs, but {steps} steps have passed since the last end_epoch(). Call end_epoch() "
            f"after every epoch; if yours are longer than {limit} steps, set max_epoch_steps."
        )


def pick_point(point: Sequence[float] | None, live: Bool[np.ndarray, " K"], name: str) -> tuple[float, ...] | None:
    """The coordinates of the live objectives."""
    return None if point is None else tuple(point_array(point, len(live), name)[live].tolist())


def shares(preference: Sequence[float] | None, size: int) -> Float64[np.ndarray, " K"]:
    """The preference for K objectives, scaled to sum 1; uniform for None.

    Raises:
        ValueError: It is for another number of objectives, or zero for every one that takes part.
    """
    numbers = preference_array(preference, size, 1.0)
    if (total := numbers.sum()) == 0:
        raise ValueError("preference is zero for every objective that takes part. Prefer one that does.")
    return numbers / total
