"""The quadratic pairs, against hand calculations."""

import pytest
import torch
from torch.testing import assert_close

from mogb.problems import make_problem
from mogb.problems.quadratic import QuadraticPair


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_the_element_wise_pair_is_two_squares_that_agree_at_zero():
    problem = make_problem("quadratic_elementwise")
    assert_close(problem.losses(tensor(3.0, -2.0)), tensor(9.0, 4.0))
    assert_close(problem.pareto_front(10), tensor([0.0, 0.0]))
    assert_close(problem.distance_to_front(tensor(3.0, 4.0)), tensor(5.0)[0])
    assert problem.true_hypervolume == 256.0


def test_the_convex_pair_by_hand():
    # (x - u) = (-0.5, 0.5): A1 gives .25 - 2*.2*.25 + .05*.25; (1.5, .5): A2 gives 3*2.25 - 2*.6*.75 + .2*.25.
    problem = make_problem("quadratic_convex")
    assert_close(problem.losses(tensor(0.5, 0.5)), tensor(0.1625, 5.9))
    # The two ends are the centres, where one loss is 0: f1(-1, 0) = 4 and f2(1, 0) = 12.
    assert_close(problem.pareto_front(2), tensor([0.0, 12.0], [4.0, 0.0]), atol=1e-12, rtol=1e-12)


def test_the_scaled_pair_has_the_segment_between_its_centres():
    problem = make_problem("quadratic_scaled")
    points = problem.pareto_set(11)
    assert points[:, 1].abs().max() < 1e-12
    assert_close(points[[0, -1], 0], tensor(1.0, -10.0))
    # With D² = (11, 0) A (11, 0) = 242 the front is sqrt(f1/242) + sqrt(f2/2420) = 1, so 5/6 of the box is dominated.
    front = problem.pareto_front(50)
    assert_close((front / tensor(242.0, 2420.0)).sqrt().sum(1), torch.ones(50, dtype=torch.float64))
    assert problem.true_hypervolume == pytest.approx(5 / 6 * 242 * 2420, rel=1e-9)


def test_the_published_starting_points_and_rates():
    assert make_problem("quadratic_elementwise").settings.lr == 0.075
    assert make_problem("quadratic_convex").settings.lr == 0.125
    assert make_problem("quadratic_scaled").settings.lr == 0.005
    assert make_problem("quadratic_scaled").starts().tolist() == [[-6, 4], [-3, -1.5], [1.5, 2], [2.5, 5.5]]


def test_a_mean_step_on_the_element_wise_pair_shrinks_towards_the_front():
    # Mean of the gradients: x <- x (1 - lr) for lr = .075, 50 times; the published figure is at most 9.3e-3.
    problem = make_problem("quadratic_elementwise")
    x = problem.starts()
    for _ in range(problem.settings.steps):
        x = x - problem.settings.lr * problem.jacobian(x)[1].mean(1)
    assert_close(x, problem.starts() * (1 - 0.075) ** 50)
    assert problem.distance_to_front(problem.losses(x)).max() < 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matrices": (((1.0, 0.5), (0.0, 1.0)), ((1.0, 0.0), (0.0, 1.0)))}, "matrices must be symmetric"),
        ({"matrices": (((1.0, 0.0), (0.0, 0.0)), ((1.0, 0.0), (0.0, 0.0)))}, "positive definite sum"),
        ({"scales": (1.0, -1.0)}, "scales must be two positive numbers"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QuadraticPair(**options)
