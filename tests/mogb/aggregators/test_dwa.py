"""Forgotten epochs are tested in test_phases.py, official answers in test_parity_losses.py."""

import math

import pytest
import torch
from torch.testing import assert_close

from mogb.aggregators.dwa import DWA


def epoch(method, *batches):
    found = [method.weights(losses=torch.tensor(batch, dtype=torch.float64)) for batch in batches]
    method.end_epoch()
    return found


def test_by_hand_over_four_epochs():
    method = DWA(temperature=1.0)
    for batches in ([[2.0, 2.0], [4.0, 2.0]], [[3.0, 1.0]]):  # means (3, 2), (3, 1)
        assert all(weights.tolist() == [1.0, 1.0] for weights in epoch(method, *batches))
    first, second = epoch(method, [9.0, 9.0], [1.0, 1.0])  # rates (1, 1/2): the present epoch plays no part
    expected = 2 / (1 + math.exp(-0.5))
    assert_close(first, torch.tensor([expected, 2 - expected], dtype=torch.float64))
    assert torch.equal(first, second)
    (third,) = epoch(method, [1.0, 1.0])  # means (3, 1) and (5, 5): rates (5/3, 5)
    expected = 2 / (1 + math.exp(5 - 5 / 3))
    assert_close(third, torch.tensor([expected, 2 - expected], dtype=torch.float64))


def test_uniform_weights_are_noted():
    method = DWA()
    assert "two epochs" in method.solve(losses=torch.ones(2)).note
    epoch(method, [1.0, 1.0])
    epoch(method, [1.0, 1.0])
    assert method.solve(losses=torch.ones(2)).note == ""


def test_an_epoch_without_a_step_does_not_count():
    method = DWA()
    method.end_epoch()
    epoch(method, [2.0, 2.0])
    method.end_epoch()
    epoch(method, [1.0, 2.0])
    method.end_epoch()
    assert_close(
        method.weights(losses=torch.ones(2).double()), 2 * torch.softmax(torch.tensor([0.25, 0.5]).double(), 0)
    )


def test_windows_compare_the_last_steps_once_they_are_full():
    method = DWA(window=2, temperature=1.0)
    rows = [[1.0, 4.0], [3.0, 4.0], [1.0, 2.0], [1.0, 2.0], [5.0, 2.0]]
    found = [method.solve(losses=torch.tensor(row).double()) for row in rows]
    assert all(solution.weights.tolist() == [1.0, 1.0] for solution in found[:3])
    assert "two windows" in found[2].note
    for solution, rates in ((found[3], [1 / 2, 2 / 4]), (found[4], [3 / 2, 2 / 3])):
        assert_close(torch.from_numpy(solution.weights), 2 * torch.softmax(torch.tensor(rates).double(), 0))


def test_a_mean_loss_of_zero_below_the_line_counts_as_no_change():
    method = DWA(temperature=1.0)
    epoch(method, [0.0, 2.0])
    epoch(method, [1.0, 1.0])
    expected = 2 * torch.softmax(torch.tensor([1.0, 0.5]).double(), 0)
    assert_close(method.weights(losses=torch.ones(2).double()), expected)


def test_huge_rates_do_not_overflow():
    method = DWA(temperature=1e-3)
    epoch(method, [1e-300, 1.0])
    epoch(method, [1.0, 1.0])
    assert method.weights(losses=torch.ones(2).double()).tolist() == [2.0, 0.0]


def test_negative_losses_are_named():
    with pytest.raises(ValueError, match=r"'dwa' compares ratios of losses, but the loss of objective 1 is -0.5"):
        DWA().weights(losses=torch.tensor([1.0, -0.5]))


def test_another_number_of_objectives_is_refused():
    for method in (DWA(), DWA(window=2)):
        method.weights(losses=torch.ones(2))
        with pytest.raises(ValueError, match=r"2 objectives, but got 3. Call reset"):
            method.weights(losses=torch.ones(3))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"window": 0}, {"window": 2.5}, {"window": True}, {"max_epoch_steps": 0}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DWA(**options)
