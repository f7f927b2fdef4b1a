"""Two and four gloo processes against one process on the concatenated batch."""

import os
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed_cases import (
    alone,
    batch,
    descend,
    flat_grad,
    gramian_methods,
    losses_of,
    mine,
    model,
    train,
    trained,
    wrapped,
)
from processes import launch
from torch import nn
from torch.testing import assert_close

import mogb
from mogb.base import GramianAggregator, Solution
from mogb.engines import shards
from mogb.engines.distributed import Ranks

FAST = ("weighted_sum", "mgda", "pcgrad", "nash_mtl", "marble")
RANDOM = ("pcgrad", "gradvac", "rlw", "sdmgrad", "graddrop")
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


def check_against_one_process(world, cases, seconds=120.0):
    results = launch(world, train, cases, seconds=seconds)
    for index, (form, exchange, names) in enumerate(cases):
        for name in names:
            expected, _ = alone(form, name, world)
            for result in results:
                gradient, weights = result[index][name]
                told = f"{name}, {form}, {exchange}"
                atol = 1e-6 * max(1.0, float(expected.abs().max()))  # float32: relative to the largest number
                assert_close(gradient, expected, rtol=1e-5, atol=atol, msg=lambda text, told=told: f"{told}: {text}")
                assert torch.equal(weights, results[0][index][name][1]), f"{told}: weights differ between ranks"
                if form.startswith(("plain", "ddp")):
                    assert torch.equal(gradient, results[0][index][name][0]), f"{told}: directions differ"


def test_ranks_with_uneven_batches_equal_one_process():
    forms = [("plain", "rows"), ("plain", "shards"), ("ddp", "auto"), ("ddp", "shards"), ("fsdp", "auto")]
    cases = [(*form, FAST) for form in forms] + [("fsdp tied", "auto", ("mgda",))]
    cases += [("ddp accumulated", "shards", ("mgda", "marble")), ("fsdp accumulated", "auto", ("mgda", "marble"))]
    check_against_one_process(2, cases)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_gramian_method_equals_one_process(world):
    forms = [("ddp", "rows"), ("ddp", "shards"), ("fsdp", "auto"), ("fsdp tied", "auto")]
    forms += [("ddp accumulated", "auto"), ("fsdp accumulated", "auto")]
    forms += [("hsdp", "auto")] if world == 4 else []
    check_against_one_process(world, [(*form, gramian_methods()) for form in forms], seconds=280)


# Each scene is a few lines on two ranks; they share one start of the processes, which takes seconds.
SCENES = {}


def scene(function):
    SCENES[function.__name__] = function
    return function


def act(rank, world, folder):
    torch.save({name: play(rank, world) for name, play in SCENES.items()}, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def played():
    results = launch(2, act)
    return {name: [result[name] for result in results] for name in SCENES}


def refusal(call):
    """What a call that must fail says."""
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@dataclass(frozen=True)
class Sum(GramianAggregator):
    """Twice the plain sum, from the Gramian."""

    def _weights(self, gramian):
        return Solution(np.full(len(gramian), 2.0))


@scene
def alternating(rank, world):
    """Balanced and plain steps in turn, on DDP with its options: what differs from gradients averaged by hand."""
    found = []
    for options in ({}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}, {"static_graph": True}):
        net, twin = nn.parallel.DistributedDataParallel(model(), **options), model()
        inputs, targets = mine(rank, world)
        steps = (True, True, False, True, False, False, True)
        if "static_graph" in options:
            found.append(refusal(lambda net=net: mogb.backward(losses_of(net, *mine(rank, world)), net, Sum())))
            found.append(refusal(lambda net=net: mogb.backward(losses_of(net, *mine(rank, world)), None, Sum())))
            steps = (False, *steps)
        for balanced in steps:
            net.zero_grad()
            twin.zero_grad()
            losses, weights = losses_of(net, inputs, targets), torch.ones(3)
            if balanced:
                weights = mogb.backward(losses, net, mogb.make("upgrad")).weights.float()
            else:
                losses.sum().backward()
            (weights @ losses_of(twin, inputs, targets)).backward()
            for param in twin.parameters():
                dist.all_reduce(param.grad)
                param.grad /= world
            found.append(float((flat_grad(net) - flat_grad(twin)).abs().max() / flat_grad(twin).abs().max()))
            descend(twin)
            with torch.no_grad():
                for param, other in zip(net.parameters(), twin.parameters(), strict=True):
                    param.copy_(other)
    return found


