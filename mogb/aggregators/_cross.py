r"""The cross-batch Gramian, which double-sampling methods read in place of the Gramian.

.. math::  A_{ij} = g_i(\xi) \cdot g_j(\xi')

With two independent batches :math:`\xi, \xi'` its expectation is :math:`\bar G = \bar J \bar J^\top`, the Gramian of
the *mean* gradients; that of one batch is larger by the gradients' variance.

Shapes: K = objectives.
"""

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from mogb.jacobian import Jacobian


def cross_gramian(
    first: Jacobian | Tensor | Iterable[Tensor], second: Jacobian | Tensor | Iterable[Tensor]
) -> Float64[Tensor, "K K"]:
    """Inner products of the gradients of one batch with those of another, independent one.

    Args:
        first: The K gradients on the first batch: a tensor ``[K, N]``, a :class:`~mogb.jacobian.Jacobian`, or its
            blocks ``[K, *shape]``.
        second: The same losses' gradients on the second batch, in the same blocks.

    Returns:
        Float64 on the CPU, in general not symmetric. Give it to ``weights(gramian=...)`` of ``modo`` or ``sdmgrad``.

    Raises:
        ValueError: The two differ in the number of gradients or in the shapes of their blocks.

    Examples:
        >>> cross_gramian(torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[1., 3.],
                [2., 4.]], dtype=torch.float64)
    """
    one, other = (item if isinstance(item, Jacobian) else Jacobian.of(item) for item in (first, second))
    shapes = [[list(block.shape) for block in jacobian.blocks] for jacobian in (one, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"first and second must hold the same gradients on two batches, but their shapes are {shapes[0]} and "
            f"{shapes[1]}."
        )
    size = len(one)
    total = np.zeros((size, size))
    for a, b in zip(one.blocks, other.blocks, strict=True):
        total += Jacobian((torch.cat((a, b)),)).gramian()[:size, size:]
    return torch.from_numpy(total)
