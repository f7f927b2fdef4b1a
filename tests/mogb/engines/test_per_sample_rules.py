"""Per-sample gradients of single layers, against one ordinary backward pass per sample."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mogb.engines.per_sample import PerSample

SAMPLES = 5


class Scale(nn.Module):
    """A layer that the engine has never heard of."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x, *, power=1):
        return torch.sin(x) * self.scale**power


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x, shift):
        y = (x - shift) @ self.weight.T
        return {"sum": y.cumsum(1), "unused": y.argmax(), "wave": [torch.cos(y)]}


class Wrapped(nn.Module):
    """Reduces whatever a layer returns to one number per sample."""

    def __init__(self, layer, dim=0, call=None):
        super().__init__()
        self.layer, self.dim, self.call = layer, dim, call or (lambda layer, x: layer(x))

    def forward(self, x):
        y = self.call(self.layer, x).movedim(self.dim, 0)
        y = y.reshape(SAMPLES, -1)
        return (torch.sin(y * torch.arange(1, y.shape[1] + 1)) + y.square()).sum(1)


def randn(*shape):
    return lambda: torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def indices(*shape):
    return lambda: torch.randint(4, shape, generator=torch.Generator().manual_seed(1))


def evaluated_batch_norm(make):
    layer = make(4)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer.eval()


LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), randn(SAMPLES, 3)),
    "linear without bias": (lambda: nn.Linear(3, 4, bias=False), randn(SAMPLES, 2, 6, 3)),
    "linear on folded tokens": (lambda: nn.Linear(3, 4), randn(SAMPLES * 6, 3)),
    "embedding": (lambda: nn.Embedding(4, 3), indices(SAMPLES, 7)),
    "embedding of one token": (lambda: nn.Embedding(4, 3), indices(SAMPLES)),
    "embedding with padding": (lambda: nn.Embedding(4, 3, padding_idx=2), indices(SAMPLES, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), randn(SAMPLES, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), dilation=(1, 2)), randn(SAMPLES, 2, 7, 6)),
    "conv2d, padding": (lambda: nn.Conv2d(2, 3, 3, padding="same", bias=False), randn(SAMPLES, 2, 5, 4)),
    "conv2d, circular": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), randn(SAMPLES, 2, 5, 4)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), randn(SAMPLES, 4, 5, 4)),
    "conv2d, folded frames": (lambda: nn.Conv2d(2, 3, 3), randn(SAMPLES * 2, 2, 5, 4)),
    "conv2d, folded and grouped": (lambda: nn.Conv2d(2, 4, 3, groups=2), randn(SAMPLES * 2, 2, 5, 4)),
    "layer norm": (lambda: nn.LayerNorm(4), randn(SAMPLES, 3, 4)),
    "layer norm of images": (lambda: nn.LayerNorm((3, 4)), randn(SAMPLES, 2, 3, 4)),
    "rms norm": (lambda: nn.RMSNorm(4), randn(SAMPLES, 3, 4)),
    "rms norm, large eps": (lambda: nn.RMSNorm(4, eps=0.3), randn(SAMPLES, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4, eps=0.1), randn(SAMPLES, 4, 3, 2)),
    "group norm, no positions": (lambda: nn.GroupNorm(2, 4), randn(SAMPLES, 4)),
    "batch norm in eval mode": (lambda: evaluated_batch_norm(nn.BatchNorm1d), randn(SAMPLES, 4)),
    "batch norm of images": (lambda: evaluated_batch_norm(nn.BatchNorm2d), randn(SAMPLES, 4, 3, 2)),
    "unknown layer": (lambda: Scale(4), randn(SAMPLES, 3, 4)),
    "unknown layer, folded": (lambda: Scale(4), randn(SAMPLES * 3, 4)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2), randn(SAMPLES, 2, 4, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), randn(SAMPLES, 2, 3, 3, 3)),
    "bilinear": (lambda: nn.Bilinear(3, 3, 2), randn(SAMPLES, 3)),
    "prelu": (lambda: nn.PReLU(4), randn(SAMPLES, 4)),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), randn(SAMPLES, 2, 3)),
    "two outputs": (TwoOutputs, randn(SAMPLES, 4)),
}
CALLS = {
    "bilinear": lambda layer, x: layer(x, x.cos()),
    "unknown layer": lambda layer, x: layer(x, power=2),
    "two outputs": lambda layer, x: (lambda out: torch.cat([out["sum"], out["wave"][0]], 1))(
        layer(x, shift=torch.full((4,), 0.1, dtype=x.dtype))
    ),
}


