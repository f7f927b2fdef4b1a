"""The multi-task network, against torch.nn and its teacher."""

import math

import pytest
import torch
from torch.testing import assert_close

from mogb.problems import make_problem
from mogb.problems.multitask import Multitask, _data


def test_the_losses_are_those_of_a_network_of_torch():
    problem = Multitask(objectives=3)
    x = problem.starts()[0]
    network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).double()
    torch.nn.utils.vector_to_parameters(x, network.parameters())
    inputs, targets, _ = _data(problem)
    errors = ((network(inputs) - targets) ** 2).mean(0)
    assert_close(problem.losses(x), errors.detach() * torch.tensor([1.0, 100.0, 1e4], dtype=torch.float64))


def test_the_teacher_reaches_zero_in_every_task():
    problem = make_problem("multitask")
    point = problem.pareto_set(1)
    assert (problem.losses(point) / problem.units).max() < 1e-28
    assert problem.losses(problem.starts()).min() > 0


def test_the_best_constant_prediction_costs_one_unit():
    problem = make_problem("multitask")
    assert_close(problem.losses(torch.zeros(problem.dim, dtype=torch.float64)), problem.units)
    assert_close(problem.units, torch.tensor([1.0, 10.0, 100.0, 1e3, 1e4], dtype=torch.float64))
    assert float(problem.distance_to_front(problem.units)) == pytest.approx(math.sqrt(5))


def test_descent_on_the_sum_of_shares_explains_most_of_the_variance():
    problem = make_problem("multitask")
    x = problem.starts().clone()
    x.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=1e-2)
    for _ in range(300):
        _, rows = problem.jacobian(x)
        x.grad = (rows / problem.units[:, None]).mean(1)
        optimizer.step()
    assert problem.distance_to_front(problem.losses(x.detach())).max() < 0.2


def test_the_losses_differ_in_scale_and_compete_for_the_trunk():
    problem = make_problem("multitask")
    _, rows = problem.jacobian(problem.starts())
    norms = rows.norm(dim=2)
    assert (norms.amax(1) / norms.amin(1) > 1e3).all()
    trunk = rows[:, :, : 16 * 8]
    cosines = torch.nn.functional.cosine_similarity(trunk[:, :, None], trunk[:, None], dim=3)
    assert (cosines.amin((1, 2)) < 0).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": 17}, "teacher must be at most hidden=16"),
        ({"objectives": 0}, "objectives must be at least 1, but got 0"),
        ({"samples": 1}, "samples must be at least 2, but got 1"),
        ({"spread": 0.1}, "spread must be a finite number of at least 1, but got 0.1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Multitask(**options)
