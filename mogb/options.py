"""The types of options, checked once for every method, in the user's words."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from mogb.errors import OptionTypeError

WORDS = {float: "a number", int: "a whole number", bool: "True or False", str: "a name", type(None): "None"}


def settle_types(instance: Any) -> None:
    """Compares the options of a dataclass with their annotations, and makes NumPy's and torch's numbers plain ones.

    Numbers, switches, ``None`` and sequences of numbers are checked here; what else an annotation may say is left to
    the class.

    Raises:
        OptionTypeError: A value of another type. It names the option, the value and what is allowed.
    """
    for item in dataclasses.fields(instance):
        if not item.init or "state" in item.metadata:
            continue
        value = getattr(instance, item.name)
        check_type(item.name, value, item.type)
        if isinstance(value, torch.Tensor | np.generic | np.ndarray) and value.ndim == 0:
            object.__setattr__(instance, item.name, value.item())


def check_type(name: str, value: Any, annotation: Any) -> None:
    """One option: see :func:`settle_types`.

    Raises:
        OptionTypeError: A value of another type.
    """
    allowed = _alternatives(annotation)
    if all(_fits(value, kind) is False for kind in allowed):
        words = " or ".join(dict.fromkeys(_in_words(kind) for kind in allowed))
        raise OptionTypeError(f"{name} must be {words}, but got {value!r}.")


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _fits(value: Any, kind: Any) -> bool | None:
    """None where the annotation says more than is checked here."""
    if kind is type(None):
        return value is None
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        return _is_number(value)
    if typing.get_origin(kind) in (Sequence, tuple):
        return _is_sequence(value, typing.get_args(kind)[0])
    return None


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.ndim == 0
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_)


def _is_sequence(value: Any, kind: Any) -> bool:
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        return False
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.ndim >= 1
    return all(_fits(part, kind) is not False for part in value) if isinstance(value, Sequence) else True


def _in_words(kind: Any) -> str:
    if typing.get_origin(kind) in (Sequence, tuple):
        inner = typing.get_args(kind)[0]
        return "a sequence of numbers" if inner is float else "a sequence of sequences of numbers"
    return WORDS.get(kind, getattr(kind, "__name__", str(kind)))
