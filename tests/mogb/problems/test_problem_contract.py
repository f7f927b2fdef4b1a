"""What every problem promises, checked over the registry against finite differences, random search and moocore."""

import pickle

import moocore
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mogb.metrics import non_dominated, stationarity
from mogb.problems import make_problem, registered_problems
from mogb.problems.base import Problem, seeded

NAMES = registered_problems()
KNOWN_FRONT = [name for name in NAMES if make_problem(name).pareto_front(2) is not None]
KNOWN_SET = [name for name in NAMES if make_problem(name).pareto_set(2) is not None]
TWO_SIDED = [name for name in KNOWN_FRONT if make_problem(name).num_objectives == 2 and "elementwise" not in name]


def interior(problem, count, seed):
    """Random points away from bounds."""
    x = problem.sample_starts(count, seeded(seed))
    if problem.box is not None:
        lower, upper = problem.box
        x = lower + (upper - lower) * (0.05 + 0.9 * (x - lower) / (upper - lower))
    return x


def test_the_suite_is_complete():
    assert set(NAMES) == {
        "bowls", "bowls_2d", "bowls_64", "bowls_noisy", "dtlz1", "dtlz2", "dtlz7", "fonseca", "fonseca_2d",
        "multitask", "quadratic_convex", "quadratic_elementwise", "quadratic_scaled", "schaffer", "specialists",
        "valley", "valley_scaled", "zdt1", "zdt2", "zdt3", "zdt4", "zdt6",
    }  # fmt: skip


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown problem 'vally'. Known ones: bowls, .*zdt6"):
        make_problem("vally")


def test_an_unknown_option_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'valley' has no option 'scale'. Its options: scales"):
        make_problem("valley", scale=2.0)


def test_options_override_those_of_a_variant():
    assert make_problem("valley_scaled", scales=(3.0, 2.0)).scales == (3.0, 2.0)
    assert make_problem("valley_scaled").scales == (0.1, 1.0)
    assert make_problem("valley_scaled").name == "valley_scaled"


@pytest.mark.parametrize("name", NAMES)
def test_shapes_settings_and_identity(name):
    problem = make_problem(name)
    starts, k, n = problem.starts(), problem.num_objectives, problem.dim
    assert starts.dtype == torch.float64
    assert starts.shape[1] == n
    assert torch.equal(starts, problem.starts())
    assert problem.name == name
    assert problem == make_problem(name)
    assert len({problem, make_problem(name)}) == 1
    copy = pickle.loads(pickle.dumps(problem))
    assert copy == problem
    assert copy.name == name
    losses, rows = problem.jacobian(starts)
    assert losses.shape == (len(starts), k)
    assert rows.shape == (len(starts), k, n)
    assert losses.dtype == rows.dtype == torch.float64
    assert not losses.requires_grad
    assert torch.isfinite(rows).all()
    assert problem.units.shape == (k,)
    assert (problem.units > 0).all()
    settings = problem.settings
    assert settings.optimizer in {"adam", "sgd"}
    assert settings.lr > 0
    assert settings.quick_lr > 0
    assert 0 < settings.quick_steps <= settings.steps
    assert settings.tolerance > 0
    assert problem.reference


