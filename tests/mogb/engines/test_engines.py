"""The engines by name: the same numbers as gradients taken one by one, at the promised number of passes and memory."""

import numpy as np
import pytest
import torch
from engine_models import batch, flat_grad, losses_of, residual, rows_by_hand
from torch import nn
from torch.testing import assert_close

import mogb
from mogb.engines import choice
from mogb.engines.losses import as_losses
from mogb.engines.plan import make_plan
from mogb.engines.streaming import walk_down

ENGINES = ("sequential", "batched", "streaming")


def tied(depth=2):
    """The first matrix of one block is that of another, far below it."""
    net = residual(depth)
    net[1].up.weight = net[depth].up.weight
    return net


class Shortcut(nn.Module):
    """A parameter whose way to the losses passes by the trunk."""

    def __init__(self):
        super().__init__()
        self.body, self.shift, self.out = residual(3, outputs=8), nn.Parameter(torch.ones(8).double()), nn.Linear(8, 3)
        self.out.double()

    def forward(self, x):
        early = self.shift.exp()
        return self.out(torch.tanh(self.body(x)) * early + x.mean())


@pytest.mark.parametrize("make", [residual, tied, Shortcut], ids=lambda make: make.__name__)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_rows_taken_one_by_one(engine, make):
    net = make()
    params = list(net.parameters())
    rows = rows_by_hand(losses_of(net, *batch()), params)
    expected = mogb.make("upgrad")(rows)
    report = mogb.backward(losses_of(net, *batch()), net, mogb.make("upgrad"), engine=engine)
    assert_close(report.gramian, rows @ rows.T, rtol=1e-12, atol=0)
    assert_close(flat_grad(params), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("engine", "passes"), [("sequential", 3), ("batched", 1), ("streaming", 4)])
def test_the_report_says_which_engine_ran_and_what_it_cost(engine, passes):
    net = residual()
    report = mogb.backward(losses_of(net, *batch()), net, mogb.make("mgda"), engine=engine)
    assert (report.engine, report.backward_passes, report.note) == (engine, passes, "")


@pytest.mark.parametrize("engine", ENGINES)
def test_heads_get_their_plain_gradient_from_every_engine(engine):
    trunk, heads = residual(outputs=4), nn.ModuleList(nn.Linear(4, 1) for _ in range(3)).double()
    inputs, _ = batch()

    def losses():
        hidden = torch.tanh(trunk(inputs))
        return [(head(hidden) - k).square().mean() for k, head in enumerate(heads)]

    plain = [torch.autograd.grad(loss, list(head.parameters())) for loss, head in zip(losses(), heads, strict=True)]
    mogb.backward(losses(), None, mogb.make("cagrad"), engine=engine)
    for head, grads in zip(heads, plain, strict=True):
        assert_close([param.grad for param in head.parameters()], list(grads), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_graph_is_freed_or_kept_as_asked(engine):
    net = residual()
    losses = losses_of(net, *batch())
    mogb.backward(losses, net, mogb.make("mgda"), engine=engine, retain_graph=True)
    first = flat_grad(net.parameters())
    net.zero_grad()
    mogb.backward(losses, net, mogb.make("mgda"), engine=engine)
    assert_close(flat_grad(net.parameters()), first)
    with pytest.raises(RuntimeError, match="second time"):
        mogb.backward(losses, net, mogb.make("mgda"), engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bad_gradient_is_named_and_nothing_changes(engine):
    point = torch.zeros(2, requires_grad=True)
    losses = {"fine": point.sum(), "root": (point + 0).sqrt().sum()}
    with pytest.raises(mogb.NonFiniteError) as caught:
        mogb.backward(losses, [point], mogb.make("mgda"), engine=engine)
    assert caught.value.index == 1
    assert point.grad is None


@pytest.mark.parametrize("engine", ENGINES)
def test_losses_on_separate_graphs_and_unused_parameters(engine):
    first, second, unused = (torch.ones(3, requires_grad=True) for _ in range(3))
    losses = [(first * torch.arange(3.0)).sum() + second.sum(), second.square().sum()]
    report = mogb.backward(losses, [first, second, unused], mogb.make("weighted_sum", weights=[1.0, 1.0]))
    assert report.engine == "weighted"
    grads = [param.grad.clone() for param in (first, second, unused)]
    for param in (first, second, unused):
        param.grad = None
    losses = [(first * torch.arange(3.0)).sum() + second.sum(), second.square().sum()]
    report = mogb.backward(losses, [first, second, unused], mogb.make("pcgrad", order="index"), engine=engine)
    assert_close([first.grad, second.grad, unused.grad], grads)  # rows (0,1,2,1,1,1) and (0,0,0,2,2,2): no conflict
    assert_close(report.gramian, torch.tensor([[8.0, 6.0], [6.0, 12.0]], dtype=torch.float64))


def test_a_loss_that_is_part_of_another_one():
    net = residual()

    def losses():
        first, second, _ = losses_of(net, *batch())
        return [first, first + second]

    params = list(net.parameters())
    rows = rows_by_hand(losses(), params)
    for engine in ENGINES:
        report = mogb.backward(losses(), net, mogb.make("mgda"), engine=engine)
        assert_close(report.gramian, rows @ rows.T, rtol=1e-12, atol=0)


class TestSegments:
    def walk(self, net):
        losses = as_losses(losses_of(net, *batch()))
        plan = make_plan(losses, net)
        walk = walk_down(losses, plan)
        cuts, width = walk.narrowest()
        return plan, walk.segments(cuts), width

    def test_every_parameter_is_in_one_segment(self):
        plan, segments, _ = self.walk(residual(depth=6))
        members = [index for part in segments for index in part.params]
        assert sorted(members) == list(range(len(plan.shared)))
        assert len(segments) > 3

    def test_the_widest_segment_of_equal_blocks_is_about_one_block(self):
        net = residual(depth=8, width=32)
        _, _, width = self.walk(net)
        block = 8 * sum(param.numel() for param in net[1].parameters())
        cotangent = 8 * 6 * 32
        assert width <= block + 4 * cotangent

    def test_a_chain_is_cut_where_it_is_narrow(self):
        # 5 -> 40 -> 2 -> 40 -> 3: of all cuts, the one at the two numbers costs least.
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 40), nn.Linear(40, 2), nn.Linear(2, 40), nn.Linear(40, 3)).double()
        _, segments, _ = self.walk(net)
        exits = [edge.node._input_metadata[edge.output_nr].shape for part in segments for edge in part.exits]
        assert any(tuple(shape)[-1] == 2 for shape in exits)

    def test_a_matrix_used_above_and_below_forbids_the_cuts_in_between(self):
        plan, segments, _ = self.walk(tied(depth=4))
        shared = next(index for index, p in enumerate(plan.shared) if p.shape == (32, 8))
        assert sum(shared in part.params for part in segments) == 1

    def test_where_no_cut_helps_streaming_is_sequential_and_says_so(self):
        point = torch.ones(4, requires_grad=True)
        report = mogb.backward([point.sum(), point.square().sum()], [point], mogb.make("mgda"), engine="streaming")
        assert report.engine == "sequential"
        assert "no narrow place" in report.note


