"""Per-sample balancing in two gloo processes, against one process on the concatenated batch."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from processes import launch
from torch import nn
from torch.testing import assert_close

import mogb
from mogb.engines.per_sample import PerSample

SIZES = (3, 5)  # samples of the ranks
NAMES = ("mgda", "weighted_sum", "graddrop")
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


def step(net, samples, names, **options):
    """Gradients of three group losses; every coefficient is one over the size of the batch it is a mean over."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(sum(SIZES), 4, generator=generator)[samples]
    rewards = torch.rand(3, sum(SIZES), generator=generator)[:, samples]
    found = {}
    for name in names:
        net.zero_grad()
        with PerSample(net) as engine, getattr(net, "no_sync", contextlib.nullcontext)():
            terms = net(inputs).square().sum(1)
            report = engine.backward(terms, rewards / len(inputs), mogb.make(name), **options)
        grads = torch.cat([param.grad.flatten() for param in net.parameters()])
        found[name] = (grads, torch.zeros(3) if report.weights is None else report.weights, report.losses)
    return found


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def work(rank, world, folder, wrap):
    net = nn.parallel.DistributedDataParallel(model()) if wrap else model()
    mine = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    found = step(net, mine, NAMES, num_samples=SIZES[rank])
    with PerSample(net) as engine, pytest.raises(ValueError, match="needs one process"):
        engine.backward(net(torch.ones(2, 4)).sum(1), torch.eye(2), mogb.make("mgda"), rows="drop")
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.parametrize("wrap", [False, True])
def test_two_processes_equal_one_on_the_whole_batch(wrap):
    found = launch(len(SIZES), work, wrap)
    alone = step(model(), slice(None), NAMES)
    for name in NAMES:
        for rank in range(len(SIZES)):
            for ours, expected in zip(found[rank][name], alone[name], strict=True):
                assert_close(ours, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(found[0][name][1], found[1][name][1])


def work_in_shards(rank, world, folder):
    mine = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    found = {how: step(model(), mine, ("mgda",), num_samples=SIZES[rank], exchange=how) for how in ("rows", "shards")}
    net = model()
    with PerSample(net) as engine:
        terms = net(torch.ones(2, 4)).sum(1)
        with pytest.raises(ValueError, match="exchange='rows'"):
            engine.backward(terms, torch.eye(2), mogb.make("graddrop"), exchange="shards")
    torch.save(found, folder / f"{rank}.pt")


def test_shards_of_rows_give_the_same_direction():
    for found in launch(2, work_in_shards):
        for ours, expected in zip(found["shards"]["mgda"], found["rows"]["mgda"], strict=True):
            assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def disagree(rank, world, folder):
    net = model()
    with PerSample(net) as engine, pytest.raises(ValueError, match="about to do different things"):
        engine.backward(net(torch.ones(2, 4)).sum(1), torch.eye(2), mogb.make("mgda" if rank else "cagrad"))
    balancer = mogb.Balancer(mogb.make("mgda"), net, engine="per_sample", exchange="shards" if rank else "rows")
    with pytest.raises(ValueError, match="about to do different things"):
        balancer.backward_terms(net(torch.ones(2, 4)).sum(1), torch.eye(2))
    torch.save(True, folder / f"{rank}.pt")


def test_ranks_that_differ_are_told_at_once():
    assert launch(2, disagree) == [True, True]
