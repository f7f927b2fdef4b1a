"""The learning protocol is tested in test_phases.py."""

import math

import pytest
import torch
from torch.testing import assert_close

import mogb
from mogb.aggregators.uw import UW


def test_weights_are_half_the_inverse_variances():
    weights = UW(init=[math.log(4.0), 0.0]).weights(losses=torch.tensor([1.0, 1.0]))
    assert_close(weights, torch.tensor([0.125, 0.5]))


@pytest.mark.usefixtures("unchecked")  # for speed
def test_training_a_model_equals_one_joint_descent():
    """Model and log variances by one optimizer on the joint objective, differentiated by autograd."""
    target = torch.tensor([[1.0, 0.0], [0.0, -2.0]], dtype=torch.float64)

    def losses_at(x):
        return (torch.tensor([1.0, 30.0]).double()[:, None] * (x - target).square()).sum(1)

    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    method = UW()
    optimizer = torch.optim.Adam([x, *method.parameters()], lr=0.01)
    joint, logs = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    other = torch.optim.Adam([joint, logs], lr=0.01)
    for _ in range(50):
        optimizer.zero_grad()
        mogb.backward(losses_at(x), [x], method)
        optimizer.step()
        other.zero_grad()
        (0.5 * (-logs).exp() * losses_at(joint) + 0.5 * logs).sum().backward()
        other.step()
    assert_close(x, joint, rtol=1e-10, atol=0)
    assert_close(method.parameters()[0], torch.nn.Parameter(logs.detach()), rtol=1e-10, atol=0)


def test_a_negative_loss_is_flagged():
    assert "loss 1 is below zero" in UW().solve(losses=torch.tensor([1.0, -1.0])).note


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("init", [float("nan"), [], [[1.0]], [1.0, float("inf")]])
def test_impossible_starts_are_refused(init):
    with pytest.raises(ValueError, match="init must be a"):
        UW(init=init)
