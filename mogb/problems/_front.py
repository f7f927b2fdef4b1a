"""Geometry that several fronts share: distances to curves in the plane, projection onto the simplex.

Shapes: K = objectives.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

CHUNK = 1 << 22  # distances that are held at once


def distance_to_curves(
    points: Float64[Tensor, "... 2"], curves: Sequence[Float64[Tensor, "_ 2"]]
) -> Float64[Tensor, "..."]:
    """Euclidean distance to the nearest of several polylines in the plane.

    For a smooth curve of curvature c sampled every h, the answer is too small or too large by at most c h² / 8.
    """
    return torch.stack([_distance_to_polyline(points, curve) for curve in curves]).amin(0)


def onto_simplex(points: Float64[Tensor, "... K"]) -> Float64[Tensor, "... K"]:
    """The nearest points with non-negative coordinates that sum to 1, by sorting."""
    ordered = points.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    rank = torch.arange(1, points.shape[-1] + 1, dtype=points.dtype)
    count = (ordered * rank > excess).sum(-1, keepdim=True)
    return (points - excess.gather(-1, count - 1) / count).clamp(min=0.0)


def _distance_to_polyline(points: Tensor, vertices: Tensor) -> Tensor:
    flat = points.reshape(-1, 2)
    if len(vertices) == 1:
        return (flat - vertices).norm(dim=1).reshape(points.shape[:-1])
    begin, edges = vertices[:-1], vertices.diff(dim=0)
    lengths = edges.square().sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    parts = []
    for part in flat.split(max(1, CHUNK // len(edges))):
        offset = part[:, None] - begin
        along = ((offset * edges).sum(-1) / lengths).clamp(0.0, 1.0)
        parts.append((offset - along[..., None] * edges).square().sum(-1).amin(1).sqrt())
    return torch.cat(parts).reshape(points.shape[:-1]) if parts else flat.new_zeros(points.shape[:-1])