@pytest.mark.parametrize("name", NAMES)
def test_random_starts_come_from_the_generator(name):
    problem = make_problem(name)
    first, again, other = (problem.sample_starts(4, seeded(seed)) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(problem.project(first), first)


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_batched_over_any_leading_dimensions(name):
    problem = make_problem(name)
    x = interior(problem, 6, 1)
    expected = torch.stack([problem.losses(point) for point in x])
    assert_close(problem.losses(x), expected, rtol=1e-12, atol=1e-12)
    assert_close(problem.losses(x.reshape(2, 3, -1)), expected.reshape(2, 3, -1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("name", NAMES)
def test_the_jacobian_by_hand_is_that_of_autograd(name, count):
    problem = make_problem(name)
    x = interior(problem, count, 2)
    losses, rows = problem.jacobian(x)
    expected_losses, expected_rows = Problem._jacobian(problem, x, None)
    assert_close(losses, expected_losses, rtol=1e-12, atol=1e-12)
    scale = float(expected_rows.abs().max())
    assert_close(rows, expected_rows, rtol=1e-11, atol=1e-13 * scale)


@pytest.mark.parametrize("name", NAMES)
def test_the_jacobian_is_that_of_finite_differences(name):
    problem = make_problem(name)
    x = interior(problem, 5, 3)
    generator = seeded(4)
    for _ in range(3):
        step = 1e-5 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        difference = problem.losses(x + step) - problem.losses(x - step)
        predicted = 2 * torch.einsum("skn,sn->sk", problem.jacobian(x)[1], step)
        size = 2 * problem.jacobian(x)[1].norm(dim=2) * step.norm(dim=1, keepdim=True)
        rounding = 1e-14 * problem.losses(x).abs()
        assert ((difference - predicted).abs() <= 3e-5 * size + rounding + 1e-18).all()


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_is_fine(name):
    problem = make_problem(name)
    losses, rows = problem.jacobian(problem.starts()[:0])
    assert losses.shape == (0, problem.num_objectives)
    assert rows.shape == (0, problem.num_objectives, problem.dim)


@pytest.mark.parametrize("name", [name for name in NAMES if make_problem(name).box is not None])
def test_projection_is_onto_the_box(name):
    problem = make_problem(name)
    lower, upper = problem.box
    x = lower + (upper - lower) * (3 * torch.rand(50, problem.dim, generator=seeded(5), dtype=torch.float64) - 1)
    inside = problem.project(x)
    assert ((inside >= lower) & (inside <= upper)).all()
    kept = (x >= lower) & (x <= upper)
    assert torch.equal(inside[kept], x[kept])


@pytest.mark.parametrize("name", [name for name in NAMES if make_problem(name).stochastic])
def test_noise_comes_from_the_generator_and_losses_and_jacobian_agree_on_it(name):
    problem = make_problem(name)
    x = problem.starts()
    losses, rows = problem.jacobian(x, seeded(1))
    again, other = problem.jacobian(x, seeded(1))[1], problem.jacobian(x, seeded(2))[1]
    assert torch.equal(rows, again)
    assert not torch.equal(rows, other)
    assert not torch.equal(rows, problem.jacobian(x)[1])
    expected_losses, expected_rows = Problem._jacobian(problem, x, seeded(1))
    assert_close(losses, expected_losses)
    assert_close(rows, expected_rows)


@pytest.mark.parametrize("name", [name for name in NAMES if not make_problem(name).stochastic])
def test_exact_problems_ignore_the_generator(name):
    problem = make_problem(name)
    x = problem.starts()
    assert torch.equal(problem.losses(x, seeded(1)), problem.losses(x))
    assert torch.equal(problem.jacobian(x, seeded(1))[1], problem.jacobian(x)[1])


@pytest.mark.parametrize("name", KNOWN_SET)
def test_the_front_is_the_image_of_the_set(name):
    problem = make_problem(name)
    points = problem.pareto_set(30)
    assert_close(problem.losses(points), problem.pareto_front(30), atol=1e-20, rtol=1e-12)
    assert_close(problem.project(points), points)


@pytest.mark.parametrize("name", KNOWN_FRONT)
def test_points_of_the_front_do_not_dominate_each_other(name):
    front = make_problem(name).pareto_front(200)
    assert non_dominated(front).all()


@pytest.mark.parametrize("name", KNOWN_FRONT)
def test_random_search_finds_nothing_below_the_front(name):
    problem = make_problem(name)
    few = name in {"bowls_64", "multitask"}
    front = problem.pareto_front(60) / problem.units
    generator = seeded(6)
    tries = [problem.sample_starts(500 if few else 10_000, generator)]
    nearby = problem.pareto_set(500)
    if nearby is not None:
        for size in (1e-3, 1e-2, 1e-1, 1.0):
            around = nearby[torch.randint(len(nearby), (100 if few else 3000,), generator=generator)]
            tries.append(around + size * torch.randn(around.shape, generator=generator, dtype=torch.float64))
            one = torch.randint(problem.dim, (len(around), 1), generator=generator)  # and along single axes
            tries.append(around.scatter_add(1, one, size * torch.randn(one.shape, generator=generator).double()))
    losses = problem.losses(problem.project(torch.cat(tries))) / problem.units
    gain = torch.stack([(point - losses).amin(1).amax() for point in front])
    assert gain.max() <= 1e-9


@pytest.mark.parametrize("name", KNOWN_SET)
def test_points_of_the_set_are_stationary(name):
    problem = make_problem(name)
    _, rows = problem.jacobian(problem.pareto_set(25))
    usual = float(problem.jacobian(problem.starts())[1].norm(dim=2).max())
    for jacobian in rows:
        found = stationarity(jacobian)
        assert found.relative < 1e-8 or found.absolute < 1e-12 * usual


@pytest.mark.parametrize("name", KNOWN_FRONT)
def test_the_distance_is_zero_on_the_front_and_positive_off_it(name):
    problem = make_problem(name)
    front = problem.pareto_front(333)
    assert problem.distance_to_front(front).max() < 1e-6
    losses = problem.losses(problem.starts())
    assert (problem.distance_to_front(losses) >= 0).all()
    moved = front + 0.1 * problem.units
    distance = problem.distance_to_front(moved)
    assert (distance > 0.02).all()
    assert_close(problem.distance_to_front(moved[None, None]), distance[None, None])
    assert_close(problem.distance_to_front(moved[0]), distance[0])


@pytest.mark.parametrize("name", [name for name in KNOWN_FRONT if "bowls" not in name])
def test_the_distance_is_that_to_the_nearest_of_many_samples(name):
    problem = make_problem(name)
    front = problem.pareto_front(40_000) / problem.units
    around = front[torch.randint(len(front), (20,), generator=seeded(7))]
    near = around + 0.05 * torch.rand(around.shape, generator=seeded(8), dtype=torch.float64)
    losses = torch.cat([near * problem.units, problem.losses(problem.starts())])
    brute = torch.cdist(losses / problem.units, front).amin(1)
    # Samples that are h apart are too far by h²/(2 distance) at most, and by h/2 beside the front.
    assert (problem.distance_to_front(losses) <= brute + 1e-6).all()
    assert_close(problem.distance_to_front(losses), brute, rtol=1e-3, atol=5e-3 if problem.num_objectives > 2 else 1e-4)


@pytest.mark.parametrize("name", TWO_SIDED)
def test_the_hypervolume_lies_between_two_staircases(name):
    problem = make_problem(name)
    reference = problem.reference_point.numpy()
    front = problem.pareto_front(20_001).numpy()
    front = front[np.argsort(front[:, 0])]
    corners = np.stack([front[:-1, 0], front[1:, 1]], axis=1)  # every curve between two points lies above their corner
    corners = np.concatenate([corners, [[front[-1, 0], front[-1, 1]]]])
    below, above = (moocore.hypervolume(points, ref=reference) for points in (front, corners))
    assert below <= problem.true_hypervolume <= above
    assert above / below < 1 + 1e-3


@pytest.mark.parametrize("name", [name for name in KNOWN_FRONT if make_problem(name).true_hypervolume is not None])
def test_the_reference_point_is_above_the_front(name):
    problem = make_problem(name)
    assert (problem.pareto_front(100) <= problem.reference_point + 1e-12).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_window_of_a_picture_shows_the_front_and_fits_the_problem(name):
    problem = make_problem(name)
    window = problem.plot_window
    if window is None:
        assert problem.num_objectives > 3
        return
    assert (window.x is not None) == (problem.dim == 2)
    assert len(window.losses) in (2, 3)
    sides = window.losses + (window.x or ())
    assert all(low < high for low, high in sides)
    front = problem.pareto_front(50)
    if front is not None and not window.log and problem.name != "specialists":
        for axis, (low, high) in enumerate(window.losses):
            assert low <= front[:, axis].min()
            assert front[:, axis].max() <= high
    if window.x is not None:
        for axis, (low, high) in enumerate(window.x):
            assert low <= problem.starts()[:, axis].min()
            assert problem.starts()[:, axis].max() <= high
