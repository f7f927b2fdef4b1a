"""Two and four gloo processes against one process on the concatenated batch."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from processes import launch
from torch import nn
from torch.testing import assert_close

import mogb

FAST = ("weighted_sum", "mgda", "pcgrad", "nash_mtl", "marble")
SIZES = (3, 5, 2, 6)  # samples of each rank; their mean is no mean of means
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(world):
    generator = torch.Generator().manual_seed(1)
    size = sum(SIZES[:world])
    return torch.randn(size, 4, generator=generator), torch.randn(size, 3, generator=generator)


def losses_of(net, inputs, targets):
    scale = torch.tensor([1.0, 30.0, 0.1])
    return scale * (net(inputs) - targets).square().mean(dim=0)


def flat_grad(net):
    grads = [param.grad for param in net.parameters()]
    return torch.cat([(grad.full_tensor() if hasattr(grad, "full_tensor") else grad).flatten() for grad in grads])


def alone(name, world, steps=2):
    net, aggregator = model(), mogb.make(name)
    inputs, targets = batch(world)
    for _ in range(steps):
        net.zero_grad()
        report = mogb.backward(losses_of(net, inputs, targets), net, aggregator)
        descend(net)
    return flat_grad(net), report.weights


def descend(net):
    with torch.no_grad():
        for param in net.parameters():
            param -= 0.05 * param.grad


def mine(rank, world):
    inputs, targets = batch(world)
    start = sum(SIZES[:rank])
    return inputs[start : start + SIZES[rank]], targets[start : start + SIZES[rank]]


def wrapped(form):
    net = model()
    if form == "ddp":
        return nn.parallel.DistributedDataParallel(net)
    if form == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(net[0])
        fully_shard(net[2])
        fully_shard(net)
    return net


def train(rank, world, folder, form, names):
    found = {}
    for name in names:
        net, aggregator = wrapped(form), mogb.make(name)
        inputs, targets = mine(rank, world)
        for _ in range(2):
            net.zero_grad()
            report = mogb.backward(losses_of(net, inputs, targets), net, aggregator, num_samples=len(inputs))
            descend(net)
        found[name] = (flat_grad(net), report.weights)
    torch.save(found, folder / f"{rank}.pt")


def check_against_one_process(form, world, names):
    results = launch(world, train, form, names)
    for name in names:
        expected, _ = alone(name, world)
        for result in results:
            assert_close(result[name][0], expected, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
            assert torch.equal(result[name][1], results[0][name][1]), f"{name}: weights differ between ranks"


@pytest.mark.parametrize("form", ["plain", "ddp", "fsdp"])
def test_ranks_with_uneven_batches_equal_one_process(form):
    check_against_one_process(form, 2, FAST)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "world"), [("ddp", 2), ("fsdp", 2), ("ddp", 4), ("fsdp", 4)])
def test_every_gramian_method_equals_one_process(form, world):
    names = [name for name in mogb.registered() if mogb.make(name).reads == "gramian"]
    check_against_one_process(form, world, names)


def add_up(rank, world, folder):
    net = wrapped("ddp")
    inputs, targets = mine(rank, world)
    net.module[0].weight.grad = torch.ones_like(net.module[0].weight)
    mogb.backward(losses_of(net, inputs, targets), net, mogb.make("mgda"))
    first = flat_grad(net.module)
    losses_of(net, inputs, targets).sum().backward()  # DDP's own reduction still works afterwards
    torch.save((first, flat_grad(net.module)), folder / f"{rank}.pt")


def test_ddp_accumulates_and_its_own_backward_still_works():
    results = launch(2, add_up)
    for a, b in zip(results[0], results[1], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(results[0][0], results[0][1])


def expanded(rank, world, folder):
    net = model()
    scale = torch.nn.Parameter(torch.ones(3))
    inputs, targets = mine(rank, world)
    losses = torch.stack([*losses_of(net, inputs, targets), scale.sum() * (rank + 1)])  # its gradient has stride 0
    mogb.backward(losses, [*net.parameters(), scale], mogb.make("weighted_sum", weights=[1.0] * 4))
    torch.save(scale.grad.clone(), folder / f"{rank}.pt")


def test_expanded_gradients_are_averaged():
    for gradient in launch(2, expanded):
        assert_close(gradient, torch.full((3,), 1.5))


def switched_off_shards(rank, world, folder):
    net = wrapped("fsdp")
    try:
        mogb.backward(losses_of(net, *mine(rank, world)), net, mogb.make("mgda"), process_group=None)
    except ValueError as error:
        torch.save(str(error), folder / f"{rank}.pt")


def test_sharded_parameters_cannot_be_balanced_alone():
    for message in launch(2, switched_off_shards):
        assert "sharded over several" in message


def switched_off(rank, world, folder):
    net = model()
    inputs, targets = mine(rank, world)
    report = mogb.backward(losses_of(net, inputs, targets), net, mogb.make("mgda"), process_group=None)
    torch.save((flat_grad(net), report.gramian), folder / f"{rank}.pt")


def test_no_group_means_no_communication():
    results = launch(2, switched_off)
    for rank, (gradient, gramian) in enumerate(results):
        net = model()
        report = mogb.backward(losses_of(net, *mine(rank, 2)), net, mogb.make("mgda"))
        assert_close(gradient, flat_grad(net))
        assert_close(gramian, report.gramian)


def not_a_number(rank, world, folder):
    answers = []
    for form in ("ddp", "fsdp"):
        for name in ("mgda", "weighted_sum"):
            net = wrapped(form)
            inputs, targets = mine(rank, world)
            if rank == 1:
                targets[0, 2] = float("nan")
            try:
                mogb.backward(losses_of(net, inputs, targets), net, mogb.make(name))
            except mogb.NonFiniteError as error:
                answers.append(error.index)
            answers.append(-1 if next(net.parameters()).grad is None else 99)
    torch.save(torch.tensor(answers), folder / f"{rank}.pt")


def test_nan_on_one_rank_stops_all_ranks_and_names_the_objective():
    for answers in launch(2, not_a_number):
        assert answers.tolist() == [2, -1] * 4


def die(rank, world, folder):
    from datetime import timedelta

    group = dist.new_group(timeout=timedelta(seconds=3))
    net = model()
    inputs, targets = mine(rank, world)
    if rank == 1:
        os._exit(0)
    start = time.perf_counter()
    try:
        mogb.backward(losses_of(net, inputs, targets), net, mogb.make("mgda"), process_group=group)
    except mogb.DistributedError as error:
        torch.save((time.perf_counter() - start, str(error)), folder / "0.pt")
    os._exit(0)


def test_a_dead_rank_is_a_clear_error_within_the_timeout():
    (seconds, message), _ = launch(2, die)
    assert seconds < 10
    assert "another rank died" in message


@pytest.mark.parametrize("bad", [-1, float("nan")])
def test_impossible_sample_counts_are_refused(bad):
    net = model()
    with pytest.raises(ValueError, match="num_samples"):
        mogb.backward(losses_of(net, *batch(1)), net, mogb.make("mgda"), num_samples=bad)


def test_an_unknown_group_is_refused():
    net = model()
    with pytest.raises(ValueError, match="process_group"):
        mogb.backward(losses_of(net, *batch(1)), net, mogb.make("mgda"), process_group="world")
