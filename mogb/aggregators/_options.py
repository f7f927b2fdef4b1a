"""Options that several methods have in common, checked once.

Shapes: K = objectives.
"""

import importlib.util
from collections.abc import Sequence
from typing import get_args

import numpy as np
from jaxtyping import Bool, Float64

from mogb.solvers.cone import ConeSolver


def as_preference(preference: Sequence[float] | None, *, positive: bool = False) -> tuple[float, ...] | None:
    """A preference vector: non-negative numbers, not all of them zero; or ``positive`` ones.

    Raises:
        ValueError: Other numbers.
        TypeError: No sequence of numbers.
    """
    if preference is None:
        return None
    try:
        numbers = tuple(float(number) for number in preference)
    except TypeError as error:
        raise TypeError(
            f"preference must be a sequence of numbers, one per objective, but got {preference!r}."
        ) from error
    if not numbers or not np.isfinite(numbers).all() or min(numbers) < 0 or max(numbers) == 0:
        raise ValueError(
            "preference must hold non-negative finite numbers, one per objective, not all zero, but got "
            f"{list(numbers)}."
        )
    if positive and min(numbers) == 0:
        raise ValueError(
            f"preference must hold positive numbers, but got {list(numbers)}: leave an objective that does not count "
            "out of the losses."
        )
    return numbers


def preference_array(preference: Sequence[float] | None, size: int, default: float) -> Float64[np.ndarray, " K"]:
    """The preference of every objective.

    Raises:
        ValueError: The preference is for another number of objectives.
    """
    if preference is None:
        return np.full(size, default)
    if len(preference) != size:
        raise ValueError(f"preference must have one number per objective, {size}, but has {len(preference)}.")
    return np.array(preference)


def relative_preference(preference: Sequence[float] | None, size: int) -> Float64[np.ndarray, " K"] | None:
    """The preference of every objective, scaled to mean 1; None stays None.

    Raises:
        ValueError: The preference is for another number of objectives.
    """
    if preference is None:
        return None
    numbers = preference_array(preference, size, 1.0)
    return numbers / numbers.mean()


def pick(preference: Sequence[float] | None, live: Bool[np.ndarray, " K"]) -> tuple[float, ...] | None:
    """The preferences of the live objectives."""
    if preference is None:
        return None
    return tuple(preference_array(preference, len(live), 0.0)[live].tolist())


def clipped(
    weights: Float64[np.ndarray, " K"], gramian: Float64[np.ndarray, "K K"], max_norm: float
) -> Float64[np.ndarray, " K"]:
    """The weights, made smaller where the direction is longer than ``max_norm``; 0 switches it off."""
    if max_norm == 0:
        return weights
    squared = float(weights @ gramian @ weights)
    return weights if squared <= max_norm**2 else weights * (max_norm / squared**0.5)


def check_max_norm(max_norm: float) -> None:
    """Refuses an impossible cap.

    Raises:
        ValueError: A negative number, or NaN.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be positive, or 0 to switch it off, but got {max_norm!r}.")


def check_cone_solver(solver: str) -> None:
    """Refuses an unknown solver, and one that is not installed.

    Raises:
        ValueError: An unknown name.
        ImportError: The package is missing; the message names the extra.
    """
    if solver not in get_args(ConeSolver):
        raise ValueError(f"solver must be one of {', '.join(get_args(ConeSolver))}, but got {solver!r}.")
    if solver == "quadprog" and importlib.util.find_spec("quadprog") is None:
        raise ImportError('solver="quadprog" needs the package quadprog: pip install "mogb[quadprog]".')
