"""Moving averages of K gradients, kept block by block in float32 or wider.

Shapes: K = objectives.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor


def blended(
    method: str,
    held: tuple[Tensor, ...] | None,
    blocks: Sequence[Tensor],
    scale: Float64[np.ndarray, " K"],
    rate: float,
) -> tuple[Tensor, ...]:
    """``(1 - rate)`` of what is held, at first zero, plus ``rate`` of the rows, each times its ``scale``.

    Raises:
        ValueError: What is held belongs to other blocks.
    """
    check_blocks(method, held, blocks)
    new = []
    for index, block in enumerate(blocks):
        rows = wide(block)
        factors = torch.from_numpy(rate * scale).to(rows.device, rows.dtype)
        fresh = rows * factors.reshape(-1, *[1] * (rows.ndim - 1))
        if held is not None:
            fresh.add_(held[index].to(fresh.device), alpha=1 - rate)
        new.append(fresh)
    return tuple(new)


def wide(block: Tensor) -> Tensor:
    """In float32 at least: averages of half-precision numbers would stop moving."""
    return block.detach().to(torch.promote_types(block.dtype, torch.float32))


def like(direction: Sequence[Tensor], blocks: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The direction in the dtype of the gradients."""
    return tuple(part.to(block.dtype) for part, block in zip(direction, blocks, strict=True))


def check_blocks(method: str, held: Sequence[Tensor] | None, blocks: Sequence[Tensor]) -> None:
    """Refuses gradients of another shape than the state that is held.

    Raises:
        ValueError: The number of blocks differs, or the shape of one.
    """
    if held is None:
        return
    shapes, found = ([list(block.shape) for block in group] for group in (held, blocks))
    if shapes != found:
        raise ValueError(
            f"{method!r} holds the state of gradients of the shapes {_some(shapes)}, but got {_some(found)}. Call "
            "reset() when the objectives or the parameters change."
        )


def _some(shapes: list[list[int]]) -> str:
    return ", ".join(map(str, shapes[:3])) + (f" and {len(shapes) - 3} more" if len(shapes) > 3 else "")