def test_ddp_goes_on_as_if_nothing_had_happened_after_balanced_steps(played):
    for found in played["alternating"]:
        differences = [value for value in found if isinstance(value, float)]
        assert len(differences) == 29
        assert max(differences) < 2e-6


def test_a_static_graph_must_have_seen_a_plain_backward_pass(played):
    for found in played["alternating"]:
        refused = [value for value in found if isinstance(value, str)]
        assert len(refused) == 2
        assert all("must see a plain loss.backward()" in message for message in refused)


@scene
def hooks(rank, world):
    """How many buckets DDP reduced during a balanced step, and during a plain one."""
    net, reduced = wrapped("ddp"), []

    def count(state, bucket):
        reduced.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    net.register_comm_hook(None, count)
    mogb.backward(losses_of(net, *mine(rank, world)), net, mogb.make("mgda"))
    during = len(reduced)
    losses_of(net, *mine(rank, world)).sum().backward()
    return during, len(reduced)


def test_no_hook_of_ddp_fires(played):
    assert played["hooks"] == [(0, 1)] * 2


@scene
def adding_up(rank, world):
    net = wrapped("ddp")
    net.module[0].weight.grad = torch.full_like(net.module[0].weight, 7.0)
    mogb.backward(losses_of(net, *mine(rank, world)), net, mogb.make("mgda"), exchange="shards")
    added = net.module[0].weight.grad.clone()
    net.zero_grad()
    mogb.backward(losses_of(net, *mine(rank, world)), net, mogb.make("mgda"), exchange="rows")
    return added - net.module[0].weight.grad


def test_the_direction_is_added(played):
    for difference in played["adding_up"]:
        assert_close(difference, torch.full((8, 4), 7.0))


@scene
def expanded(rank, world):
    net, scale = model(), torch.nn.Parameter(torch.ones(3))
    losses = torch.stack([*losses_of(net, *mine(rank, world)), scale.sum() * (rank + 1)])  # its gradient has stride 0
    mogb.backward(losses, [*net.parameters(), scale], mogb.make("weighted_sum", weights=[1.0] * 4))
    return scale.grad


def test_expanded_gradients_are_averaged(played):
    for gradient in played["expanded"]:
        assert_close(gradient, torch.full((3,), 1.5))


@scene
def odd_parameters(rank, world):
    """Shards of few columns a bucket; dtypes in turn, a scalar, an empty one, one that nothing reaches."""
    bucket, shards.BUCKET = shards.BUCKET, 7
    by_gloo = Ranks.by_gloo
    shapes = [((5,), torch.float32), ((), torch.float64), ((2, 3), torch.float64), ((0, 2), torch.float32)]
    shapes += [((3, 1), torch.bfloat16), ((1,), torch.float32), ((4,), torch.float32)]
    generator = torch.Generator().manual_seed(5)
    params = [torch.randn(s, dtype=d, generator=generator).requires_grad_() for s, d in shapes]
    mix = torch.randn(world, 3, len(shapes) - 1, generator=generator)
    losses = [
        sum(m * (p.double() * (k + 1)).sin().sum() for m, p in zip(mix[rank, k], params[:-1], strict=True))
        for k in range(3)
    ]
    found = {}
    for kind in ("rows", "shards", "shards by reduce-scatter"):
        for param in params:
            param.grad = None
        if "reduce" in kind:  # as other backends do it
            Ranks.by_gloo = lambda self, device: False
        mogb.backward(losses, params, mogb.make("upgrad"), exchange=kind.split()[0], retain_graph=True)
        found[kind] = [param.grad.clone() for param in params]
    shards.BUCKET, Ranks.by_gloo = bucket, by_gloo
    return found


