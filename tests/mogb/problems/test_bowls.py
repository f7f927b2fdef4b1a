"""Bowls, against the exact min-norm solver, finite samples of the noise and sampled fronts."""

import math

import moocore
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mogb.problems import make_problem
from mogb.problems.base import seeded
from mogb.problems.bowls import Bowls
from mogb.solvers.min_norm import solve_min_norm


def curvatures(problem):
    """Hessians and centres of all losses, from gradients at 0 and at the unit vectors: exact for quadratics."""
    points = torch.cat([torch.zeros(1, problem.dim), torch.eye(problem.dim)]).double()
    _, rows = problem.jacobian(points)
    hessians = (rows[1:] - rows[0]).transpose(0, 1)
    return hessians, -torch.linalg.solve(hessians, rows[0])


@pytest.mark.parametrize("name", ["bowls", "bowls_2d", "bowls_64"])
def test_the_distance_is_the_min_norm_distance_to_the_hull_of_the_centres(name):
    problem = make_problem(name)
    hessians, centres = curvatures(problem)
    root = torch.linalg.cholesky(hessians[0])  # the first scale is 1: |root' (x - c)| is a distance in z
    x = torch.cat([problem.starts(), problem.pareto_set(3)[1:2] + 0.01])
    found = problem.distance_to_front(problem.losses(x))
    for point, distance in zip(x, found, strict=True):
        gaps = ((point - centres) @ root).numpy()
        exact = math.sqrt(solve_min_norm(gaps @ gaps.T).squared_norm)
        assert float(distance) == pytest.approx(exact, rel=1e-6)


def test_the_losses_are_bowls_of_the_stated_shape():
    problem = Bowls(objectives=3, size=5, condition=50.0, spread=100.0)
    hessians, centres = curvatures(problem)
    shape = torch.logspace(0, math.log10(50.0), 5, dtype=torch.float64)
    assert_close(torch.linalg.eigvalsh(hessians), torch.outer(torch.tensor([1.0, 10.0, 100.0]).double(), shape))
    # At the centre of a bowl the others have their full range: f_j = s_j |e_k - e_j|² / 2 = s_j.
    expected = torch.tensor([[0.0, 10.0, 100.0], [1.0, 0.0, 100.0], [1.0, 10.0, 0.0]], dtype=torch.float64)
    assert_close(problem.losses(centres), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("objectives", [2, 3])
def test_the_hypervolume_is_the_limit_of_sampled_fronts(objectives):
    problem = Bowls(objectives=objectives, size=objectives, spread=1.0)
    volumes = []
    for side in (40, 80):
        ticks = [np.arange(side + 1) / side] * (objectives - 1)
        weights = np.stack(np.meshgrid(*ticks), axis=-1).reshape(-1, objectives - 1)
        weights = weights[weights.sum(1) <= 1 + 1e-12]
        weights = np.concatenate([weights, 1 - weights.sum(1, keepdims=True)], axis=1)
        # |w - e_k|² / 2
        losses = 0.5 * ((weights**2).sum(1, keepdims=True) + 1 - 2 * weights)
        volumes.append(moocore.hypervolume(losses, ref=np.ones(objectives)))
    assert volumes[0] < volumes[1] < problem.true_hypervolume
    assert 2 * volumes[1] - volumes[0] == pytest.approx(problem.true_hypervolume, rel=1e-3)


def test_the_noise_has_its_size_and_no_mean():
    problem = make_problem("bowls_noisy")
    x = problem.starts()[:1].expand(20_000, -1)
    losses, rows = problem.jacobian(x, seeded(3))
    exact_losses, exact = problem.jacobian(x[:1])
    assert_close(losses, exact_losses.expand_as(losses))
    noise = (rows - exact).flatten(1)
    assert float(noise.std()) == pytest.approx(0.2, rel=0.01)
    assert noise.mean(0).abs().max() < 5 * 0.2 / math.sqrt(20_000)
    table = torch.corrcoef(noise.T).fill_diagonal_(0.0)
    assert table.abs().max() < 0.05


def test_all_losses_gain_half_the_squared_distance_at_least():
    problem = make_problem("bowls")
    losses = problem.losses(problem.starts()) / problem.units
    gain = 0.5 * problem.distance_to_front(losses * problem.units) ** 2
    front = problem.pareto_front(50_000) / problem.units
    best = torch.stack([(one - front).amin(1).amax() for one in losses])
    assert (best > 0.95 * gain).all()


def test_a_problem_without_known_hypervolume_says_so():
    assert make_problem("bowls_64").true_hypervolume is None
    assert make_problem("bowls_64").reference_point is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objectives": 11}, "objectives must be between 1 and size=10, but got 11"),
        ({"condition": 0.5}, "condition must be a finite number of at least 1, but got 0.5"),
        ({"spread": math.inf}, "spread must be a finite number of at least 1, but got inf"),
        ({"noise": -0.1}, "noise must be a finite number of at least 0, but got -0.1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Bowls(**options)
