"""The amortised loop: what is solved when, and that it resumes bit for bit."""

import pytest
import torch
from torch.testing import assert_close

import mogb
from mogb.engines.per_sample import PerSample


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


class TestCoefficients:
    def test_raw_puts_the_simplex_weights_on_the_raw_gradients(self):
        point, balancer = fresh("marble", refresh_every=2, coefficients="raw")
        other, twin = fresh("marble", refresh_every=2)
        first = balancer.backward(losses_at(point, 0))
        assert_close(first.weights, twin.backward(losses_at(other, 0)).weights)  # a full step is the same
        # At (1, -1): gradients (-2, -2) and (6, -12), of which the unit vectors have the min-norm weights 1/2, 1/2.
        point.grad = None
        report = balancer.backward(losses_at(point, 0))
        assert_close(report.weights, torch.tensor([0.5, 0.5], dtype=torch.float64))
        assert_close(point.grad, torch.tensor([2.0, -7.0], dtype=torch.float64))
        assert not report.refreshed
        again = twin.backward(losses_at(other, 0))
        assert_close(again.weights, first.weights)

    @pytest.mark.parametrize("coefficients", ["raw", "norm_corrected"])
    def test_they_do_not_matter_where_every_step_is_full(self, coefficients):
        point, balancer = fresh("marble", coefficients=coefficients)
        twin = point.detach().clone().requires_grad_()
        agg = mogb.make("marble")
        for step in range(3):
            point.grad = twin.grad = None
            balancer.backward(losses_at(point, step))
            mogb.backward(losses_at(twin, step), [twin], agg)
            assert_close(point.grad, twin.grad, rtol=0, atol=0)

    def test_methods_that_do_not_normalize_have_only_one_kind(self):
        point, balancer = fresh("cagrad", refresh_every=2, coefficients="raw")
        first = balancer.backward(losses_at(point, 0))
        assert_close(balancer.backward(losses_at(point, 0)).weights, first.weights, rtol=0, atol=0)

    def test_other_words_are_refused(self, unchecked):
        with pytest.raises(ValueError, match="'norm_corrected' or 'raw'"):
            fresh("mgda", coefficients="simplex")


class TestHooks:
    def test_forgetting_the_second_phase_is_an_error(self):
        point, balancer = fresh("famo")
        balancer.backward(losses_at(point, 0))
        with pytest.raises(RuntimeError, match="update"):
            balancer.backward(losses_at(point, 1))

    def test_the_second_phase_reaches_the_method(self):
        point, balancer = fresh("famo")
        agg = mogb.make("famo")
        for step in range(3):
            report = balancer.backward(losses_at(point, step))
            expected = agg.weights(losses=losses_at(point, step).detach())
            assert_close(report.weights, expected)
            after = losses_at(point * 0.9, step).detach()
            balancer.update({"a": after[0], "b": after[1]})
            agg.update(after)

    def test_forgetting_the_epochs_is_an_error_where_the_method_can_know(self):
        point, balancer = fresh("dwa")
        agg = mogb.make("dwa")
        for epoch in range(3):
            for step in range(2):
                report = balancer.backward(losses_at(point, step + epoch))
                assert_close(report.weights, agg.weights(losses=losses_at(point, step + epoch).detach()))
            balancer.end_epoch()
            agg.end_epoch()
        assert not torch.equal(report.weights, torch.ones(2, dtype=torch.float64))

    def test_forgetting_the_parameters_is_an_error(self):
        point = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
        balancer = mogb.Balancer(mogb.make("uw"), [point])
        balancer.backward(losses_at(point, 0))
        with pytest.raises(RuntimeError, match="parameters"):
            balancer.backward(losses_at(point, 1))
        balancer = mogb.Balancer(mogb.make("uw"), [point])
        (learned,) = balancer.parameters()
        balancer.backward(losses_at(point, 0))
        balancer.backward(losses_at(point, 1))
        assert learned.grad is not None

    def test_methods_without_phases_take_the_calls_and_do_nothing(self):
        point, balancer = fresh("mgda")
        balancer.backward(losses_at(point, 0))
        balancer.update(losses_at(point, 0))
        balancer.end_epoch()
        assert balancer.parameters() == ()