def test_shards_of_any_shape_and_dtype_equal_rows(played):
    for found in played["odd_parameters"]:
        for kind in ("shards", "shards by reduce-scatter"):
            for ours, expected in zip(found[kind], found["rows"], strict=True):
                assert ours.dtype == expected.dtype
                assert ours.shape == expected.shape
                tolerance = 1e-2 if ours.dtype == torch.bfloat16 else 1e-5
                assert_close(ours, expected, rtol=tolerance, atol=tolerance / 10)
        assert not found["shards"][-1].any()
        assert found["shards"][0].any()


@scene
def random_orders(rank, world):
    torch.manual_seed(rank)  # the ranks' own random numbers have no say
    inputs, targets = mine(rank, world)
    found = []
    for name in RANDOM:
        net = model()
        torch.randn(rank + 1)
        gradient, weights = trained(net, name, inputs, targets)
        found.append(torch.cat([gradient.double(), weights]))
    return found


def test_the_same_seed_gives_the_same_random_order_on_all_ranks(played):
    for first, second, name in zip(*played["random_orders"], RANDOM, strict=True):
        assert torch.equal(first, second), name


@scene
def reused_weights(rank, world):
    net = wrapped("ddp")
    balancer = mogb.Balancer(mogb.make("mgda"), net, refresh_every=2, exchange="shards")
    found = []
    for _ in range(3):
        net.zero_grad()
        balancer.backward(losses_of(net, *mine(rank, world)), num_samples=len(mine(rank, world)[0]))
        found.append(flat_grad(net))
        descend(net)
    return found


def test_a_balancer_reuses_its_weights_on_all_ranks(played):
    net = model()
    balancer = mogb.Balancer(mogb.make("mgda"), net, refresh_every=2)
    for first, second in zip(*played["reused_weights"], strict=True):
        net.zero_grad()
        balancer.backward(losses_of(net, *batch(2)))
        assert torch.equal(first, second)
        assert_close(first, flat_grad(net), rtol=1e-5, atol=1e-6)
        descend(net)


@scene
def mixed_precision(rank, world):
    """The balanced gradient of a model sharded with bfloat16 inside, and that of the rows of plain backward passes."""
    net, inputs = wrapped("fsdp mixed"), mine(rank, world)
    report = mogb.backward(losses_of(net, *inputs), net, mogb.make("upgrad"))
    ours, rows = flat_grad(net), []
    for k in range(3):
        net.zero_grad()
        losses_of(net, *inputs)[k].backward()
        rows.append(flat_grad(net))
    return ours, report.weights, torch.stack(rows)


def test_mixed_precision_policies_of_fully_shard(played):
    for ours, weights, rows in played["mixed_precision"]:
        assert ours.dtype == torch.float32
        assert_close(weights, mogb.make("upgrad").weights((rows @ rows.T).double()), rtol=1e-4, atol=1e-6)
        assert_close(ours, mogb.make("upgrad")(rows), rtol=1e-4, atol=1e-6)


@scene
def no_samples(rank, world):
    net, (inputs, targets) = wrapped("ddp"), mine(rank, world)
    losses = losses_of(net, inputs, targets) * (rank == 0)  # this rank's batch ran out
    mogb.backward(losses, net, mogb.make("mgda"), num_samples=len(inputs) if rank == 0 else 0)
    return flat_grad(net)


def test_a_rank_without_samples_takes_part_and_counts_nothing(played):
    net = model()
    mogb.backward(losses_of(net, *mine(0, 2)), net, mogb.make("mgda"))
    for gradient in played["no_samples"]:
        assert_close(gradient, flat_grad(net), rtol=1e-5, atol=1e-6)


@scene
def switched_off(rank, world):
    net = model()
    report = mogb.backward(losses_of(net, *mine(rank, world)), net, mogb.make("mgda"), process_group=None)
    return flat_grad(net), report.gramian


