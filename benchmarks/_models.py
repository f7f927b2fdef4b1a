"""Models of four kinds, and a loss with two terms per sample, for the benchmarks of engines."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before, self.attention, self.after = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.feed(self.after(x))


class Encoder(nn.Module):
    """A transformer encoder; ``call`` says how a block is run, and so whether it is checkpointed."""

    def __init__(self, inputs: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.call: Callable[[nn.Module, Tensor], Tensor] = lambda block, x: block(x)
        self.first, self.last = nn.Linear(inputs, width), nn.Linear(width, inputs)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = self.call(block, x)
        return self.last(x)


class Lora(nn.Module):
    """A frozen layer with a trained product of two thin matrices beside it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def with_lora(model: Encoder, rank: int) -> Encoder:
    """The model with all of its own parameters frozen, and thin matrices beside the four of every attention."""
    model.requires_grad_(False)
    for block in model.blocks:
        assert isinstance(block, Block)
        for name in ("query", "key", "value", "out"):
            setattr(block.attention, name, Lora(getattr(block.attention, name), rank))
    return model


class Residual(nn.Module):
    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, channels, 3, stride, 1, bias=False),
            nn.GroupNorm(8, channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.GroupNorm(8, channels),
        )
        plain = stride == 1 and inputs == channels
        self.side = nn.Identity() if plain else nn.Conv2d(inputs, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.side(x))


def residual_network(width: int) -> nn.Sequential:
    """A small ResNet with GroupNorm."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.GroupNorm(8, width),
        nn.ReLU(inplace=True),
        Residual(width, width, 1),
        Residual(width, 2 * width, 2),
        Residual(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


@dataclass(frozen=True, eq=False)
class Case:
    """A model with a batch for it.

    Attributes:
        label: What it is, in a few words.
        model: The model.
        inputs: A batch ``[B, ...]``.
    """

    label: str
    model: nn.Module
    inputs: Tensor

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that are not frozen."""
        return [param for param in self.model.parameters() if param.requires_grad]


def make_case(name: str, quick: bool, seed: int) -> Case:
    """One of ``mlp``, ``cnn``, ``encoder`` and ``lora``."""
    torch.manual_seed(seed)
    if name == "mlp":
        width, samples = (128, 16) if quick else (512, 64)
        layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 16)]
        return Case(f"MLP, width {width}, B = {samples}", nn.Sequential(*layers), torch.randn(samples, width))
    if name == "cnn":
        width, samples, side = (8, 8, 8) if quick else (16, 16, 32)
        label = f"ResNet with GroupNorm, width {width}, {side} x {side}, B = {samples}"
        return Case(label, residual_network(width), torch.randn(samples, 3, side, side))
    width, depth, tokens, samples = (64, 2, 32, 8) if quick else (128, 3, 256, 8)
    model = Encoder(16, width, depth, 4)
    if name == "lora":
        model = with_lora(model, width // 4)
    kind = f"LoRA of rank {width // 4} on a transformer" if name == "lora" else "transformer, all weights"
    label = f"{kind}, {depth} blocks of width {width}, T = {tokens}, B = {samples}"
    return Case(label, model, torch.randn(samples, tokens, 16))


def two_terms(output: Tensor, old: Tensor, target: Tensor) -> Tensor:
    """Squared distances of two points on either side of an old output from a target, ``[B, 2]``.

    Their cotangents are parallel where the output is the old one.
    """
    step = 0.3 * (output - old)
    near, far = old + step - target, old - step - target
    return torch.stack([near.flatten(1).square().mean(1), far.flatten(1).square().mean(1)], 1)
