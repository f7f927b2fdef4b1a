"""The valley, against the numbers of the published codes and a grid."""

import json
import math
import pathlib

import pytest
import torch
from torch.testing import assert_close

from mogb.problems import make_problem
from mogb.problems.valley import Valley

CASES = json.loads((pathlib.Path(__file__).parents[2] / "cases" / "problems.json").read_text())


@pytest.mark.parametrize("point", CASES["valley"]["points"], ids=lambda point: str(point["x"]))
def test_values_and_gradients_are_those_of_the_published_code(point):
    losses, rows = Valley().jacobian(torch.tensor([point["x"]], dtype=torch.float64))
    assert_close(losses[0], torch.tensor(point["f"]).double(), rtol=2e-6, atol=2e-5)
    assert_close(rows[0], torch.tensor(point["jacobian_rows_are_tasks"]).double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.1, 1.0)])
def test_end_points_of_long_runs_have_the_published_values(scales):
    ends = [end for end in CASES["valley_ends"] if tuple(end["scale"]) == scales]
    assert len(ends) > 30
    problem = Valley(scales=scales)
    x = torch.tensor([end["x"] for end in ends], dtype=torch.float64)
    losses, rows = problem.jacobian(x)
    rounding = 5e-4 * rows.abs().sum(2) + 6e-4  # both x and f are given to three decimals
    assert ((losses - torch.tensor([end["f"] for end in ends])).abs() <= rounding).all()
    near = problem.distance_to_front(losses) < 1e-2
    assert near.tolist() == [end["on_pareto_front"] for end in ends]


def test_both_gradients_pass_the_cut_offs_at_zero():
    # At (0, 0): c1' = 1/2, c2' = -1/2, h = log 3.5 + 6, q = (49 + 6.4)/10 - 20, so df/dx2 = (h - q)/2 for both.
    _, rows = Valley().jacobian(torch.zeros(1, 2, dtype=torch.float64))
    slope = 0.5 * (math.log(3.5) + 6 - (49 + 6.4) / 10 + 20)
    assert_close(rows[0], torch.tensor([[0.0, slope], [0.0, slope]], dtype=torch.float64))


def test_the_set_is_where_it_was_published():
    points = Valley().pareto_set(5)
    assert_close(points[:, 0], torch.tensor([-7.0, -3.5, 0.0, 3.5, 7.0], dtype=torch.float64))
    expected = torch.tensor([-8.434460, -8.375986, -8.355110, -8.375986, -8.434460], dtype=torch.float64)
    assert_close(points[:, 1], expected, rtol=0, atol=6e-7)
    ends = Valley().losses(points[[2, 4]])
    expected = torch.tensor([[-15.09163845, -15.09163845], [-19.98942514, -0.3979395]], dtype=torch.float64)
    assert_close(ends, expected, rtol=0, atol=6e-8)


def test_the_second_coordinate_is_a_root_to_the_last_digit():
    x = Valley().pareto_set(101)
    level = -15.1 - 0.1 * x[:, 0] ** 2
    shift = x[:, 1] + 8
    value = -0.5 / (x[:, 1] / 2).cosh() ** 2 * (level + 0.01 * shift**2) + 0.02 * shift * (-x[:, 1] / 2).tanh()
    assert value.abs().max() < 1e-14
    assert ((x[:, 1] > -9.5) & (x[:, 1] < -8)).all()


def test_the_set_does_not_depend_on_the_scales_and_the_distance_neither():
    plain, scaled = Valley(), make_problem("valley_scaled")
    assert torch.equal(plain.pareto_set(9), scaled.pareto_set(9))
    x = plain.starts()
    assert_close(scaled.losses(x), plain.losses(x) * torch.tensor([0.1, 1.0], dtype=torch.float64))
    assert_close(plain.distance_to_front(plain.losses(x)), scaled.distance_to_front(scaled.losses(x)))
    assert_close(scaled.true_hypervolume, 0.1 * plain.true_hypervolume)


def test_the_weighted_sum_has_its_published_minimum():
    # Weighted sums with scales (0.1, 1) end at x1 = -5.727, f = (-0.380, -19.828).
    problem = make_problem("valley_scaled")
    x = problem.pareto_set(140_001)
    losses = problem.losses(x)
    best = losses.sum(1).argmin()
    assert abs(float(x[best, 0]) + 5.727) < 1e-3
    assert_close(losses[best], torch.tensor([-0.380, -19.828], dtype=torch.float64), rtol=0, atol=6e-4)


def test_a_grid_over_the_plane_finds_nothing_below_the_front():
    problem = Valley()
    axis = torch.linspace(-12, 12, 601, dtype=torch.float64)
    losses = problem.losses(torch.cartesian_prod(axis, axis))
    front = problem.pareto_front(201)
    assert max(float((point - losses).amin(1).max()) for point in front) <= 0
    # and comes close to every point of it
    assert max(float((losses - point).abs().amax(1).min()) for point in front[::10]) < 0.1


def test_bad_scales_are_refused():
    with pytest.raises(ValueError, match=r"scales must be two positive numbers, but got \(0.0, 1.0\)"):
        Valley(scales=(0.0, 1.0))
