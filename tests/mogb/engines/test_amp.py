"""Autocast and gradient scalers: what the method sees is unscaled, what the scaler sees is scaled."""

import pytest
import torch
from engine_models import batch, flat_grad, losses_of, residual
from torch.testing import assert_close

import mogb

SCALE = 2.0**10


def scaler(scale=SCALE, interval=2000):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval)


def method(name):
    made = mogb.make(name)
    made.parameters()  # for an optimizer
    return made


def poison(net):
    """Zero, with a slope of float32's largest number: finite as it is, infinite once it is scaled."""
    shift = net[0].bias.sum() - net[0].bias.sum().detach()
    return shift * 3e38


@pytest.mark.parametrize("name", mogb.registered())
def test_the_scale_leaves_no_trace(name):
    """A power of two changes no digit, so that scaling is exact: also for methods that are not linear in the scale."""
    net = residual(depth=1)
    mogb.backward(losses_of(net, *batch()), net, method(name))
    expected = flat_grad(net.parameters())
    optimizer, scale = torch.optim.SGD(net.parameters(), lr=0.1), scaler()
    optimizer.zero_grad()
    report = mogb.backward(losses_of(net, *batch()), net, method(name), scaler=scale)
    assert_close(flat_grad(net.parameters()), SCALE * expected, rtol=1e-9, atol=1e-9)
    scale.unscale_(optimizer)
    assert_close(flat_grad(net.parameters()), expected, rtol=1e-9, atol=1e-12)
    assert not report.skipped


@pytest.mark.parametrize("engine", ["sequential", "batched", "streaming"])
def test_every_engine_reports_the_unscaled_gramian(engine):
    net = residual()
    expected = mogb.backward(losses_of(net, *batch()), net, mogb.make("nash_mtl"), engine=engine)
    gradient = flat_grad(net.parameters())
    net.zero_grad()
    report = mogb.backward(losses_of(net, *batch()), net, mogb.make("nash_mtl"), engine=engine, scaler=scaler())
    assert_close(report.gramian, expected.gramian, rtol=1e-12, atol=0)
    assert_close(report.cosines, expected.cosines)
    assert_close(flat_grad(net.parameters()) / SCALE, gradient)


def test_a_scaler_that_is_switched_off_changes_nothing():
    net = residual(depth=1)
    mogb.backward(losses_of(net, *batch()), net, mogb.make("mgda"))
    expected = flat_grad(net.parameters())
    net.zero_grad()
    mogb.backward(losses_of(net, *batch()), net, mogb.make("mgda"), scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert torch.equal(flat_grad(net.parameters()), expected)


def test_what_is_no_scaler_is_refused():
    net = residual(depth=1)
    with pytest.raises(TypeError, match="GradScaler"):
        mogb.backward(losses_of(net, *batch()), net, mogb.make("mgda"), scaler=1024.0)


class TestSkippedSteps:
    @pytest.mark.parametrize("name", ["marble", "uw", "graddrop", "rlw", "famo"])
    @pytest.mark.parametrize("micro", [False, True])
    def test_an_overflow_skips_the_step_and_leaves_the_method_as_it_was(self, name, micro):
        net = residual(depth=1, dtype=torch.float32)
        optimizer, scale = torch.optim.SGD(net.parameters(), lr=0.01), scaler()
        data = batch(dtype=torch.float32)
        balancer = mogb.Balancer(method(name), net)
        balancer.backward(losses_of(net, *data), scaler=scale)
        balancer.update(losses_of(net, *data))
        scale.step(optimizer)
        scale.update()
        state = balancer.state_dict()
        before = [param.detach().clone() for param in net.parameters()]
        optimizer.zero_grad()
        if micro:
            balancer.accumulate(losses_of(net, *data), scaler=scale)
        report = balancer.backward(losses_of(net, *data) + poison(net), scaler=scale)
        scale.step(optimizer)
        scale.update()
        assert report.skipped
        assert report.weights is None
        assert "overflowed at the scale 1024" in report.note
        assert scale.get_scale() == SCALE / 2
        assert balancer.step == 1
        assert_close([param.detach() for param in net.parameters()], before, rtol=0, atol=0)
        after = balancer.state_dict()
        assert state.keys() == after.keys()
        assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(after[key])) for key in state)
        optimizer.zero_grad()
        assert not balancer.backward(losses_of(net, *data), scaler=scale).skipped
        assert balancer.step == 2

    def test_two_optimizers_skip_together(self):
        """Only one parameter overflows, but the weights of all of them are unknown then."""
        net = residual(depth=1, dtype=torch.float32)
        first, second = torch.optim.SGD(net[0].parameters(), lr=0.1), torch.optim.SGD(net[1:].parameters(), lr=0.1)
        before = [param.detach().clone() for param in net.parameters()]
        scale = scaler()
        mogb.backward(losses_of(net, *batch(dtype=torch.float32)) + poison(net), net, mogb.make("mgda"), scaler=scale)
        scale.step(first)
        scale.step(second)
        scale.update()
        assert_close([param.detach() for param in net.parameters()], before, rtol=0, atol=0)
        assert scale.get_scale() == SCALE / 2

    def test_a_refresh_that_was_skipped_is_made_up_for(self):
        net = residual(depth=1, dtype=torch.float32)
        data, scale = batch(dtype=torch.float32), scaler()
        balancer = mogb.Balancer(mogb.make("mgda"), net, refresh_every=3)
        assert balancer.backward(losses_of(net, *data) + poison(net), scaler=scale).skipped
        assert balancer.backward(losses_of(net, *data), scaler=scale).refreshed
        assert balancer.backward(losses_of(net, *data) + poison(net), scaler=scale).skipped
        assert not balancer.backward(losses_of(net, *data), scaler=scale).refreshed
        assert balancer.step == 2

    def test_a_bad_loss_is_an_error_with_a_scaler_too(self):
        net = residual(depth=1)
        losses = losses_of(net, *batch()) * torch.tensor([1.0, float("nan"), 1.0])
        with pytest.raises(mogb.NonFiniteError, match="loss of objective 1"):
            mogb.backward(losses, net, mogb.make("mgda"), scaler=scaler())


