"""Micro-batches: Jacobians add up, and are balanced once."""

import pytest
import torch
from engine_models import batch, flat_grad, losses_of, residual
from torch import nn
from torch.testing import assert_close

import mogb
from mogb.engines import choice


def method(name):
    made = mogb.make(name)
    made.parameters()  # for an optimizer
    return made


def micro_losses(net, part, size=6):
    """Means over the whole batch of the part's samples: they add up to the losses of the batch."""
    inputs, targets = batch(size)
    return losses_of(net, inputs[part], targets[part]) * len(inputs[part]) / size


PARTS = (slice(0, 1), slice(1, 4), slice(4, 6))  # of different sizes


@pytest.mark.parametrize("name", mogb.registered())
def test_micro_batches_equal_one_large_batch(name):
    check_micro_batches(name, torch.float64, 1e-9)


@pytest.mark.parametrize("name", ["weighted_sum", "mgda", "upgrad", "marble", "pcgrad", "graddrop"])
def test_micro_batches_equal_one_large_batch_in_float32(name):
    check_micro_batches(name, torch.float32, 1e-5)


def check_micro_batches(name, dtype, tolerance):
    net = residual(depth=1, dtype=dtype)
    inputs, targets = (tensor.to(dtype) for tensor in batch())
    expected = mogb.Balancer(method(name), net).backward(losses_of(net, inputs, targets))
    gradient = flat_grad(net.parameters())
    net.zero_grad()
    balancer = mogb.Balancer(method(name), net)
    for part in PARTS[:-1]:
        balancer.accumulate(losses_of(net, inputs[part], targets[part]) * len(inputs[part]) / 6)
    report = balancer.backward(losses_of(net, inputs[PARTS[-1]], targets[PARTS[-1]]) * 2 / 6)
    assert float((flat_grad(net.parameters()) - gradient).norm()) <= tolerance * float(gradient.norm())
    assert_close(report.losses, expected.losses, rtol=1e-6, atol=1e-6)
    assert balancer.step == 1


def test_finish_ends_a_step_without_a_last_batch():
    net = residual(depth=1)
    mogb.backward(losses_of(net, *batch()), net, mogb.make("upgrad"))
    expected = flat_grad(net.parameters())
    net.zero_grad()
    balancer = mogb.Balancer(mogb.make("upgrad"), net)
    for part in PARTS:
        balancer.accumulate(micro_losses(net, part))
        assert all(param.grad is None for param in net.parameters())
    report = balancer.finish()
    assert_close(flat_grad(net.parameters()), expected, rtol=1e-8, atol=1e-11)
    assert report.backward_passes == 9
    assert report.engine == "sequential"
    with pytest.raises(RuntimeError, match="nothing to finish"):
        balancer.finish()


def test_batched_rows_add_up_too():
    net = residual(depth=1)
    mogb.backward(losses_of(net, *batch()), net, mogb.make("upgrad"))
    expected = flat_grad(net.parameters())
    net.zero_grad()
    balancer = mogb.Balancer(mogb.make("upgrad"), net, engine="batched")
    for part in PARTS:
        balancer.accumulate(micro_losses(net, part))
    assert balancer.finish().backward_passes == 3
    assert_close(flat_grad(net.parameters()), expected, rtol=1e-8, atol=1e-11)


def test_heads_that_only_some_micro_batches_reach():
    """A parameter of one loss in one micro-batch, of another loss in the next, is shared by the step."""
    left, right, both = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def first():
        return [(left * both).sum(), both.square().sum()]

    def second():
        return [both.sum(), (right * both).sum() + (left * torch.tensor([1.0, 2.0])).sum()]

    balancer = mogb.Balancer(mogb.make("pcgrad", order="index"))
    balancer.accumulate(first())
    report = balancer.backward(second())
    # Rows over (both, left): (1+1, 1) and (2+1, (1, 2)): no conflict, so their sum; right belongs to the second alone.
    assert_close(both.grad, torch.full((2,), 5.0).double())
    assert_close(left.grad, torch.tensor([2.0, 3.0]).double())
    assert_close(right.grad, torch.ones(2).double())
    assert_close(report.gramian, torch.tensor([[10.0, 15.0], [15.0, 23.0]]).double())


@pytest.mark.parametrize("name", ["weighted_sum", "rlw"])
def test_methods_that_look_at_nothing_cost_one_pass_per_micro_batch(name):
    net = residual(depth=1)
    balancer = mogb.Balancer(mogb.make(name), net)
    for part in PARTS:
        balancer.accumulate(micro_losses(net, part))
    report = balancer.finish()
    assert (report.backward_passes, report.engine, report.refreshed) == (3, "weighted", True)


