"""Input checks that several modules share: each raises one clear error, or answers the value in one form."""

import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mogb_diffusion.errors import InputError

T = TypeVar("T")


def floating(name: str, value: Any, shape: str) -> Tensor:
    """The tensor itself, if it is one of floating-point numbers; ``shape`` only appears in the message."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point tensor {shape}, but got {found}.")
    return value


def real_numbers(name: str, values: Any, shape: str) -> Tensor:
    """A tensor of a tensor, an array or nested lists of real numbers; lists become float64, not torch's default."""
    try:
        tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values) + 0.0)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a tensor, an array or lists of real numbers {shape}.") from None
    if tensor.is_complex():
        raise TypeError(f"{name} must be real numbers {shape}, but got {tensor.dtype}.")
    return tensor.detach()


def number(
    name: str, value: Any, *, above: float | None = None, low: float | None = None, high: float | None = None
) -> float:
    """A finite float, larger than ``above``, at least ``low`` and at most ``high``, where they are given."""
    try:
        given = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, but got {value!r}.") from None
    wanted = [f"> {above:g}"] if above is not None else []
    wanted += [f">= {low:g}"] if low is not None else []
    wanted += [f"<= {high:g}"] if high is not None else []
    holds = (above is None or given > above) and (low is None or given >= low) and (high is None or given <= high)
    if not (math.isfinite(given) and holds):
        raise ValueError(f"{name} must be a finite number {' and '.join(wanted)}, but got {value!r}.")
    return given


def whole_number(name: str, value: Any, *, low: int = 1) -> int:
    """The same, if it is a whole number (True and 2.0 are none) of at least ``low``.

    Raises:
        InputError: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        wanted = "a positive whole number" if low == 1 else f"a whole number of at least {low}"
        raise InputError(f"{name} must be {wanted}, but got {value!r}.")
    return value


def named(what: str, name: str, known: Mapping[str, T]) -> T:
    """The entry of this name.

    Raises:
        InputError: There is none; the message names the nearest one, or all of them.
    """
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"{what.capitalize()}s: {', '.join(known)}."
        raise InputError(f"There is no {what} {name!r}. {hint}")
    return known[name]


def choice(name: str, value: Any, known: Collection[str]) -> None:
    """Refuses a value that is not one of the known words."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, but got {value!r}.")


def unit_interval(name: str, values: Tensor, remedy: str, *, slack: float = 0.0) -> None:
    """Refuses values outside [0, 1], and NaN."""
    if values.numel() and not bool(((values >= -slack) & (values <= 1 + slack)).all()):
        finite = values[~values.isnan()]
        found = "NaN" if len(finite) < values.numel() else f"values from {finite.min():g} to {finite.max():g}"
        raise ValueError(f"{name} must lie in [0, 1], but holds {found}. {remedy}")


def same_shape(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Refuses a tensor whose shape differs from that of another argument."""
    if value.shape != like.shape:
        raise ValueError(f"{name} must have the shape of {like_name}, {list(like.shape)}, but has {list(value.shape)}.")


def at_least_float32(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: the widest of the arguments, never narrower than float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
