"""Balancing on a shared representation: K passes through the heads, one through the trunk."""

import pytest
import torch
from engine_models import batch, rows_by_hand
from torch import nn
from torch.testing import assert_close

import mogb


class Tasks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3)).double()
        self.passed = 0

    def count(self, _):
        self.passed += 1

    def losses(self, size=6):
        first = self.trunk[0](batch(size)[0])
        first.register_hook(self.count)
        hidden = self.trunk[1:](first)
        pairs = zip((1.0, 30.0, 0.1), self.heads, strict=True)
        return hidden, [s * (h(hidden.tanh()) - i).square().mean() for i, (s, h) in enumerate(pairs)]


@pytest.mark.parametrize("name", [name for name in mogb.registered() if mogb.make(name).reads != "losses"])
def test_the_cotangent_is_that_of_the_method_and_goes_through_the_trunk_once(name):
    tasks = Tasks()
    hidden, losses = tasks.losses()
    rows = rows_by_hand(losses, [hidden])
    cotangent = mogb.make(name)(rows, torch.stack([loss.detach() for loss in losses]))
    expected = torch.autograd.grad(hidden, list(tasks.trunk.parameters()), cotangent.view_as(hidden))
    heads = [
        torch.autograd.grad(loss, list(h.parameters()), retain_graph=True)
        for loss, h in zip(losses, tasks.heads, strict=True)
    ]
    hidden, losses = tasks.losses()
    tasks.passed = 0
    report = mogb.backward(losses, None, mogb.make(name), shared=hidden)
    assert_close([param.grad for param in tasks.trunk.parameters()], list(expected), rtol=1e-7, atol=1e-9)
    for head, grads in zip(tasks.heads, heads, strict=True):
        assert_close([param.grad for param in head.parameters()], list(grads))
    assert (report.engine, report.backward_passes, tasks.passed) == ("representation", 4, 1)
    if report.gramian is not None:
        assert_close(report.gramian, rows @ rows.T)


def test_methods_that_read_losses_cost_one_pass_and_give_the_same_with_and_without():
    tasks = Tasks()
    hidden, losses = tasks.losses()
    report = mogb.backward(losses, None, mogb.make("weighted_sum"), shared=hidden)
    found = [param.grad.clone() for param in tasks.parameters()]
    tasks.zero_grad()
    mogb.backward(tasks.losses()[1], None, mogb.make("weighted_sum"))
    assert_close(found, [param.grad for param in tasks.parameters()])
    assert report.backward_passes == 1


def test_several_tensors_are_one_representation():
    tasks = Tasks()
    inputs, _ = batch()

    def losses():
        hidden = tasks.trunk(inputs)
        left, right = hidden[:, :1].clone(), hidden[:, 1:].clone()
        joined = torch.cat([left, right], dim=1)
        return (left, right), [(head(joined) - i).square().mean() for i, head in enumerate(tasks.heads)]

    tensors, found = losses()
    rows = rows_by_hand(found, list(tensors))
    report = mogb.backward(found, tasks, mogb.make("mgda"), shared=tensors)
    assert_close(report.gramian, rows @ rows.T)


def test_with_parameters_only_those_get_a_gradient():
    tasks = Tasks()
    hidden, losses = tasks.losses()
    mogb.backward(
        losses, [*tasks.trunk[0].parameters(), *tasks.heads[1].parameters()], mogb.make("mgda"), shared=hidden
    )
    with_grad = {name for name, param in tasks.named_parameters() if param.grad is not None}
    assert with_grad == {"trunk.0.weight", "trunk.0.bias", "heads.1.weight", "heads.1.bias"}


def test_a_balancer_reuses_the_weights_in_one_pass():
    tasks = Tasks()
    balancer = mogb.Balancer(mogb.make("upgrad"), refresh_every=2)
    hidden, losses = tasks.losses()
    first = balancer.backward(losses, shared=hidden)
    tasks.zero_grad()
    hidden, losses = tasks.losses()
    second = balancer.backward(losses, shared=hidden)
    assert (first.backward_passes, second.backward_passes) == (4, 1)
    expected = torch.autograd.grad(
        sum(w * loss for w, loss in zip(first.weights, tasks.losses()[1], strict=True)), list(tasks.trunk.parameters())
    )
    assert_close([param.grad for param in tasks.trunk.parameters()], list(expected))


def test_a_scaler_leaves_no_trace():
    tasks = Tasks()
    hidden, losses = tasks.losses()
    expected = mogb.backward(losses, None, mogb.make("nash_mtl"), shared=hidden).gramian
    found = [param.grad.clone() for param in tasks.parameters()]
    tasks.zero_grad()
    hidden, losses = tasks.losses()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    report = mogb.backward(losses, None, mogb.make("nash_mtl"), shared=hidden, scaler=scaler)
    assert_close(report.gramian, expected)
    assert_close([param.grad / 64 for param in tasks.parameters()], found)


class TestRefusals:
    def test_a_loss_that_passes_by_the_representation(self):
        tasks = Tasks()
        hidden, losses = tasks.losses()
        aside = tasks.trunk[0](batch()[0]).mean()
        with pytest.raises(ValueError, match=r"losses\[1\] depends on parameters below shared in another way"):
            mogb.backward([losses[0], losses[1] + aside], None, mogb.make("mgda"), shared=hidden)

    def test_a_loss_that_does_not_depend_on_it(self):
        tasks = Tasks()
        hidden, losses = tasks.losses()
        other = torch.ones(2, requires_grad=True)
        with pytest.raises(ValueError, match=r"losses\['b'\] does not depend on shared"):
            mogb.backward({"a": losses[0], "b": other.sum()}, None, mogb.make("mgda"), shared=hidden)

    def test_parameters_above_it_that_several_losses_reach(self):
        tasks = Tasks()
        first = tasks.trunk[0](batch()[0])
        hidden = tasks.trunk[2](first.tanh())
        losses = [head(hidden).square().mean() for head in tasks.heads]
        with pytest.raises(ValueError, match="2 parameters above shared are reached by several losses"):
            mogb.backward(losses, None, mogb.make("mgda"), shared=first)

    def test_tensors_that_are_none(self, unchecked):
        tasks = Tasks()
        hidden, losses = tasks.losses()
        with pytest.raises(ValueError, match="leaf, or detached"):
            mogb.backward(losses, None, mogb.make("mgda"), shared=hidden.detach())
        with pytest.raises(ValueError, match="empty"):
            mogb.backward(losses, None, mogb.make("mgda"), shared=())
        with pytest.raises(TypeError, match="floating-point tensor"):
            mogb.backward(losses, None, mogb.make("mgda"), shared=[3])
        with pytest.raises(ValueError, match="depends on none of the parameters"):
            mogb.backward(losses, tasks.heads, mogb.make("mgda"), shared=hidden)
        with pytest.raises(ValueError, match="leave out engine= and groups="):
            mogb.backward(losses, None, mogb.make("mgda"), shared=hidden, engine="batched")