def check(model, x, exact=1e-12, **options):
    """Every per-sample gradient, as the K = B gradients with one sample each."""
    engine = PerSample(model, on_failure="error", **options).attach()
    terms = model(x)
    truth = [torch.autograd.grad(term, engine.params, retain_graph=True) for term in terms]
    mixing = torch.randn(7, len(terms), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    each = engine.gradients(terms, torch.eye(len(terms)), store="dense", retain_graph=True)
    mixed = engine.gradients(terms, mixing, store="dense", retain_graph=True)
    kept = engine.gradients(terms, mixing, store="factored", retain_graph=True)
    engine.detach()
    for n in range(len(engine.params)):
        rows = torch.stack([grads[n] for grads in truth])
        combined = torch.einsum("kb,b...->k...", mixing, rows)
        for found, expected in ((each, rows), (mixed, combined), (kept, combined)):
            assert float((found.blocks[n] - expected).abs().max()) <= exact * max(1, float(expected.abs().max()))
    assert engine.report.rank == 1
    return engine


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_splits_over_its_samples(name):
    make, data = LAYERS[name]
    torch.manual_seed(0)
    check(Wrapped(make().double(), call=CALLS.get(name)), data())


@pytest.mark.parametrize("layer", [lambda: nn.Linear(3, 4), lambda: nn.LayerNorm(3), lambda: Scale(3)])
def test_the_batch_may_be_another_dimension(layer):
    check(Wrapped(layer().double(), dim=1), randn(7, SAMPLES, 3)(), batch_dim={"layer": 1, "other": 2})


def test_only_the_parameters_asked_for_are_collected():
    model = Wrapped(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)).double())
    model.layer[0].weight.requires_grad_(False)
    check(model, randn(SAMPLES, 3)())
    chosen = [model.layer[3].weight, model.layer[0].bias]
    engine = PerSample(model, chosen).attach()
    jacobian = engine.gradients(model(randn(SAMPLES, 3)()), torch.eye(SAMPLES))
    assert [tuple(block.shape[1:]) for block in jacobian.blocks] == [(2, 4), (4,)]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("layer", ["encoder", "cross attention"])
def test_multihead_attention_splits(layer, packed):
    torch.manual_seed(0)
    if layer == "encoder":
        model = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=packed).double()
        call = None
    else:
        model = nn.MultiheadAttention(4, 2, kdim=None if packed else 3, vdim=None if packed else 3, batch_first=packed)
        model = model.double()
        memory = randn(SAMPLES, 6, 4 if packed else 3)()
        memory = memory if packed else memory.transpose(0, 1)
        call = lambda layer, x: layer(x, memory, memory)[0]  # noqa: E731
    x = randn(SAMPLES, 3, 4)()
    engine = check(
        Wrapped(model, dim=0 if packed else 1, call=call),
        x if packed else x.transpose(0, 1),
        batch_dim={"layer": 0 if packed else 1},
    )
    assert not engine.unsupported


def test_a_layer_that_is_called_with_keywords_splits():
    check(Wrapped(nn.Linear(3, 4).double(), call=lambda layer, x: layer(input=x)), randn(SAMPLES, 3)())


def test_functional_padding_is_that_of_the_layer():
    # A guard for the tests above: the layers with padding see something else at the border than zeros.
    layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))
