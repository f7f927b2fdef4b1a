r"""As few backward passes as the terms allow: a basis of the cotangents that they send into the network.

Sample i sends J cotangents :math:`T_{ij} = \partial t_{ij} / \partial v_i` through the network's output v. Where they
are parallel, one pass carries them all; in general, with rank R,

.. math::  T_{ij} = \sum_{r=1}^{R} C_{ijr} U_{ir}, \qquad
           g_k = \sum_r \sum_i \Bigl( \sum_j W_{kij} C_{ijr} \Bigr)
                 \frac{\partial v_i}{\partial \theta}^{\!\top} U_{ir} .

The basis is orthogonal sample by sample (Gram-Schmidt, largest cotangent first), so that no mixture cancels digits
that a pass in low precision has lost. A cotangent counts as dependent only below rounding: what is dropped is not
larger than what arithmetic loses anyway.

Shapes: B = samples, J = terms, R = passes, K = objectives, D = numbers of the output per sample.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# A cotangent is dependent below this many rounding errors of the largest: 1e-6 in float32.
ROUNDINGS = 8
COARSEST = 1e-6


def orthogonal_basis(
    cotangents: Sequence[Sequence[Tensor]],
) -> tuple[list[list[Tensor]], Float[Tensor, "B J R"]]:
    """Splits J cotangents per sample into R <= J orthogonal ones.

    Args:
        cotangents: For each of the J terms, the cotangents at the outputs of the network, each ``[B, ...]``.

    Returns:
        For each of the R >= 1 passes, the cotangents at the outputs, and the coefficients C.
    """
    count, outputs = len(cotangents), len(cotangents[0])
    samples = len(cotangents[0][0])
    left = [torch.stack([_wide(cotangents[j][o]) for j in range(count)], 1).flatten(2) for o in range(outputs)]
    scale = _norms(left).amax(1)  # [B]
    tolerance = min(max(ROUNDINGS * torch.finfo(part.dtype).eps for part in left), COARSEST)
    basis: list[list[Tensor]] = []
    columns = []
    rows = torch.arange(samples, device=scale.device)
    for _ in range(count):
        norms = _norms(left)
        norms[norms <= tolerance * scale[:, None]] = 0
        pivot = norms.argmax(1)
        length = norms[rows, pivot]
        if basis and not bool((length > 0).any()):
            break
        chosen = [torch.where((length > 0)[:, None], part[rows, pivot], 0) for part in left]
        products = [(part * c[:, None]).sum(2, dtype=torch.float64) for part, c in zip(left, chosen, strict=True)]
        column = torch.stack(products).sum(0) / torch.where(length > 0, length, 1).square()[:, None]
        column[norms == 0] = 0
        column[rows, pivot] = (length > 0).to(column.dtype)
        for part, c in zip(left, chosen, strict=True):
            part -= column[..., None].to(part.dtype) * c[:, None]
            part[rows, pivot] = 0
        basis.append(chosen)
        columns.append(column)
    shaped = [
        [c.reshape(cotangents[0][o].shape).to(cotangents[0][o].dtype) for o, c in enumerate(chosen)] for chosen in basis
    ]
    return shaped, torch.stack(columns, 2)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _norms(parts: Sequence[Float[Tensor, "B J D"]]) -> Float[Tensor, "B J"]:
    return torch.stack([torch.linalg.vector_norm(part, dim=2, dtype=torch.float64) for part in parts]).norm(dim=0)