def test_between_refreshes_each_micro_batch_costs_one_pass():
    net = residual(depth=1)
    balancer = mogb.Balancer(mogb.make("mgda"), net, refresh_every=2)
    first = balancer.backward(losses_of(net, *batch()))
    net.zero_grad()
    for part in PARTS:
        balancer.accumulate(micro_losses(net, part))
    report = balancer.finish()
    assert (report.backward_passes, report.refreshed) == (3, False)
    expected = torch.autograd.grad(first.weights @ losses_of(net, *batch()), list(net.parameters()))
    assert_close(flat_grad(net.parameters()), torch.cat([grad.flatten() for grad in expected]))


class TestFailures:
    @pytest.mark.parametrize("name", ["marble", "rlw"])
    @pytest.mark.parametrize("bad", ["loss", "gradient"])
    def test_a_micro_batch_that_fails_drops_the_step_and_nothing_else(self, name, bad):
        net = residual(depth=1)
        balancer, twin = (mogb.Balancer(mogb.make(name), net) for _ in range(2))
        for each in (balancer, twin):
            each.backward(losses_of(net, *batch()))
        net.zero_grad()
        balancer.accumulate(micro_losses(net, PARTS[0]))
        losses = micro_losses(net, PARTS[1])
        poison = net[0].bias.sum() - net[0].bias.sum().detach()
        losses = losses * float("nan") if bad == "loss" else losses + poison.sqrt()  # infinite slope, value zero
        with pytest.raises(mogb.NonFiniteError):
            balancer.backward(losses)
        assert balancer.step == 1
        before, after = twin.state_dict(), balancer.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(torch.as_tensor(before[key]), torch.as_tensor(after[key])) for key in before)
        net.zero_grad()
        report = balancer.backward(losses_of(net, *batch()))
        assert report.backward_passes == (3 if name == "marble" else 1)  # the step begins anew, with nothing left over
        expected = flat_grad(net.parameters())
        net.zero_grad()
        twin.backward(losses_of(net, *batch()))
        assert torch.equal(flat_grad(net.parameters()), expected)

    def test_discard_drops_the_step(self):
        net = residual(depth=1)
        balancer = mogb.Balancer(mogb.make("rlw"), net)
        before = balancer.state_dict()
        balancer.accumulate(micro_losses(net, PARTS[0]))
        with pytest.raises(RuntimeError, match="under way"):
            balancer.state_dict()
        balancer.discard()
        after = balancer.state_dict()
        assert all(torch.equal(torch.as_tensor(before[key]), torch.as_tensor(after[key])) for key in before)

    def test_micro_batches_must_fit_together(self):
        net = residual(depth=1)
        balancer = mogb.Balancer(mogb.make("mgda"), net)
        balancer.accumulate(micro_losses(net, PARTS[0]))
        with pytest.raises(ValueError, match="has 2 objectives"):
            balancer.accumulate(micro_losses(net, PARTS[1])[:2])
        balancer.accumulate(micro_losses(net, PARTS[0]))
        hidden = net[0](batch()[0])
        with pytest.raises(ValueError, match=r"shared= does not go with micro-batches"):
            balancer.backward([hidden.sum(), hidden.square().sum()], shared=hidden)

    def test_streaming_is_refused(self):
        net = residual()
        balancer = mogb.Balancer(mogb.make("mgda"), net, engine="streaming")
        with pytest.raises(ValueError, match="keeps no rows"):
            balancer.accumulate(micro_losses(net, PARTS[0]))
        assert balancer.backward(losses_of(net, *batch())).engine == "streaming"


def test_rows_that_would_be_streamed_are_kept_for_micro_batches(monkeypatch):
    monkeypatch.setattr(choice, "memory", lambda device: 1)
    net = residual(depth=8, width=32)
    balancer = mogb.Balancer(mogb.make("mgda"), net)
    assert balancer.backward(losses_of(net, *batch())).engine == "streaming"
    balancer.accumulate(micro_losses(net, PARTS[0]))
    assert balancer.backward(micro_losses(net, PARTS[1])).engine == "sequential"


def test_per_sample_terms_accumulate():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    inputs, _ = batch(12)
    weights = torch.rand(3, 12, dtype=torch.float64)

    def terms(part):
        return net(inputs[part])[:, 0].square()

    mogb.backward(weights @ terms(slice(0, 12)), net, mogb.make("upgrad"))
    expected = flat_grad(net.parameters())
    net.zero_grad()
    balancer = mogb.Balancer(mogb.make("upgrad"), net, engine="per_sample")
    for start in (0, 4):
        balancer.accumulate_terms(terms(slice(start, start + 4)), weights[:, start : start + 4])
    report = balancer.backward_terms(terms(slice(8, 12)), weights[:, 8:])
    assert_close(flat_grad(net.parameters()), expected, rtol=1e-9, atol=1e-12)
    assert report.backward_passes == 4  # one each, and one for the self-check
