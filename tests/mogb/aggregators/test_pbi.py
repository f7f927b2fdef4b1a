import pytest
import torch
from torch.testing import assert_close

from mogb.aggregators.pbi import PBI


def value_of(losses, *, theta, preference, ideal):
    ray = preference / preference.norm()
    point = losses - ideal
    along = ray @ point
    return along + theta * (point - along * ray).norm()


@pytest.mark.parametrize("theta", [0.0, 0.5, 5.0])
def test_the_weights_are_the_derivatives(theta):
    losses = torch.tensor([2.0, 0.5, 1.25], dtype=torch.float64, requires_grad=True)
    preference, ideal = (torch.tensor(v, dtype=torch.float64) for v in ([0.2, 0.3, 0.5], [0.1, -0.1, 0.0]))
    value = value_of(losses, theta=theta, preference=preference, ideal=ideal)
    value.backward()
    solution = PBI(theta=theta, preference=[0.2, 0.3, 0.5], ideal=[0.1, -0.1, 0.0]).solve(losses=losses)
    assert_close(torch.from_numpy(solution.weights), losses.grad)
    assert solution.value == pytest.approx(value.item())


def test_on_the_ray_only_the_distance_along_it_counts():
    for factor in (1e-8, 1.0, 1e8):
        losses = factor * torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
        weights = PBI(preference=[0.2, 0.3, 0.5]).weights(losses=losses)
        assert_close(weights, losses / losses.norm())
    assert_close(PBI().weights(losses=torch.tensor([3.0])), torch.tensor([1.0]))  # one objective is on it always


def test_off_the_ray_a_loss_may_be_driven_up():
    weights = PBI(theta=5.0).weights(losses=torch.tensor([3.0, 1.0]))
    assert weights[1] < 0 < weights[0]


def test_a_negative_penalty_is_refused():
    with pytest.raises(ValueError, match="theta must be at least 0"):
        PBI(theta=-1.0)
