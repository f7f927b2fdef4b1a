"""Engines, micro-batches, scalers and representations on two gloo processes, beside one process on the whole batch."""

import pytest
import torch
import torch.distributed as dist
from engine_models import batch, flat_grad, losses_of, residual
from processes import launch
from torch.testing import assert_close

import mogb

SIZE, CUT = 6, 2  # samples of the batch, and of the first rank
SCALE = 2.0**6
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


def mine(rank, world):
    inputs, targets = batch(SIZE)
    part = slice(0, SIZE) if world == 1 else slice(0, CUT) if rank == 0 else slice(CUT, SIZE)
    return inputs[part], targets[part]


def by_engine(engine):
    def step(net, inputs, targets):
        return mogb.backward(
            losses_of(net, inputs, targets), net, mogb.make("upgrad"), engine=engine, num_samples=len(inputs)
        )

    return step


def by_micro_batches(net, inputs, targets):
    """Two micro-batches of one half each; the ranks' halves differ in size."""
    balancer, half = mogb.Balancer(mogb.make("marble"), net), len(inputs) // 2
    balancer.accumulate(losses_of(net, inputs[:half], targets[:half]) / 2, num_samples=half)
    return balancer.backward(losses_of(net, inputs[half:], targets[half:]) / 2, num_samples=half)


def by_scaler(net, inputs, targets):
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    report = mogb.backward(
        losses_of(net, inputs, targets), net, mogb.make("nash_mtl"), scaler=scaler, num_samples=len(inputs)
    )
    scaler.unscale_(torch.optim.SGD(net.parameters(), lr=1.0))
    return report


def by_representation(net, inputs, targets):
    hidden = net[:-1](inputs)
    losses = (net[-1](hidden) - targets).square().mean(dim=0)
    losses = losses * torch.tensor([1.0, 30.0, 0.1], dtype=losses.dtype)
    return mogb.backward(losses, net[:-1], mogb.make("mgda"), shared=hidden, num_samples=len(inputs))


def by_groups(net, inputs, targets):
    return mogb.backward(
        losses_of(net, inputs, targets), net, mogb.make("cagrad"), groups="module", num_samples=len(inputs)
    )


STEPS = {
    "sequential": by_engine("sequential"),
    "batched": by_engine("batched"),
    "streaming": by_engine("streaming"),
    "micro-batches": by_micro_batches,
    "scaler": by_scaler,
    "representation": by_representation,
    "groups": by_groups,
}


def step_all(rank, world):
    found = {}
    for name, step in STEPS.items():
        net = residual(depth=2)
        report = step(net, *mine(rank, world))
        gradient = flat_grad([param for param in net.parameters() if param.grad is not None])
        found[name] = (gradient, report.gramian, report.losses, report.engine)
    return found


def overflow(rank):
    """Only one rank overflows; both must skip."""
    net = residual(depth=1, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    losses = losses_of(net, *batch(dtype=torch.float32))
    shift = net[0].bias.sum() - net[0].bias.sum().detach()
    report = mogb.backward(losses + shift * 3e38 * rank, net, mogb.make("mgda"), scaler=scaler)
    return report.skipped


def other_walk(rank):
    """One rank would stream along other cuts: it is told before anybody waits."""
    net = residual(depth=2)
    losses = (
        losses_of(net, *batch())
        if rank == 0
        else (net[-1](net[0](batch()[0])) + net[1](net[2](net[0](batch()[0]))).sum()).sum(0)
    )
    try:
        mogb.backward(losses, net, mogb.make("mgda"), engine="streaming")
    except ValueError as error:
        return "different things" in str(error)
    return False


def transposed(rank, world):
    """Vectorized rows of a weight in an einsum are not contiguous."""
    weight = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4).requires_grad_()
    inputs, _ = mine(rank, world)
    losses = torch.einsum("bi,oi->bo", inputs[:, :4].double(), weight).square().mean(0)
    mogb.backward(losses, [weight], mogb.make("mgda"), engine="batched", num_samples=len(inputs))
    return weight.grad


def work(rank, world, folder):
    found = {
        "transposed": transposed(rank, world),
        "steps": step_all(rank, world),
        "skipped": overflow(rank),
        "told": other_walk(rank),
    }
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks():
    return launch(2, work)


@pytest.mark.parametrize("name", list(STEPS))
def test_two_processes_equal_one(ranks, name):
    gradient, gramian, losses, engine = step_all(0, 1)[name]
    for rank in ranks:
        found = rank["steps"][name]
        assert found[3] == engine
        assert_close(found[2], losses, rtol=1e-10, atol=0)
        assert_close(found[1], gramian, rtol=1e-9, atol=1e-14)
        assert_close(found[0], gradient, rtol=1e-6, atol=1e-10)
    assert torch.equal(ranks[0]["steps"][name][1], ranks[1]["steps"][name][1])


def test_rows_that_are_not_contiguous_are_averaged(ranks):
    for rank in ranks:
        assert_close(rank["transposed"], transposed(0, 1), rtol=1e-9, atol=1e-12)


def test_an_overflow_of_one_rank_skips_the_step_of_all(ranks):
    assert all(rank["skipped"] for rank in ranks)


def test_ranks_that_would_walk_differently_are_told(ranks):
    assert all(rank["told"] for rank in ranks)
