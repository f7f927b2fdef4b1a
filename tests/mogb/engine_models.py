"""Small models and losses that the tests of engines share."""

import torch
from torch import nn


class Block(nn.Module):
    """A residual block: the graph has two ways around its matrices."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def residual(depth=4, width=8, outputs=3, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), *(Block(width) for _ in range(depth)), nn.Linear(width, outputs)).to(
        dtype
    )


def batch(size=6, outputs=3, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, 5, generator=generator, dtype=dtype),
        torch.randn(size, outputs, generator=generator, dtype=dtype),
    )


def losses_of(net, inputs, targets):
    scale = torch.tensor([1.0, 30.0, 0.1], dtype=inputs.dtype)
    return scale * (net(inputs) - targets).square().mean(dim=0)


def flat_grad(params):
    return torch.cat([param.grad.flatten() for param in params])


def rows_by_hand(losses, params):
    """One autograd call per loss; zeros where a loss does not reach a parameter."""
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(params, grads, strict=True)])
        )
    return torch.stack(rows)