class TestTerms:
    def terms(self, net, seed):
        inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        return net(inputs)[:, 0].square()

    def run(self, balancer, net, steps):
        found = []
        for step in steps:
            net.zero_grad()
            weights = torch.rand(3, 6, generator=torch.Generator().manual_seed(step)) / 6
            report = balancer.backward_terms(self.terms(net, step), weights, names=["a", "b", "c"])
            found.append((report, torch.cat([param.grad.flatten() for param in net.parameters()])))
            with torch.no_grad():
                for param in net.parameters():
                    param -= 0.1 * param.grad
        return found

    def net(self):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))

    def test_terms_equal_losses_with_refreshes_in_between(self):
        net, twin = self.net(), self.net()
        balancer = mogb.Balancer(mogb.make("marble"), net, engine="per_sample", refresh_every=3)
        other = mogb.Balancer(mogb.make("marble"), twin, refresh_every=3)
        for step, (report, gradient) in enumerate(self.run(balancer, net, range(7))):
            twin.zero_grad()
            weights = torch.rand(3, 6, generator=torch.Generator().manual_seed(step)) / 6
            expected = other.backward(weights @ self.terms(twin, step))
            assert_close(gradient, torch.cat([p.grad.flatten() for p in twin.parameters()]), rtol=1e-4, atol=1e-6)
            assert_close(report.weights, expected.weights, rtol=1e-4, atol=1e-6)
            assert report.refreshed == expected.refreshed == (step % 3 == 0)
            assert report.names == ("a", "b", "c")
            assert report.engine == ("per_sample" if report.refreshed else "weighted")
            assert report.backward_passes == (2 if step == 0 else 1)  # the first one checks itself
            with torch.no_grad():
                for param in twin.parameters():
                    param -= 0.1 * param.grad

    def test_a_resumed_run_equals_the_uninterrupted_one(self):
        net = self.net()
        balancer = mogb.Balancer(mogb.make("marble"), net, engine="per_sample", refresh_every=3)
        self.run(balancer, net, range(4))
        twin = self.net()
        twin.load_state_dict(net.state_dict())
        other = mogb.Balancer(mogb.make("marble"), twin, engine="per_sample", refresh_every=3)
        other.load_state_dict(balancer.state_dict())
        last = self.run(balancer, net, range(4, 8))[-1][1]
        assert torch.equal(self.run(other, twin, range(4, 8))[-1][1], last)

    def test_the_engine_must_fit_the_call(self, unchecked):
        net = self.net()
        with pytest.raises(ValueError, match="no per-sample engine"):
            mogb.Balancer(mogb.make("mgda"), net).backward_terms(self.terms(net, 0), torch.rand(3, 6))
        with pytest.raises(ValueError, match="taps the layers of a module"):
            mogb.Balancer(mogb.make("mgda"), list(net.parameters()), engine="per_sample")
        engine = PerSample(net).attach()
        assert mogb.Balancer(mogb.make("mgda"), net, engine=engine).per_sample is engine


def test_a_state_that_cannot_be_taken_over_changes_nothing():
    weight = torch.zeros(2, requires_grad=True)
    balancer = mogb.Balancer(mogb.make("marble"), [weight], refresh_every=3)
    balancer.backward(torch.stack([(weight - 1).square().sum(), (weight + 2).square().sum()]))
    before = balancer.state_dict()
    other = mogb.Balancer(mogb.make("marble"), [weight], refresh_every=3).state_dict()
    with pytest.raises(ValueError, match="invalid literal"):
        balancer.load_state_dict(other | {"step": "rubbish"})
    after = balancer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(torch.as_tensor(after[key]), torch.as_tensor(before[key])) for key in before)
