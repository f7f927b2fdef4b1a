"""The geometry behind the distances, against hand calculations and brute force."""

import math

import pytest
import torch
from torch.testing import assert_close

from mogb.problems._front import distance_to_curves, onto_simplex


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_distance_to_a_polyline_by_hand():
    corner = tensor([0.0, 0.0], [2.0, 0.0], [2.0, 2.0])
    points = tensor([1.0, 1.0], [3.0, 1.0], [-3.0, -4.0], [1.0, 0.0], [1.5, 0.25])
    assert_close(distance_to_curves(points, [corner]), tensor(1.0, 1.0, 5.0, 0.0, 0.25))


def test_the_nearest_of_several_curves_counts():
    curves = [tensor([0.0, 0.0], [1.0, 0.0]), tensor([5.0, 5.0])]
    assert_close(distance_to_curves(tensor([[5.0, 4.0], [0.5, 2.0]]), curves), tensor([1.0, 2.0]))


def test_equal_neighbours_do_not_divide_by_zero():
    assert_close(distance_to_curves(tensor([3.0, 4.0]), [tensor([0.0, 0.0], [0.0, 0.0])]), tensor(5.0))


def test_a_sampled_circle_is_as_accurate_as_its_curvature_says():
    angle = torch.linspace(0, math.pi / 2, 101, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)
    between = torch.stack([(angle + 0.005).cos(), (angle + 0.005).sin()], dim=1)[:-1]
    step = math.pi / 2 / 100
    assert distance_to_curves(between, [circle]).max() <= step**2 / 8 * 1.001


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_projection_onto_the_simplex_satisfies_its_optimality_conditions(size):
    points = 3 * torch.randn(50, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    nearest = onto_simplex(points)
    assert_close(nearest.sum(1), torch.ones(50, dtype=torch.float64))
    assert (nearest >= 0).all()
    # (point - nearest) . (vertex - nearest) <= 0 for every vertex.
    normal = points - nearest
    assert (normal - (normal * nearest).sum(1, keepdim=True)).max() < 1e-12


def test_points_of_the_simplex_stay():
    points = tensor([0.2, 0.3, 0.5], [1.0, 0.0, 0.0])
    assert_close(onto_simplex(points), points)
