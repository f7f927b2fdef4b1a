"""The per-sample engine against K ordinary backward passes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mogb.engines.per_sample import PerSample

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention, self.before, self.after = Attention(width, heads), nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        x = x + self.attention(self.before(x))
        return x + self.feed(self.after(x))


class Transformer(nn.Module):
    """Tokens in, a vector per token out."""

    def __init__(self, width: int = 8, depth: int = 2, dropout: float = 0.0, recompute: bool | str = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width, dropout=dropout) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            if self.recompute == "tape" and torch.is_grad_enabled():
                x = self.engine.checkpoint(block, x)
            elif self.recompute:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(x)


class Lora(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + 0.5 * self.b(self.a(x))


def with_lora(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, Attention):
            for name in ("query", "key", "value", "out"):
                setattr(module, name, Lora(getattr(module, name)))
    return model


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1)) for _ in range(2)
        )
        self.down = nn.Conv2d(4, 6, 2, stride=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(torch.relu(self.down(x)).mean((2, 3)))


class Tied(nn.Module):
    """The table of the embedding is the matrix of the head, and one layer is used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for _ in range(3):
            x = torch.tanh(self.middle(x))
        return self.head(x)


def tokens(generator, samples, vocabulary=11):
    return torch.randint(vocabulary, (samples, 5), generator=generator)


MODELS = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)),
        lambda g, b: torch.randn(b, 6, generator=g, dtype=torch.float64),
    ),
    "cnn": lambda: (Convolutional(), lambda g, b: torch.randn(b, 2, 6, 6, generator=g, dtype=torch.float64)),
    "transformer": lambda: (Transformer(), tokens),
    "lora": lambda: (with_lora(Transformer()), tokens),
    "checkpointed lora": lambda: (with_lora(Transformer(recompute=True)), tokens),
    "dropout": lambda: (Transformer(dropout=0.5), tokens),
    "taped lora": lambda: (with_lora(Transformer(recompute="tape")), tokens),
    "taped dropout": lambda: (Transformer(dropout=0.5, recompute="tape"), tokens),
    "checkpointed dropout": lambda: (Transformer(dropout=0.5, recompute=True), tokens),
    "tied": lambda: (Tied(), lambda g, b: tokens(g, b, 7)),
}


def make(name, dtype=torch.float64, samples=4, seed=0):
    torch.manual_seed(seed)
    model, inputs = MODELS[name]()
    x = inputs(torch.Generator().manual_seed(seed), samples)
    return model.to(dtype), x.to(dtype) if x.is_floating_point() else x


def two_terms(output, step=0.3):
    """Squared distances to a target, of points on either side of the output of an old policy."""
    v = output.double()
    generator = torch.Generator().manual_seed(5)
    old = v.detach() + 0.2 * torch.randn(v.shape, generator=generator, dtype=v.dtype)
    target = torch.randn(v.shape, generator=generator, dtype=v.dtype)
    near, far = old + step * (v - old), old - step * (v - old)
    return torch.stack([(near - target).flatten(1).square().mean(1), (far - target).flatten(1).square().mean(1)], 1)


def coefficients(objectives, samples, terms=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(objectives, samples, 1, generator=generator, dtype=torch.float64)
    return torch.cat([share, 1 - share], 2)[:, :, :terms] / samples


def k_backward_passes(terms, weights, params):
    """What the engine is compared with: one ordinary backward pass per objective."""
    losses = torch.einsum("kbj,bj->k", weights.to(terms.dtype), terms)
    rows = [torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True) for loss in losses]
    return [
        torch.stack([torch.zeros_like(param) if row[n] is None else row[n] for row in rows])
        for n, param in enumerate(params)
    ]


def deviation(jacobian, truth):
    """The largest deviation of an entry, relative to the largest entry of its gradient."""
    found = torch.cat([block.flatten(1) for block in jacobian.blocks], 1)
    exact = torch.cat([block.flatten(1) for block in truth], 1)
    return float(((found - exact).abs().amax(1) / exact.abs().amax(1)).max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("store", ["dense", "factored"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_those_of_one_backward_pass_per_objective(name, store, dtype):
    model, x = make(name, dtype)
    weights = coefficients(5, len(x))
    with PerSample(model, on_failure="error") as engine:
        object.__setattr__(model, "engine", engine)
        for _ in range(2):  # the first one with the self-check, the second one without
            terms = two_terms(model(x))
            truth = k_backward_passes(terms, weights, engine.params)
            jacobian = engine.gradients(terms, weights, store=store)
            assert deviation(jacobian, truth) <= TOLERANCE[dtype]
    assert engine.report.passes == engine.report.rank == 2
    assert len(jacobian) == 5
    assert all(param.grad is None for param in model.parameters())
