"""The self-check: is a gradient that was put together from samples the one that autograd gives?

A parameter passes if its deviation is small beside its own gradient, or is lost in the rounding of the whole gradient.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# How many roundings a parameter may be off, relative to its own gradient and to all of them; with caps, since half
# precision would allow for anything.
RELATIVE, LARGEST_RELATIVE = 2e4, 0.1
NEGLIGIBLE, LARGEST_NEGLIGIBLE = 64, 2e-2

Deviations = tuple[list[float], list[float]]  # for every parameter: how far off, and how large its gradient is


def deviations(found: Sequence[Tensor], truth: Sequence[Tensor | None]) -> Deviations:
    """Of a gradient from the true one; None in the truth is zero."""
    exact = [torch.zeros_like(f) if t is None else t.detach().to(f.dtype) for f, t in zip(found, truth, strict=True)]
    return [_norm(f - e) for f, e in zip(found, exact, strict=True)], [_norm(e) for e in exact]


def norm_deviations(squares: Sequence[float], truth: Sequence[Tensor | None]) -> Deviations:
    """Of the norms alone, where no gradient was formed."""
    sizes = [0.0 if part is None else _norm(part.detach()) for part in truth]
    return [abs(max(square, 0.0) ** 0.5 - size) for square, size in zip(squares, sizes, strict=True)], sizes


def judge(found: Deviations, names: Sequence[str], rounding: float) -> tuple[float, str]:
    """The relative deviation over all parameters, and what is wrong; empty if nothing is.

    Args:
        found: The deviations.
        names: Of the parameters.
        rounding: The unit of rounding of the backward pass.
    """
    errors, sizes = found
    total = sum(size**2 for size in sizes) ** 0.5
    if not math.isfinite(total):  # the gradient itself is bad, which is for others to tell
        return math.nan, ""
    relative = min(RELATIVE * rounding, LARGEST_RELATIVE)
    negligible = min(NEGLIGIBLE * rounding, LARGEST_NEGLIGIBLE) * total
    wrong = [
        n
        for n, (error, size) in enumerate(zip(errors, sizes, strict=True))
        if not (error <= relative * size or error <= negligible)
    ]
    deviation = sum(error**2 for error in errors) ** 0.5 / total if total else float(max(errors, default=0.0) > 0)
    if not wrong:
        return deviation, ""
    wrong.sort(key=lambda n: -errors[n])
    worst = ", ".join(
        f"{names[n]} ({errors[n] / sizes[n]:.1e})" if sizes[n] else f"{names[n]} (its gradient is 0)" for n in wrong[:3]
    )
    return deviation, (
        f"the self-check found that per-sample gradients do not add up to the gradient of the batch; {len(wrong)} of "
        f"{len(names)} parameters deviate, worst: {worst}. Either a layer or a loss term mixes samples (batch "
        "statistics, contrastive losses, means over the batch inside a term), tensors do not hold the samples in the "
        "dimension batch_dim, or a parameter is used outside of the forward pass of its own layer."
    )


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
