"""The amortised loop: what is solved when, and that it resumes bit for bit."""

import pytest
import torch
from torch.testing import assert_close

import mogb


def losses_at(point, step):
    target = torch.tensor([[2.0, 0.0], [0.0, 1.0 + step]], dtype=torch.float64)
    return torch.stack([(point - target[0]).square().sum(), 3 * (point - target[1]).square().sum()])


def run(balancer, point, steps, start=0):
    weights = []
    for step in range(start, start + steps):
        point.grad = None
        report = balancer.backward(losses_at(point, step))
        weights.append(report.weights)
        with torch.no_grad():
            point -= 0.05 * point.grad
            balancer.aggregator.update(losses_at(point, step))
    return weights


def fresh(name="marble", **options):
    point = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    method = mogb.make(name)
    method.parameters()  # for an optimizer
    return point, mogb.Balancer(method, [point], **options)


def test_weights_are_solved_every_nth_step_and_kept_in_between():
    point, balancer = fresh(refresh_every=3)
    weights = run(balancer, point, 7)
    assert balancer.step == 7
    for step in (1, 2, 4, 5):
        assert_close(weights[step], weights[step - step % 3], rtol=0, atol=0)
    assert not torch.equal(weights[3], weights[0])


def test_the_steps_between_are_the_weighted_gradient_in_one_pass():
    point, balancer = fresh("mgda", refresh_every=5)
    first = balancer.backward(losses_at(point, 0))
    point.grad = None
    report = balancer.backward(losses_at(point, 1))
    expected = torch.autograd.grad(report.weights @ losses_at(point, 1), point)[0]
    assert_close(point.grad, expected)
    assert_close(report.weights, first.weights, rtol=0, atol=0)
    assert (first.backward_passes, report.backward_passes) == (2, 1)
    assert (first.refreshed, report.refreshed) == (True, False)


def test_refresh_every_one_is_backward_itself():
    point, balancer = fresh("marble")
    twin = point.detach().clone().requires_grad_()
    agg = mogb.make("marble")
    for step in range(4):
        point.grad = twin.grad = None
        balancer.backward(losses_at(point, step))
        mogb.backward(losses_at(twin, step), [twin], agg)
        assert_close(point.grad, twin.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in mogb.registered() if mogb.make(name).yields_weights])
@pytest.mark.parametrize("saved_at", [4, 5])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(name, saved_at):
    point, balancer = fresh(name, refresh_every=3)
    run(balancer, point, saved_at)
    again, other = fresh(name, refresh_every=3)
    with torch.no_grad():
        again.copy_(point)
    other.load_state_dict(balancer.state_dict())
    run(balancer, point, 6, start=saved_at)
    run(other, again, 6, start=saved_at)
    assert other.step == balancer.step == saved_at + 6
    assert torch.equal(point, again)


def test_a_failed_step_changes_nothing():
    point, balancer = fresh(refresh_every=2)
    balancer.backward(losses_at(point, 0))
    before = balancer.state_dict()
    gradient = point.grad.clone()
    with pytest.raises(mogb.NonFiniteError):
        balancer.backward(losses_at(point, 0) * float("nan"))
    assert torch.equal(point.grad, gradient)
    after = balancer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(torch.as_tensor(before[key]), torch.as_tensor(after[key])) for key in before)


def test_bad_options_and_states_are_refused(unchecked):
    point = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="refresh_every"):
        mogb.Balancer(mogb.make("mgda"), [point], refresh_every=0)
    with pytest.raises(ValueError, match="yields weights"):
        mogb.Balancer(mogb.make("graddrop"), [point], refresh_every=2)
    with pytest.raises(TypeError, match="aggregator"):
        mogb.Balancer("mgda", [point])
    balancer = mogb.Balancer(mogb.make("mgda"), [point])
    with pytest.raises(ValueError, match="no key 'step'"):
        balancer.load_state_dict({})
    with pytest.raises(ValueError, match="unknown keys what"):
        balancer.load_state_dict({"step": 1, "what": 2})


def test_the_number_of_objectives_may_not_change_between_refreshes():
    point, balancer = fresh("mgda", refresh_every=4)
    balancer.backward(losses_at(point, 0))
    with pytest.raises(ValueError, match="1 objectives, but the weights of the last refresh are for 2"):
        balancer.backward(losses_at(point, 0)[:1])
