"""The learning protocol is tested in test_phases.py."""

import pytest
import torch
from torch.testing import assert_close

from mogb.aggregators.imtl_l import IMTLL
from mogb.aggregators.uw import UW


def test_it_starts_as_the_sum_of_the_losses():
    solution = IMTLL().solve(losses=torch.tensor([2.0, 0.5, 1.25]))
    assert solution.weights.tolist() == [1.0, 1.0, 1.0]
    assert solution.value == pytest.approx(3.75)


@pytest.mark.usefixtures("unchecked")  # for speed
def test_learned_scales_bring_every_loss_to_one():
    losses = torch.tensor([8.0, 3.0, 0.2], dtype=torch.float64)
    method = IMTLL()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    for _ in range(150):
        method.weights(losses=losses)
        optimizer.step()
    assert_close(method.weights(losses=losses) * losses, torch.ones(3).double(), rtol=1e-3, atol=0)


def test_it_is_twice_uncertainty_weighting_with_the_other_sign():
    losses, s = torch.tensor([2.0, 0.5], dtype=torch.float64), [0.3, -1.0]
    mine, twin = IMTLL(init=s), UW(init=[-value for value in s])
    first, second = mine.solve(losses=losses), twin.solve(losses=losses)
    assert_close(first.weights, 2 * second.weights)
    assert first.value == pytest.approx(2 * second.value)
    assert_close(mine.parameters()[0].grad, -2 * twin.parameters()[0].grad)


def test_a_negative_loss_is_flagged():
    assert "loss 0 is below zero" in IMTLL().solve(losses=torch.tensor([-1.0, 1.0])).note
