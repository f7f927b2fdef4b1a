"""What users have in their training loops, with a balanced backward pass in the middle."""

import pytest
import torch
from engine_models import batch, flat_grad, losses_of, residual, rows_by_hand
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import mogb

ENGINES = ("sequential", "streaming")


def test_clipping_comes_after_and_sees_the_direction():
    net = residual(depth=1)
    mogb.backward(losses_of(net, *batch()), net, mogb.make("upgrad"))
    direction = flat_grad(net.parameters())
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    assert_close(norm, direction.norm())
    assert_close(flat_grad(net.parameters()), 0.1 * direction / direction.norm(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_checkpointed_blocks_give_the_same_gradients(engine):
    net = residual(depth=3)
    mogb.backward(losses_of(net, *batch()), net, mogb.make("upgrad"), engine=engine)
    expected = flat_grad(net.parameters())
    net.zero_grad()

    def forward(x):
        for layer in net:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    report = mogb.backward(losses_of(forward, *batch()), net, mogb.make("upgrad"), engine=engine)
    assert report.engine == engine
    assert_close(flat_grad(net.parameters()), expected, rtol=0, atol=0)


def test_reentrant_checkpointing_is_an_error_of_torch_that_changes_nothing():
    net = residual(depth=1)
    inputs, targets = batch()
    hidden = checkpoint(net[1], net[0](inputs), use_reentrant=True)
    losses = (net[2](hidden) - targets).square().mean(dim=0)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        mogb.backward(losses, net, mogb.make("mgda"))
    assert all(param.grad is None for param in net.parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_compiled_module_gives_the_same_gradients(engine):
    net = residual(depth=1)
    compiled = torch.compile(net, backend="eager")
    mogb.backward(losses_of(net, *batch()), net, mogb.make("upgrad"), engine=engine)
    expected = flat_grad(net.parameters())
    net.zero_grad()
    mogb.backward(losses_of(compiled, *batch()), compiled, mogb.make("upgrad"), engine=engine)
    assert_close(flat_grad(net.parameters()), expected)


@pytest.mark.slow
def test_a_module_compiled_with_its_backward_pass_gives_the_same_gradients():
    net = residual(depth=1, dtype=torch.float32)
    data = batch(dtype=torch.float32)
    mogb.backward(losses_of(net, *data), net, mogb.make("upgrad"))
    expected = flat_grad(net.parameters())
    net.zero_grad()
    with torch._functorch.config.patch(donated_buffer=False):  # several passes need the buffers of the graph
        compiled = torch.compile(net, backend="aot_eager")
        mogb.backward(losses_of(compiled, *data), net, mogb.make("upgrad"))
    assert_close(flat_grad(net.parameters()), expected)


def test_tied_parameters_get_the_sum_of_their_uses():
    torch.manual_seed(0)
    table = nn.Embedding(7, 4).double()
    out = nn.Linear(4, 7, bias=False).double()
    out.weight = table.weight
    tokens = torch.tensor([1, 3, 5])

    def losses():
        logits = out(torch.tanh(table(tokens)))
        return [logits.square().mean(), (logits[:, :2] - 1).square().mean()]

    params = [table.weight]
    rows = rows_by_hand(losses(), params)
    net = nn.ModuleList([table, out])
    for engine in (*ENGINES, "batched"):
        net.zero_grad()
        report = mogb.backward(losses(), net, mogb.make("mgda"), engine=engine)
        assert_close(report.gramian, rows @ rows.T)
        assert_close(table.weight.grad.flatten(), mogb.make("mgda")(rows))


def test_frozen_layers_stay_without_gradient():
    net = residual(depth=2)
    net[1].requires_grad_(False)
    rows = rows_by_hand(losses_of(net, *batch()), [p for p in net.parameters() if p.requires_grad])
    for params in (net, None):
        net.zero_grad()
        report = mogb.backward(losses_of(net, *batch()), params, mogb.make("mgda"))
        assert all(param.grad is None for param in net[1].parameters())
        assert_close(report.gramian, rows @ rows.T)


def test_two_optimizers_share_one_backward_pass():
    net = residual(depth=2)
    twin = residual(depth=2)
    parts = torch.optim.SGD(net[:2].parameters(), lr=0.1), torch.optim.SGD(net[2:].parameters(), lr=0.1)
    whole = torch.optim.SGD(twin.parameters(), lr=0.1)
    for seed in range(3):
        for each, optimizers in ((net, parts), (twin, (whole,))):
            for optimizer in optimizers:
                optimizer.zero_grad()
            mogb.backward(losses_of(each, *batch(seed=seed)), each, mogb.make("cagrad"))
            for optimizer in optimizers:
                optimizer.step()
    assert_close(list(net.parameters()), list(twin.parameters()), rtol=0, atol=0)


def test_lora_alone_is_balanced_where_its_parameters_are_passed():
    net = residual(depth=1)
    torch.manual_seed(3)
    down, up = nn.Parameter(torch.randn(8, 2).double()), nn.Parameter(torch.randn(2, 3).double())
    inputs, targets = batch()
    hidden = net[1](net[0](inputs))
    losses = (net[2](hidden) + hidden @ down @ up - targets).square().mean(dim=0)
    rows = rows_by_hand(losses, [down, up])
    report = mogb.backward(losses, [down, up], mogb.make("mgda"))
    assert_close(report.gramian, rows @ rows.T)
    assert all(param.grad is None for param in net.parameters())


@pytest.mark.parametrize("name", ["weighted_sum", "mgda", "graddrop"])
def test_a_nan_gradient_of_a_finite_loss_is_named(name):
    """x log x at zero: the loss is zero by convention, its slope 0 * inf."""
    net = residual(depth=1)
    point = net[0].bias * 0
    losses = list(losses_of(net, *batch()))
    losses[1] = losses[1] + torch.where(point == 0, torch.zeros_like(point), point * point.log()).sum()
    assert bool(torch.isfinite(losses[1]))
    before = [param.grad for param in net.parameters()]
    with pytest.raises(mogb.NonFiniteError) as caught:
        mogb.backward(losses, net, mogb.make(name), retain_graph=name == "weighted_sum")
    assert caught.value.index == 1
    assert before == [None] * len(before)


@pytest.mark.parametrize("engine", [*ENGINES, "batched"])
def test_sparse_and_complex_gradients_are_refused(engine):
    table = nn.Embedding(5, 2, sparse=True)
    out = torch.tanh(table(torch.tensor([1, 2])) @ torch.ones(2, 1))
    with pytest.raises((TypeError, RuntimeError), match=r"(?i)sparse"):
        mogb.backward([out.sum(), out.square().sum()], table, mogb.make("mgda"), engine=engine)
    wave = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(TypeError, match="complex"):
        mogb.backward([wave.abs().sum(), wave.abs().square().sum()], None, mogb.make("mgda"), engine=engine)


def test_schedulers_and_optimizers_stay_the_users():
    net = residual(depth=1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    balancer = mogb.Balancer(mogb.make("upgrad"), net, refresh_every=3)
    first = last = losses_of(net, *batch()).detach()
    for _ in range(10):
        optimizer.zero_grad()
        report = balancer.backward(losses_of(net, *batch()))
        optimizer.step()
        scheduler.step()
        last = report.losses
    assert (last < first.double()).all()