def test_no_group_means_no_communication(played):
    for rank, (gradient, gramian) in enumerate(played["switched_off"]):
        net = model()
        report = mogb.backward(losses_of(net, *mine(rank, 2)), net, mogb.make("mgda"))
        assert_close(gradient, flat_grad(net))
        assert_close(gramian, report.gramian)


@scene
def refusals(rank, world):
    net, inputs = model(), mine(rank, world)
    losses = losses_of(net, *inputs)
    sharded = wrapped("fsdp")

    def call(losses=losses, params=net, name="mgda", options=None, **arguments):
        method = mogb.make(name, **(options or {}))
        return refusal(lambda: mogb.backward(losses, params, method, retain_graph=True, **arguments))

    found = {
        "alone": call(losses_of(sharded, *inputs), sharded, process_group=None),
        "whole rows of shards": call(losses_of(sharded, *inputs), sharded, "graddrop"),
        "whole rows": call(name="graddrop", exchange="shards"),
        "losses": call(losses[: 2 + rank]),
        "seed": call(name="pcgrad", options={"seed": rank}),
        "method": call(name=("mgda", "upgrad")[rank]),
        "params": call(params=list(net.parameters())[: 2 + 2 * rank]),
        "exchange": call(exchange=("rows", "shards")[rank]),
        "num_samples": call(num_samples=(3, None)[rank]),
        "no samples": call(num_samples=0),
    }
    found["untouched"] = str(all(param.grad is None for param in net.parameters()))
    return found


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("alone", "ValueError: process_group=None .* sharded over several"),
        ("whole rows of shards", "ValueError: 'graddrop' reads whole rows"),
        ("whole rows", "ValueError: exchange='shards' leaves no rank with whole rows"),
        ("losses", "ValueError: The ranks are about to do different things.* [23] losses"),
        ("seed", "ValueError: The ranks are about to do different things.*seed=[01]"),
        ("method", "ValueError: The ranks are about to do different things.*(MGDA|UPGrad)"),
        ("params", "ValueError: The ranks are about to do different things.*[24] balanced parameters"),
        ("exchange", "ValueError: The ranks are about to do different things.*exchange='(rows|shards)'"),
        ("num_samples", "ValueError: num_samples was given on 1 of 2 ranks"),
        ("no samples", "ValueError: num_samples is 0 on every rank"),
        ("untouched", "True"),
    ],
)
def test_every_rank_is_told_what_is_wrong(played, what, expected):
    import re

    for answers in played["refusals"]:
        assert re.match(expected, answers[what]), answers[what]


@scene
def not_a_number(rank, world):
    answers = []
    for form, exchange in (("ddp", "rows"), ("ddp", "shards"), ("fsdp", "auto")):
        for name in ("mgda", "weighted_sum"):
            net, (inputs, targets) = wrapped(form), mine(rank, world)
            if rank == 1:
                targets[0, 2] = float("nan")
            try:
                mogb.backward(losses_of(net, inputs, targets), net, mogb.make(name), exchange=exchange)
            except mogb.NonFiniteError as error:
                answers.append(error.index)
            answers.append(-1 if next(net.parameters()).grad is None else 99)
    return answers


def test_nan_on_one_rank_stops_all_ranks_and_names_the_objective(played):
    for answers in played["not_a_number"]:
        assert answers == [2, -1] * 6


