"""Jacobians on which methods go wrong, by name. Float64, [K, N]."""

import torch

SCALES = (1e-12, 1e3, 1e12)


def random(size, length, seed=0, conflict=0.0, spread=0.0):
    """Gaussian rows; ``conflict`` subtracts that share of their mean, ``spread`` is decades between the norms."""
    generator = torch.Generator().manual_seed(1000 * size + length + 7 * seed)
    rows = torch.randn(size, length, generator=generator, dtype=torch.float64)
    rows -= conflict * rows.mean(dim=0)
    decades = torch.linspace(-spread / 2, spread / 2, size, dtype=torch.float64)
    return rows * (10**decades)[torch.randperm(size, generator=generator)][:, None]


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def zoo():
    """Ordinary, degenerate and badly scaled ones. Each has at least one row that is not zero."""
    base = random(4, 9)
    return {
        "one row": rows([3.0, -4.0]),
        "two rows": rows([-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]),
        "aligned": rows([1.0, 0.0], [2.0, 0.1]),
        "random 3": random(3, 8),
        "random 5 in conflict": random(5, 12, conflict=0.9),
        "random 8 in conflict": random(8, 40, conflict=0.95, spread=1.0),
        "random 16": random(16, 40, conflict=0.5),
        "more rows than columns": random(7, 3),
        "nearly stationary": random(5, 20, conflict=1 - 1e-4),
        "hardly not stationary": random(5, 20, conflict=1 - 1e-6),
        "stationary": random(5, 20, conflict=1.0),
        "zero row": torch.cat([base, torch.zeros(1, 9, dtype=torch.float64)]),
        "all but one zero": rows([0.0, 0.0], [0.0, 0.0], [1.0, 2.0]),
        "duplicate rows": torch.cat([base, base[1:2], base[1:2]]),
        "parallel rows": torch.cat([base, 10 * base[2:3]]),
        "equal rows": rows([1.0, 2.0, 3.0]).repeat(4, 1),
        "opposite rows": torch.cat([base, -base[:1]]),
        "opposite pair": rows([1.0, 1.0], [-1.0, -1.0]),
        "opposite pair of two lengths": rows([1.0, 2.0], [-3.0, -6.0]),
        "two opposite pairs": rows([1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]),
        "spread of 1e6": random(6, 20, conflict=0.8, spread=6.0),
        "spread of 1e6, two rows": rows([1e-3, 0.0], [-1e3, 2e3]),
        "spread of 1e6, more rows than columns": random(6, 4, spread=6.0),
        "tiny": random(4, 9, conflict=0.8) * 1e-12,
        "huge": random(4, 9, conflict=0.8) * 1e12,
    }
