"""The user's terms and coefficients, checked once and brought into one form.

Shapes: K = objectives, B = samples, J = terms.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mogb.errors import NonFiniteError

PROBE_SEED = 20240731


@dataclass(frozen=True, eq=False)
class Problem:
    """Losses that are linear in terms of single samples.

    Attributes:
        outputs: The terms on the graph: one tensor ``[B, J]`` or ``[B]``, or J tensors ``[B]``.
        coefficients: W, ``[K, B, J]``.
    """

    outputs: tuple[Tensor, ...]
    coefficients: Float64[np.ndarray, "K B J"]

    @property
    def samples(self) -> int:
        """B."""
        return self.coefficients.shape[1]

    @property
    def terms(self) -> int:
        """J."""
        return self.coefficients.shape[2]

    def __len__(self) -> int:
        return len(self.coefficients)

    def seeds(self, matrix: Float64[np.ndarray, "B J"]) -> tuple[Tensor, ...]:
        """The cotangents at ``outputs`` that weight every term as ``matrix`` says."""
        if len(self.outputs) == 1:
            return (_like(matrix, self.outputs[0]).reshape(self.outputs[0].shape),)
        return tuple(_like(column, output) for column, output in zip(matrix.T, self.outputs, strict=True))

    def with_probe(self, basis: Float64[np.ndarray, "R J"] | None) -> "Problem":
        """The same with one more objective at the end, whose random coefficients tell all samples and terms apart.

        Args:
            basis: Combinations of terms that the coefficients are to be made of; None for any.
        """
        shape = (1, self.samples, self.terms if basis is None else len(basis))
        probe = np.random.default_rng(PROBE_SEED).standard_normal(shape)
        probe = probe if basis is None else probe @ basis
        size = np.sqrt(np.square(self.coefficients).mean() / np.square(probe).mean()) or 1.0
        return Problem(self.outputs, np.concatenate([self.coefficients, size * probe]))

    def losses(self) -> Float64[np.ndarray, " K"]:
        """The K loss values."""
        columns = [output.detach().double().cpu().reshape(self.samples, -1) for output in self.outputs]
        with np.errstate(invalid="ignore", over="ignore"):
            return np.einsum("kbj,bj->k", self.coefficients, torch.cat(columns, 1).numpy())

    def checked(self) -> "Problem":
        """The same.

        Raises:
            NonFiniteError: A loss is NaN or Inf; it names the objective.
        """
        losses = self.losses()
        if not np.isfinite(losses).all():
            raise NonFiniteError("loss", int(np.argmin(np.isfinite(losses))))
        return self


def as_problem(
    terms: Tensor | Sequence[Tensor], coefficients: Float[Tensor, "K B J"] | Float[Tensor, "K B"] | np.ndarray
) -> Problem:
    """Checks terms and coefficients.

    Raises:
        TypeError: Something of the wrong kind, or coefficients that carry a graph.
        ValueError: Shapes that don't fit, terms without a graph, or coefficients that are not finite.
    """
    outputs = (terms,) if isinstance(terms, Tensor) else tuple(terms)
    if not outputs:
        raise ValueError("terms is empty: pass a tensor [B, J], or one tensor [B] per term.")
    for index, output in enumerate(outputs):
        label = "terms" if isinstance(terms, Tensor) else f"terms[{index}]"
        if not isinstance(output, Tensor) or not output.is_floating_point():
            found = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f"{label} must be a floating-point tensor with one number per sample, but is {found}.")
        if not output.requires_grad:
            raise ValueError(f"{label} carries no graph: it was computed under no_grad(), or detached.")
        if output.ndim != 1 and not (isinstance(terms, Tensor) and output.ndim == 2):
            raise ValueError(f"{label} must have the shape [B], or [B, J] as one tensor, but got {list(output.shape)}.")
        if output.shape[0] != outputs[0].shape[0] or output.numel() == 0:
            raise ValueError(
                f"{label} must have one number for each of B >= 1 samples, but got the shape {list(output.shape)} "
                f"beside {list(outputs[0].shape)}."
            )
    count = len(outputs) if outputs[0].ndim == 1 else outputs[0].shape[1]
    return Problem(outputs, _as_coefficients(coefficients, outputs[0].shape[0], count))


def _as_coefficients(given: Tensor | np.ndarray, samples: int, terms: int) -> Float64[np.ndarray, "K B J"]:
    if isinstance(given, Tensor) and given.requires_grad:
        raise TypeError(
            "coefficients must be constant, but they carry a graph: detach() them. Factors that depend on the "
            "parameters belong into the terms."
        )
    array = given.detach().to("cpu", torch.float64).numpy() if isinstance(given, Tensor) else np.asarray(given, float)
    if array.ndim == 2 and terms == 1:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[1:] != (samples, terms) or len(array) == 0:
        raise ValueError(
            f"coefficients must have the shape [K, B, J] = [K, {samples}, {terms}] with K >= 1 to fit the terms, but "
            f"got {list(np.shape(given))}."
        )
    if not np.isfinite(array).all():
        bad = int(np.argmin(np.isfinite(array).all((1, 2))))
        raise ValueError(
            f"coefficients[{bad}] holds NaN or Inf: a sample that does not count for an objective has coefficient 0."
        )
    return array


def _like(array: np.ndarray, tensor: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(tensor.device, tensor.dtype)
