"""State with one number per objective: it keeps its size, also where some objectives sit out a step.

Shapes: K = objectives, L = live objectives, those that take part.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64

from mogb.base import Solution


def same_size(method: str, held: int, size: int) -> None:
    """Refuses a change of the number of objectives while a state is held.

    Raises:
        ValueError: The state belongs to another number of objectives.
    """
    if held != size:
        raise ValueError(
            f"{method!r} holds the state of {held} objectives, but got {size}. Call reset() when the objectives "
            "change, or use one instance for each set of objectives."
        )


def everyone(size: int) -> Bool[np.ndarray, " K"]:
    """All objectives are live."""
    return np.ones(size, dtype=bool)


def nobody(size: int) -> Solution:
    """The answer where no objective is live."""
    return Solution(np.zeros(size), left_out=tuple(range(size)), note="all gradients are zero")


def live_share(
    simplex: Float64[np.ndarray, " K"], live: Bool[np.ndarray, " K"]
) -> tuple[Float64[np.ndarray, " L"], float]:
    """Simplex weights among the live objectives, uniform where they had none, and how much of the whole they had."""
    part = simplex[live]
    share = float(part.sum())
    return (part / share if share > 0 else np.full(len(part), 1 / len(part))), share


def positive_numbers(values: Sequence[float], name: str) -> tuple[float, ...]:
    """An option that holds one positive number per objective.

    Raises:
        ValueError: It is empty, or a number is zero, negative or not finite.
    """
    numbers = tuple(float(value) for value in values)
    if not numbers or not np.isfinite(numbers).all() or min(numbers) <= 0:
        raise ValueError(f"{name} must hold positive finite numbers, one per objective, but got {list(numbers)}.")
    return numbers
