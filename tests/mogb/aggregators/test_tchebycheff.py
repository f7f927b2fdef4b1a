import pytest
import torch
from torch.testing import assert_close

from mogb.aggregators.tchebycheff import Tchebycheff


def test_the_weights_are_the_derivatives_of_the_weighted_maximum():
    losses = torch.tensor([2.0, 0.5, 1.25], dtype=torch.float64, requires_grad=True)
    preference, ideal = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64), torch.tensor([0.0, 0.1, -1.0])
    value = (preference * (losses - ideal)).max()
    value.backward()
    method = Tchebycheff(preference=[1.0, 6.0, 3.0], ideal=[0.0, 0.1, -1.0])
    solution = method.solve(losses=losses)
    assert_close(torch.from_numpy(solution.weights), losses.grad)
    assert solution.value == pytest.approx(value.item())


def test_it_is_the_weighted_maximum_not_the_loss_there():
    # The case that a known library gets wrong: the largest weighted loss is the second one, the largest loss the first.
    assert Tchebycheff(preference=[0.1, 0.9]).solve(losses=torch.tensor([4.0, 2.0]).double()).value == pytest.approx(
        1.8
    )


def test_equal_worst_objectives_share():
    assert_close(Tchebycheff().weights(losses=torch.tensor([2.0, 2.0, 1.0])), torch.tensor([1 / 6, 1 / 6, 0.0]))


def test_losses_may_be_negative():
    assert_close(Tchebycheff().weights(losses=torch.tensor([-2.0, -1.0])), torch.tensor([0.0, 0.5]))


@pytest.mark.usefixtures("unchecked")  # for speed
def test_subgradient_steps_find_a_point_inside_a_concave_front():
    # Fonseca's front in two variables is concave: weighted sums end at its tips. Here both weighted losses meet.
    x = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    method = Tchebycheff(preference=[1.0, 2.0])
    for step in range(1000):
        distance = torch.stack([(x - 0.5**0.5).square().sum(), (x + 0.5**0.5).square().sum()])
        losses = 1 - (-distance).exp()
        (grad,) = torch.autograd.grad((method.weights(losses=losses) * losses).sum(), x)
        with torch.no_grad():
            x -= grad / (step + 10) ** 0.7
    assert_close(losses[0], 2 * losses[1], atol=0.03, rtol=0)
    assert_close(x[0], x[1], atol=0.03, rtol=0)  # the Pareto set is the diagonal


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preference": [1.0, -1.0]}, "preference must hold non-negative"),
        ({"preference": [0.0, 0.0]}, "not all zero"),
        ({"ideal": [float("nan")]}, "ideal must hold finite numbers"),
        ({"ideal": []}, "ideal must hold finite numbers"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Tchebycheff(**options)


@pytest.mark.parametrize("option", ["preference", "ideal"])
def test_vectors_for_another_number_of_objectives_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} must have one number per objective, 2, but has 3"):
        Tchebycheff(**{option: [1.0, 1.0, 1.0]}).weights(losses=torch.ones(2))
