"""The self-check: is a gradient that was put together from samples the one that autograd gives?

A parameter passes if its deviation is small beside its own gradient, or is lost in the rounding of the largest ones.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# In units of rounding of the coarsest dtype: 2e-2 in float32 would hide real faults, so there is a cap as well.
RELATIVE = 2e4
NEGLIGIBLE = 64
CAPS = (0.1, 2e-2)


def compare(
    found: Sequence[Tensor], truth: Sequence[Tensor | None], names: Sequence[str], rounding: float
) -> tuple[float, str]:
    """The relative deviation over all parameters, and what is wrong; empty if nothing is.

    Args:
        found: The gradient from samples.
        truth: That of an ordinary backward pass; None where a parameter has no part in it.
        names: Of the parameters.
        rounding: The unit of rounding of the backward pass.
    """
    exact = [torch.zeros_like(f) if t is None else t.detach().to(f.dtype) for f, t in zip(found, truth, strict=True)]
    errors = [_norm(f - e) for f, e in zip(found, exact, strict=True)]
    sizes = [_norm(e) for e in exact]
    total = sum(size**2 for size in sizes) ** 0.5
    relative, negligible = min(RELATIVE * rounding, CAPS[0]), min(NEGLIGIBLE * rounding, CAPS[1])
    wrong = [
        n
        for n, (error, size) in enumerate(zip(errors, sizes, strict=True))
        if not (error <= relative * size or error <= negligible * total)
    ]
    deviation = sum(error**2 for error in errors) ** 0.5 / total if total else float(max(errors, default=0) > 0)
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
