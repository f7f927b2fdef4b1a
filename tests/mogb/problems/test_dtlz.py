"""DTLZ, against a literal transcription of the definitions, published constants and sampled fronts."""

import math

import moocore
import pytest
import torch
from torch.testing import assert_close

from mogb.problems import make_problem
from mogb.problems.dtlz import DTLZ, record_intervals


def literal(kind, m, x):
    """The definitions of Deb, Thiele, Laumanns and Zitzler, with loops."""
    head, tail = x[: m - 1], x[m - 1 :]
    if kind == 7:
        g = 1 + 9 * sum(tail) / len(tail)
        h = m - sum(f / (1 + g) * (1 + math.sin(3 * math.pi * f)) for f in head)
        return [*head, (1 + g) * h]
    if kind == 1:
        g = 100 * (len(tail) + sum((t - 0.5) ** 2 - math.cos(20 * math.pi * (t - 0.5)) for t in tail))
    else:
        g = sum((t - 0.5) ** 2 for t in tail)
    losses = []
    for j in range(m):
        f = 0.5 * (1 + g) if kind == 1 else 1 + g
        for i in range(m - 1 - j):
            f *= head[i] if kind == 1 else math.cos(head[i] * math.pi / 2)
        if j > 0:
            last = head[m - 1 - j]
            f *= 1 - last if kind == 1 else math.sin(last * math.pi / 2)
        losses.append(f)
    return losses


@pytest.mark.parametrize("objectives", [2, 3, 5])
@pytest.mark.parametrize("kind", [1, 2, 7])
def test_values_are_those_of_the_definitions(kind, objectives):
    problem = DTLZ(kind=kind, objectives=objectives)
    x = problem.sample_starts(20, torch.Generator().manual_seed(kind))
    expected = torch.tensor([literal(kind, objectives, point) for point in x.tolist()], dtype=torch.float64)
    assert_close(problem.losses(x), expected, rtol=1e-11, atol=1e-11)
    rows = problem.jacobian(x)[1]
    step = 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    difference = (problem.losses(x + step) - problem.losses(x - step)) / 2
    assert_close(
        torch.einsum("skn,sn->sk", rows, step), difference, rtol=1e-4, atol=1e-7 * float(rows.abs().max()) * 1e-3
    )


def test_hypervolumes_are_the_published_ones():
    assert DTLZ(kind=1, objectives=3).true_hypervolume == pytest.approx(1 - 1 / 48, abs=1e-15)
    assert DTLZ(kind=1, objectives=2).true_hypervolume == pytest.approx(1 - 1 / 8, abs=1e-15)
    assert DTLZ(kind=2, objectives=2).true_hypervolume == pytest.approx(0.424602, abs=5e-7)
    assert DTLZ(kind=2, objectives=3).true_hypervolume == pytest.approx(0.807401, abs=5e-7)


@pytest.mark.parametrize("objectives", [2, 3])
@pytest.mark.parametrize("kind", [1, 2, 7])
def test_hypervolumes_are_the_limits_of_sampled_fronts(kind, objectives):
    problem = DTLZ(kind=kind, objectives=objectives)
    reference = problem.reference_point.numpy()
    sides = (50, 100) if objectives == 3 else (2000, 4000)
    coarse, fine = (
        moocore.hypervolume(problem.pareto_front(side ** (objectives - 1)).numpy(), ref=reference) for side in sides
    )
    assert coarse < fine < problem.true_hypervolume
    # The staircase lacks a volume that halves with the spacing.
    assert 2 * fine - coarse == pytest.approx(problem.true_hypervolume, rel=1e-3)


def test_the_intervals_of_dtlz7_are_where_its_gain_sets_records():
    t = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)
    gain = t * (1 + torch.sin(3 * math.pi * t))
    before = torch.cummax(gain, 0).values
    record = torch.cat([torch.tensor([True]), gain[1:] > before[:-1]])
    begins = t[1:][record[1:] & ~record[:-1]]
    ends = t[:-1][record[:-1] & ~record[1:]]
    (low, first), (second, third) = record_intervals()
    assert low == 0.0
    assert_close(begins, torch.tensor([second], dtype=torch.float64), rtol=0, atol=2e-6)
    assert_close(ends, torch.tensor([first, third], dtype=torch.float64), rtol=0, atol=2e-6)


def test_distances_off_the_front_by_hand():
    sphere = DTLZ(kind=2)
    points = torch.tensor([[2.0, 0.0, 0.0], [0.3, 0.4, 0.0], [2.0, 2.0, 1.0]], dtype=torch.float64)
    assert_close(sphere.distance_to_front(points), torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64))
    plane = DTLZ(kind=1)  # its unit is 1/2, so the front is the simplex
    points = torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.0, 0.0]], dtype=torch.float64)
    assert_close(plane.distance_to_front(points), torch.tensor([2 / math.sqrt(3), 1.0], dtype=torch.float64))


def test_distances_to_the_patches_are_exact_near_them():
    # Leave a smooth point of the front along its normal: the distance is the length of the step.
    problem = make_problem("dtlz7")
    head = torch.tensor([[0.1, 0.7], [0.75, 0.8], [0.2, 0.05]], dtype=torch.float64)
    slope = 1 + torch.sin(3 * math.pi * head) + 3 * math.pi * head * torch.cos(3 * math.pi * head)
    last = 6 - (head * (1 + torch.sin(3 * math.pi * head))).sum(1, keepdim=True)
    normal = torch.cat([slope, torch.ones(3, 1, dtype=torch.float64)], dim=1) * problem.units
    normal = normal / normal.norm(dim=1, keepdim=True)
    moved = torch.cat([head, last], dim=1) + 0.01 * normal * problem.units
    assert_close(problem.distance_to_front(moved), torch.full((3,), 0.01, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("options", [{"kind": 3}, {"kind": 1, "objectives": 1}])
def test_impossible_options_are_refused(options):
    with pytest.raises((ValueError, TypeError)):
        DTLZ(**options)
