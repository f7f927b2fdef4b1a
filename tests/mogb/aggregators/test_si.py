import pytest
import torch
from torch.testing import assert_close

from mogb.aggregators.gls import GLS
from mogb.aggregators.si import SI


def test_the_weights_are_the_derivatives_of_the_sum_of_logarithms():
    losses = torch.tensor([2.0, 0.5, 1.25], dtype=torch.float64, requires_grad=True)
    value = losses.log().sum()
    value.backward()
    solution = SI().solve(losses=losses)
    assert_close(torch.from_numpy(solution.weights), losses.grad)
    assert solution.value == pytest.approx(value.item())


def test_the_step_does_not_see_the_scale_of_a_loss():
    jacobian, losses = torch.tensor([[1.0, 2.0], [-3.0, 1.0]]).double(), torch.tensor([0.3, 4.0]).double()
    scale = torch.tensor([1e-6, 1e4]).double()
    assert_close(SI()(scale[:, None] * jacobian, scale * losses), SI()(jacobian, losses))


def test_it_points_where_gls_does():
    losses = torch.tensor([0.3, 4.0, 1.0]).double()
    ratio = SI().weights(losses=losses) / GLS().weights(losses=losses)
    assert_close(ratio, ratio[0].expand(3))


def test_a_loss_of_zero_is_named():
    with pytest.raises(ValueError, match="objective 2 is 0"):
        SI().weights(losses=torch.tensor([1.0, 1.0, 0.0]))


def test_a_preference_weighs_the_logarithms():
    losses = torch.tensor([2.0, 0.5], dtype=torch.float64, requires_grad=True)
    value = (torch.tensor([1.5, 0.5]).double() * losses.log()).sum()
    (expected,) = torch.autograd.grad(value, losses)
    solution = SI(preference=[3.0, 1.0]).solve(losses=losses.detach())
    torch.testing.assert_close(torch.from_numpy(solution.weights), expected)
    assert solution.value == pytest.approx(value.item())


def test_an_equal_preference_changes_nothing():
    losses = torch.tensor([2.0, 0.5, 7.0], dtype=torch.float64)
    equal = SI(preference=[2.0, 2.0, 2.0]).weights(losses=losses)
    torch.testing.assert_close(equal, SI().weights(losses=losses))


def test_impossible_preferences_are_refused():
    with pytest.raises(ValueError, match="non-negative"):
        SI(preference=[1.0, -1.0])
    with pytest.raises(ValueError, match="one number per objective, 3, but has 2"):
        SI(preference=[1.0, 1.0]).weights(losses=torch.ones(3))
