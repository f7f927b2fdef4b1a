"""Gradient scalers: gradients multiplied by a scale, so that half precision does not lose the small ones.

Shapes: K = objectives, N = numbers in one gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from mogb.jacobian import Jacobian


class Scaled(Jacobian):
    """Rows that are ``scale`` times the gradients: inner products are those of the gradients, directions scaled.

    Attributes:
        inner: The rows.
        scale: What they were multiplied with.
    """

    inner: Jacobian
    scale: float

    def __init__(self, inner: Jacobian, scale: float) -> None:
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "across", inner.across)

    @staticmethod
    def undone(inner: Jacobian, scale: float) -> Jacobian:
        """The gradients themselves, divided in place: for methods that read single coordinates."""
        blocks = inner.blocks
        for block in blocks:
            block /= scale
        return Jacobian(blocks, inner.across)

    @property
    def blocks(self) -> tuple[Tensor, ...]:
        """The scaled rows."""
        return self.inner.blocks

    def __len__(self) -> int:
        return len(self.inner)

    def gramian(self) -> Float64[np.ndarray, "K K"]:
        return self.inner.gramian() / self.scale**2

    def combine(self, weights: Float64[np.ndarray, " K"]) -> tuple[Tensor, ...]:
        return self.inner.combine(weights)

    def products(self, direction: Sequence[Tensor]) -> Float64[np.ndarray, " K"]:
        return self.inner.products(direction) / self.scale**2

    def map(self, combine: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return self.inner.map(combine)

    def first_non_finite(self) -> int | None:
        return self.inner.first_non_finite()


def scale_of(scaler: Any, device: torch.device) -> float | None:
    """The present scale; None without a scaler, or with one that is switched off.

    Raises:
        TypeError: No gradient scaler.
    """
    if scaler is None:
        return None
    if not (hasattr(scaler, "scale") and hasattr(scaler, "is_enabled")):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, but got {type(scaler).__name__}.")
    if not scaler.is_enabled():
        return None
    return float(scaler.scale(torch.ones((), device=device)))  # also makes the scaler's own state
