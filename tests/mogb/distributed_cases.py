"""Models in their distributed forms, trained by any method, beside one process on the concatenated batch."""

import functools

import torch
from torch import nn

import mogb

SIZES = (3, 5, 2, 6)  # samples of each rank; their mean is no mean of means


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, inputs):
        return self.last(self.second(torch.tanh(self.first(inputs))))


def plain_model():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def model(form="plain"):
    torch.manual_seed(0)
    return Tied() if "tied" in form else plain_model()


def wrapped(form):
    """``plain``, ``ddp``, ``fsdp``, ``fsdp tied``, ``fsdp mixed`` (bfloat16 inside) or ``hsdp`` (copies of shards).

    With ``accumulated``, each step takes two micro-batches.
    """
    net = model(form)
    if form.startswith("ddp"):
        return nn.parallel.DistributedDataParallel(net)
    if form.startswith(("fsdp", "hsdp")):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options = {"mp_policy": policy} if "mixed" in form else {}
        if form == "hsdp":
            options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        if "tied" not in form:
            fully_shard(net[0], **options)
            fully_shard(net[2], **options)
        fully_shard(net, **options)
    return net


@functools.cache
def batch(world):
    generator = torch.Generator().manual_seed(1)
    size = sum(SIZES[:world])
    return torch.randn(size, 4, generator=generator), torch.randn(size, 3, generator=generator)


def mine(rank, world):
    inputs, targets = batch(world)
    start = sum(SIZES[:rank])
    return inputs[start : start + SIZES[rank]].clone(), targets[start : start + SIZES[rank]].clone()


def losses_of(net, inputs, targets):
    scale = torch.tensor([1.0, 30.0, 0.1])
    return scale * (net(inputs).float() - targets).square().mean(dim=0)


def flat_grad(net):
    grads = [param.grad for param in net.parameters()]
    return torch.cat([(grad.full_tensor() if hasattr(grad, "full_tensor") else grad).flatten() for grad in grads])


def descend(net):
    with torch.no_grad():
        for param in net.parameters():
            param -= 0.05 * param.grad


def trained(net, name, inputs, targets, **options):
    """The last gradient and weights of two steps."""
    aggregator = mogb.make(name)
    for _ in range(2):
        net.zero_grad()
        report = mogb.backward(losses_of(net, inputs, targets), net, aggregator, **options)
        descend(net)
    weights = report.weights if report.weights is not None else torch.zeros(0)
    return flat_grad(net), weights


def accumulated(net, name, inputs, targets, world, exchange):
    """As :func:`trained` on a whole batch, but every rank's part is taken in two pieces: one sample, and the others."""
    balancer = mogb.Balancer(mogb.make(name), net, exchange=exchange)
    total = sum(SIZES[:world])
    for _ in range(2):
        net.zero_grad()
        first = losses_of(net, inputs[:1], targets[:1]) * (world / total)
        balancer.accumulate(first, num_samples=1)
        rest = losses_of(net, inputs[1:], targets[1:]) * ((total - world) / total)
        report = balancer.backward(rest, num_samples=len(inputs) - 1)
        descend(net)
    return flat_grad(net), report.weights


def alone(form, name, world):
    """One process on everything."""
    return trained(model(form), name, *batch(world))


def gramian_methods():
    return [name for name in mogb.registered() if mogb.make(name).reads.startswith("gramian")]


def train(rank, world, folder, cases):
    """Work for :func:`processes.launch`: every case is a form, an exchange and the names of methods."""
    found = []
    for form, exchange, names in cases:
        inputs, targets = mine(rank, world)
        if "accumulated" in form:
            found.append({n: accumulated(wrapped(form), n, inputs, targets, world, exchange) for n in names})
        else:
            options = {"num_samples": len(inputs), "exchange": exchange}
            found.append({name: trained(wrapped(form), name, inputs, targets, **options) for name in names})
    torch.save(found, folder / f"{rank}.pt")
