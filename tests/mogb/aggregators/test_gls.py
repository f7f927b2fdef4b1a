import pytest
import torch
from torch.testing import assert_close

from mogb.aggregators.gls import GLS


def test_the_weights_are_the_derivatives_of_the_geometric_mean():
    losses = torch.tensor([2.0, 0.5, 1.25, 7.0], dtype=torch.float64, requires_grad=True)
    value = losses.prod() ** 0.25
    value.backward()
    solution = GLS().solve(losses=losses)
    assert_close(torch.from_numpy(solution.weights), losses.grad)
    assert solution.value == pytest.approx(value.item())


def test_a_thousand_losses_neither_overflow_nor_vanish():
    losses = torch.cat([torch.full((500,), 1e-3), torch.full((500,), 1e5)]).double()  # their product is 1e1000
    solution = GLS().solve(losses=losses)
    assert solution.value == pytest.approx(10.0)
    assert_close(solution.weights @ losses.numpy(), 10.0)  # Euler: f is homogeneous of degree 1


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_losses_that_are_not_positive_are_named_with_a_remedy(bad):
    with pytest.raises(
        ValueError, match=r"'gls' needs losses above 0, but the loss of objective 1 is .*Add a constant"
    ):
        GLS().weights(losses=torch.tensor([1.0, bad, -3.0]))


def test_a_preference_weighs_the_logarithms():
    losses = torch.tensor([2.0, 0.5], dtype=torch.float64, requires_grad=True)
    value = torch.exp((torch.tensor([0.75, 0.25]).double() * losses.log()).sum())
    (expected,) = torch.autograd.grad(value, losses)
    solution = GLS(preference=[3.0, 1.0]).solve(losses=losses.detach())
    torch.testing.assert_close(torch.from_numpy(solution.weights), expected)
    assert solution.value == pytest.approx(value.item())


def test_an_equal_preference_changes_nothing():
    losses = torch.tensor([2.0, 0.5, 7.0], dtype=torch.float64)
    equal = GLS(preference=[2.0, 2.0, 2.0]).weights(losses=losses)
    torch.testing.assert_close(equal, GLS().weights(losses=losses))


def test_impossible_preferences_are_refused():
    with pytest.raises(ValueError, match="non-negative"):
        GLS(preference=[1.0, -1.0])
    with pytest.raises(ValueError, match="one number per objective, 3, but has 2"):
        GLS(preference=[1.0, 1.0]).weights(losses=torch.ones(3))
