"""The one door through which numbers enter a metric: NumPy or torch in, float64 NumPy out."""

from typing import Any

import numpy as np
from jaxtyping import Float64
from torch import Tensor

Array = np.ndarray | Tensor


def as_array(value: Array, name: str, shape: str, *, finite: bool = True) -> Float64[np.ndarray, "..."]:
    """The value in float64 on the CPU.

    Args:
        value: A NumPy array or a tensor of real numbers.
        name: How the caller's argument is called.
        shape: The expected shape in words, such as ``"P K"``; its number of letters is checked.
        finite: Whether NaN and Inf are refused.

    Raises:
        TypeError: Neither an array nor a tensor.
        ValueError: A wrong number of dimensions, or NaN or Inf.
    """
    if isinstance(value, Tensor):
        value = value.detach().to("cpu").double().numpy()
    elif not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array or a tensor, but got {type(value).__name__}.")
    array: Any = np.asarray(value, dtype=np.float64)
    if array.ndim != len(shape.split()):
        raise ValueError(f"{name} must have the shape [{', '.join(shape.split())}], but got {list(array.shape)}.")
    if finite and not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or Inf: leave out the runs that diverged, and count them apart.")
    return array


def same_width(array: np.ndarray, other: np.ndarray, name: str, other_name: str) -> None:
    """Checks that two arrays agree in their last dimension.

    Raises:
        ValueError: They do not.
    """
    if array.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"{name} and {other_name} must agree in their last dimension, but got {array.shape[-1]} and "
            f"{other.shape[-1]}."
        )
