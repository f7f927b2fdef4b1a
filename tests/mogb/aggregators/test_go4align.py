"""The official class cannot run; the truth here is brute force over all groupings, and the formula by hand."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from mogb.aggregators.go4align import GO4Align


def brute_force(values, num_groups):
    """The group means of the best of all assignments to groups, the smallest sum of squares."""
    best = None
    for labels in itertools.product(range(num_groups), repeat=len(values)):
        means = torch.zeros_like(values)
        for label in set(labels):
            inside = torch.tensor([one == label for one in labels])
            means[inside] = values[inside].mean()
        cost = float((values - means).square().sum())
        if best is None or cost < best[0] - 1e-12:
            best = cost, means
    return best[1]


@pytest.mark.usefixtures("unchecked")  # for speed
@pytest.mark.parametrize("num_groups", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_groups_are_the_best_of_all_groupings(num_groups, seed):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(5, generator=generator, dtype=torch.float64) * 3 + 0.05
    indicators = losses.sum() / losses / 5
    weights = GO4Align(num_groups=num_groups, step_size=0.0).weights(losses=losses)
    assert_close(weights, brute_force(indicators, num_groups))


def test_the_momentum_of_the_risks_by_hand():
    method = GO4Align(num_groups=2, step_size=0.1)
    past = torch.zeros(2, dtype=torch.float64)
    for losses in (torch.tensor([3.0, 1.0]).double(), torch.tensor([1.0, 2.0]).double()):
        past += losses
        shares = torch.softmax(-0.1 * past, 0)
        assert_close(method.weights(losses=losses), shares * losses.sum() / losses)  # two groups of one each


def test_many_losses_and_huge_spreads():
    losses = torch.logspace(-6, 6, 40, dtype=torch.float64)
    solution = GO4Align(num_groups=5).solve(losses=losses)
    groups = solution.details["groups"]
    assert set(groups.tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert all(len(set(solution.weights[groups == group].tolist())) == 1 for group in range(5))
    method = GO4Align(step_size=1.0)
    for _ in range(3):
        assert method.weights(losses=losses).isfinite().all()


def test_equal_losses_and_few_objectives():
    assert_close(GO4Align().weights(losses=torch.full((5,), 2.0)), torch.ones(5))
    assert_close(GO4Align(num_groups=7).weights(losses=torch.tensor([4.0])), torch.tensor([1.0]))


def test_losses_must_be_positive():
    with pytest.raises(ValueError, match="'go4align' needs losses above 0, but the loss of objective 0 is 0"):
        GO4Align().weights(losses=torch.tensor([0.0, 1.0]))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("options", [{"num_groups": 0}, {"num_groups": 1.5}, {"step_size": -1.0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GO4Align(**options)
