"""The bandit, against enumeration, averages of mini-batches, and the diagnostic that it was made for."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mogb.metrics import harmony
from mogb.problems import make_problem
from mogb.problems.base import seeded
from mogb.problems.specialists import Specialists, _rewards
from mogb.solvers.min_norm import solve_min_norm


def weighted_sum(jacobian):
    return jacobian.mean(0)


def min_norm(jacobian):
    units = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
    return solve_min_norm(units @ units.T).weights @ units


def diagnostic(method, batches=200, seed=1):
    """In-sample and held-out harmony of a method at the uniform policy."""
    problem = make_problem("specialists")
    x, generator = problem.starts()[:1], seeded(seed)
    exact = problem.jacobian(x)[1].numpy()
    rows = np.concatenate([problem.jacobian(x, generator)[1].numpy() for _ in range(batches)])
    directions = np.stack([method(jacobian) for jacobian in rows])
    return harmony(directions, rows), harmony(directions, np.repeat(exact, batches, axis=0))


def test_most_contexts_pay_one_reward_only():
    pays = (_rewards(make_problem("specialists")) > 0).any(2)
    owners = pays.sum(0)
    assert (owners == 1).float().mean() == 0.95
    assert (owners == 4).float().mean() == pytest.approx(0.05)


def test_the_losses_are_expectations_over_contexts_and_actions():
    problem = Specialists(contexts=6, actions=3, objectives=2, groups=4, group_size=2, shared=0.2)
    x, rewards = problem.starts()[1], _rewards(problem).tolist()
    theta, habit = x[:18].reshape(6, 3).tolist(), x[18:].tolist()
    expected = [0.0, 0.0]
    for c in range(6):
        weights = [math.exp(math.sqrt(0.8) * theta[c][a] + math.sqrt(0.2) * habit[a]) for a in range(3)]
        for a in range(3):
            for k in range(2):
                expected[k] -= weights[a] / sum(weights) * rewards[k][c][a] / 6
    assert_close(problem.losses(x), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("start", [0, 1])
def test_mini_batches_are_unbiased(start):
    problem = make_problem("specialists")
    count = 4000
    x = problem.starts()[start : start + 1]
    losses, rows = problem.jacobian(x.expand(count, -1), seeded(5))
    exact_losses, exact = problem.jacobian(x)
    for estimates, truth in ((losses, exact_losses), (rows.flatten(1), exact.flatten(1))):
        error = (estimates.mean(0) - truth[0]) / (estimates.std(0) / math.sqrt(count))
        assert error.abs().max() < 5  # of 660 numbers, the largest is near 3
    assert float(error.square().mean()) == pytest.approx(1.0, abs=0.25)  # of the gradients


def test_all_rewards_reach_their_best_value_together():
    problem = make_problem("specialists")
    best = _rewards(problem).sum(0).argmax(1)  # the rewards that pay in a context agree on its best action
    x = torch.zeros(1, problem.dim, dtype=torch.float64)
    x[0, : -problem.actions].reshape(problem.contexts, problem.actions).scatter_(1, best[:, None], 60.0)
    assert_close(problem.losses(x), problem.pareto_front(1), rtol=1e-9, atol=0)
    assert problem.distance_to_front(problem.losses(x)).max() < 1e-9
    assert _rewards(problem).amax(2).mean(1).tolist() == pytest.approx(problem.units.tolist())


def test_the_weighted_sum_conflicts_in_most_mini_batches_and_min_norm_in_none():
    plain, plain_held_out = diagnostic(weighted_sum)
    balanced, balanced_held_out = diagnostic(min_norm)
    assert plain.conflict_rate > 0.5
    assert plain.minimum < 0
    assert balanced.conflict_rate == 0.0
    assert balanced.minimum > 0.4
    assert balanced.variance < 0.05 * plain.variance
    # The evidence: against exact gradients.
    assert plain_held_out.conflict_rate > 0.9
    assert balanced_held_out.conflict_rate < 0.3
    assert balanced_held_out.minimum > 0 > plain_held_out.minimum


def test_exact_gradients_conflict_because_habits_are_shared():
    _, rows = make_problem("specialists").jacobian(torch.zeros(1, 164, dtype=torch.float64))
    table = torch.nn.functional.cosine_similarity(rows[0, :, None], rows[0, None], dim=2)
    assert (table < -0.05).any()
    _, apart = make_problem("specialists", coupling=0.0, shared=0.0).jacobian(torch.zeros(1, 164, dtype=torch.float64))
    table = torch.nn.functional.cosine_similarity(apart[0, :, None], apart[0, None], dim=2)
    assert_close(table, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "group_size must be at least 2, but got 1"),
        ({"coupling": 1.0}, "coupling must be below 1"),
        ({"habit": 1.5}, "habit must be between 0 and 1, but got 1.5"),
        ({"contexts": 3}, "contexts must"),
        ({"spread": 0.5}, "spread must be a finite number of at least 1, but got 0.5"),
        ({"noise": -1.0}, "noise must be a finite number of at least 0, but got -1.0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Specialists(**options)