class TestAuto:
    def test_rows_that_fit_are_kept(self):
        net = residual()
        assert mogb.backward(losses_of(net, *batch()), net, mogb.make("mgda")).engine == "sequential"

    def test_rows_of_more_than_a_quarter_of_the_memory_are_streamed(self, monkeypatch):
        net = residual(depth=8, width=32)
        rows = 3 * 8 * sum(param.numel() for param in net.parameters())
        monkeypatch.setattr(choice, "memory", lambda device: 4 * rows - 1)
        assert mogb.backward(losses_of(net, *batch()), net, mogb.make("mgda")).engine == "streaming"
        assert mogb.backward(losses_of(net, *batch()), net, mogb.make("graddrop")).engine == "sequential"
        monkeypatch.setattr(choice, "memory", lambda device: 4 * rows)
        assert mogb.backward(losses_of(net, *batch()), net, mogb.make("mgda")).engine == "sequential"

    def test_the_memory_of_this_machine_is_known(self):
        assert 1e8 < choice.memory(torch.device("cpu")) < 1e15


class TestRefusals:
    def test_unknown_names(self, unchecked):
        point = torch.ones(2, requires_grad=True)
        with pytest.raises(ValueError, match="'auto', 'sequential', 'batched', 'streaming'"):
            mogb.backward([point.sum()], [point], mogb.make("mgda"), engine="fast")

    def test_readers_of_whole_rows_are_not_streamed(self):
        point = torch.ones(2, requires_grad=True)
        with pytest.raises(ValueError, match=r"'graddrop' reads whole rows"):
            mogb.backward([point.sum()], [point], mogb.make("graddrop"), engine="streaming")
        with pytest.raises(ValueError, match=r"'graddrop' reads whole rows"):
            mogb.Balancer(mogb.make("graddrop"), [point], engine="streaming")

    def test_what_can_not_be_vectorized_is_said_and_nothing_changes(self):
        class Doubled(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return 2 * x

            @staticmethod
            def backward(ctx, grad):
                return torch.tensor(2 * grad.numpy())  # no tensor operation: vmap can't see through it

        point = torch.ones(2, requires_grad=True)
        out = Doubled.apply(point)
        with pytest.raises(RuntimeError, match="use engine='sequential'"):
            mogb.backward([out.sum(), out.square().sum()], [point], mogb.make("mgda"), engine="batched")
        assert point.grad is None


def peak_rows(engine, net, count):
    """The largest number of bytes of rows ``[K, *shape]`` that are alive at once, seen from the operations."""
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    shapes = {(count, *param.shape) for param in net.parameters()}

    class Watch(TorchDispatchMode):
        alive, peak = {}, 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and tuple(leaf.shape) in shapes:
                    storage = leaf.untyped_storage()
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
            self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
            return result

    losses = losses_of(net, *batch())
    with Watch() as watch:
        mogb.backward(losses, net, mogb.make("mgda"), engine=engine)
    return watch.peak


def test_streaming_never_holds_the_rows_of_more_than_a_block():
    net = residual(depth=8, width=16)
    everything = 3 * 8 * sum(param.numel() for param in net.parameters())
    assert everything <= peak_rows("sequential", net, 3) <= 1.01 * everything
    assert peak_rows("streaming", net, 3) < everything / 6


def test_float32_gramians_of_streaming_are_as_accurate():
    net = residual(depth=3, width=64, dtype=torch.float32)
    exact = residual(depth=3, width=64)
    exact.load_state_dict(net.state_dict())
    wide = [tensor.double() for tensor in batch(dtype=torch.float32)]
    rows = rows_by_hand(losses_of(exact, *wide), list(exact.parameters()))
    report = mogb.backward(losses_of(net, *batch(dtype=torch.float32)), net, mogb.make("mgda"), engine="streaming")
    truth = (rows @ rows.T).numpy()
    norms = np.sqrt(truth.diagonal())
    assert np.abs(report.gramian.numpy() - truth).max() <= 1e-6 * np.outer(norms, norms).max()