def test_micro_batches_of_different_scales_are_refused():
    net = residual(depth=1)
    balancer = mogb.Balancer(mogb.make("mgda"), net)
    balancer.accumulate(losses_of(net, *batch()), scaler=scaler())
    with pytest.raises(ValueError, match=r"changed from 1024\.0 to 2048\.0"):
        balancer.accumulate(losses_of(net, *batch()), scaler=scaler(2 * SCALE))


def test_float16_gradients_that_would_underflow_survive():
    """The slope 1e-9 of a half-precision product is zero without a scale."""
    weight = torch.ones(4, requires_grad=True)

    def losses():
        with torch.autocast("cpu", torch.float16):
            out = torch.nn.functional.linear(torch.ones(1, 4), weight[None]).float()
        return [1e-9 * out.sum(), 2e-9 * out.sum()]

    agg = mogb.make("weighted_sum", weights=[1.0, 1.0])
    mogb.backward(losses(), [weight], mogb.make("pcgrad", order="index"))
    assert_close(weight.grad, torch.zeros(4))
    for aggregator in (agg, mogb.make("pcgrad", order="index")):
        weight.grad = None
        scale = scaler(2.0**16)
        mogb.backward(losses(), [weight], aggregator, scaler=scale)
        scale.unscale_(torch.optim.SGD([weight], lr=1.0))
        assert_close(weight.grad, torch.full((4,), 3e-9), rtol=1e-3, atol=0)


@pytest.mark.parametrize("engine", ["sequential", "batched", "streaming"])
def test_bfloat16_autocast_gives_the_gradients_of_autocast(engine):
    net = residual(depth=2, dtype=torch.float32)

    def losses():
        with torch.autocast("cpu", torch.bfloat16):
            return losses_of(net, *batch(dtype=torch.float32))

    plain = torch.autograd.grad(losses()[0], list(net.parameters()))
    mogb.backward(losses(), net, mogb.make("mgda"), engine=engine)  # one of the losses has by far the shortest gradient
    weights = mogb.backward(losses(), net, mogb.make("mgda"), engine=engine).weights
    assert all(param.grad.dtype == torch.float32 for param in net.parameters())
    net.zero_grad()
    one = mogb.make("weighted_sum", weights=[1.0, 0.0, 0.0])
    mogb.backward(losses(), net, one)
    assert_close(flat_grad(net.parameters()), torch.cat([grad.flatten() for grad in plain]))
    assert weights is not None


def test_per_sample_terms_with_a_scaler():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)).double()
    inputs, _ = batch(8)
    weights = torch.rand(4, 8, dtype=torch.float64)
    found = []
    for given in (None, scaler()):
        for rows in ("keep", "drop"):
            net.zero_grad()
            balancer = mogb.Balancer(mogb.make("nash_mtl"), net, engine="per_sample")
            terms = net(inputs)[:, 0].square()
            report = balancer.backward_terms(terms, weights, rows=rows, scaler=given)
            balancer.per_sample.detach()
            found.append((flat_grad(net.parameters()) / (SCALE if given else 1.0), report.gramian, report.losses))
    for other in found[1:]:
        assert_close(other, found[0], rtol=1e-9, atol=1e-12)
