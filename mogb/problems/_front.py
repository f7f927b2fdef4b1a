"""Distances to fronts that are sampled densely: curves in the plane, and clouds of points.

Shapes: M = samples of the front, K = objectives.
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


def distance_to_cloud(points: Float64[Tensor, "... K"], cloud: Float64[Tensor, "M K"]) -> Float64[Tensor, "..."]:
    """Euclidean distance to the nearest of M samples."""
    flat = points.reshape(-1, points.shape[-1])
    step = max(1, CHUNK // (len(cloud) * points.shape[-1]))
    parts = [(part[:, None] - cloud).square().sum(-1).amin(1).sqrt() for part in flat.split(step)]
    return torch.cat(parts).reshape(points.shape[:-1]) if parts else flat.new_zeros(points.shape[:-1])


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