class Spoiled(torch.autograd.Function):
    """The identity, with a gradient of infinity."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


@scene
def infinite_gradient(rank, world):
    answers = []
    for form, exchange in (("ddp", "rows"), ("ddp", "shards"), ("fsdp", "auto")):
        net = wrapped(form)
        losses = list(losses_of(net, *mine(rank, world)))
        losses[1] = Spoiled.apply(losses[1]) if rank == 1 else losses[1]
        try:
            mogb.backward(losses, net, mogb.make("upgrad"), exchange=exchange)
        except mogb.NonFiniteError as error:
            answers.append((error.what, error.index, next(net.parameters()).grad is None))
    return answers


def test_a_gradient_of_infinity_on_one_rank_stops_all_ranks(played):
    for answers in played["infinite_gradient"]:
        assert answers == [("gradient", 1, True)] * 3


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(40))

    def forward(self):
        scale = torch.ones(40)
        scale[-1] = 1.5e38  # two of them can be added, four can't
        return torch.stack([(self.weight * scale).sum(), (self.weight * scale).sum() * 0.99])


@scene
def overflow(rank, world):
    """Rows that are finite, and a direction that is not: in columns that the second rank alone holds."""
    from torch.distributed.fsdp import fully_shard

    answers = []
    for form, exchange in (("plain", "rows"), ("plain", "shards"), ("fsdp", "auto")):
        net = fully_shard(Scaled()) if form == "fsdp" else Scaled()
        answers.append(refusal(lambda net=net, exchange=exchange: mogb.backward(net(), net, Sum(), exchange=exchange)))
    return answers


def test_a_direction_that_overflows_on_one_rank_stops_all_ranks(played):
    for answers in played["overflow"]:
        assert all("the combination overflowed" in answer for answer in answers), answers


@scene
def gathered(rank, world):
    """Parameters that fully_shard gathered for the forward pass, of the root and of all, in every way to pass them."""
    from torch.distributed.fsdp import fully_shard

    found = {}
    for kind in ("module", "before", "after", "graph"):
        net = model()
        fully_shard(net[0])
        fully_shard(net)  # its own parameters, those of net[2], stay gathered after a forward pass
        params = list(net.parameters())
        losses = losses_of(net, *mine(rank, world))
        choice = {"module": net, "before": params, "after": list(net.parameters()), "graph": None}[kind]
        message = refusal(lambda losses=losses, choice=choice: mogb.backward(losses, choice, mogb.make("mgda")))
        found[kind] = message if message != "no error" else torch.cat([p.grad.full_tensor().flatten() for p in params])
    return found


def test_gathered_parameters_are_given_back_or_refused(played):
    net = model()
    losses = torch.stack([losses_of(net, *mine(rank, 2)) for rank in range(2)]).mean(0)
    mogb.backward(losses, net, mogb.make("mgda"))
    for found in played["gathered"]:
        assert_close(found["module"], flat_grad(net), rtol=1e-5, atol=1e-6)
        assert_close(found["before"], flat_grad(net), rtol=1e-5, atol=1e-6)
        assert "gathered by fully_shard" in found["after"]
        assert "gathered by fully_shard" in found["graph"]


def die(rank, world, folder, moment):
    from datetime import timedelta

    group = dist.new_group(timeout=timedelta(seconds=3))
    net = model()
    inputs, targets = mine(rank, world)
    if rank == 1 and moment == "before":
        os._exit(0)
    if rank == 1 and moment == "between":  # the losses are known, the rows are not
        net[0].weight.register_hook(lambda grad: os._exit(0))
    start = time.perf_counter()
    try:
        losses = losses_of(net, inputs, targets)
        mogb.backward(losses, net, mogb.make("mgda"), process_group=group, exchange="shards")
    except mogb.DistributedError as error:
        torch.save((time.perf_counter() - start, str(error)), folder / "0.pt")
    os._exit(0)


@pytest.mark.parametrize("moment", ["before", "between"])
def test_a_dead_rank_is_a_clear_error_within_the_timeout(moment):
    (seconds, message), _ = launch(2, die, moment)
    assert seconds < 10
    assert "another rank died" in message


@pytest.mark.parametrize("bad", [-1, float("nan")])
def test_impossible_sample_counts_are_refused(bad):
    net = model()
    with pytest.raises(ValueError, match="num_samples"):
        mogb.backward(losses_of(net, *batch(1)), net, mogb.make("mgda"), num_samples=bad)


@pytest.mark.parametrize(("argument", "bad"), [("process_group", "world"), ("exchange", "ring")])
def test_unknown_words_are_refused(argument, bad, unchecked):
    net = model()
    with pytest.raises(ValueError, match=argument):
        mogb.backward(losses_of(net, *batch(1)), net, mogb.make("mgda"), **{argument: bad})
