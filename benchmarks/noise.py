"""When does a Gramian without noise balance better? Noisy bowls and specialists, weights from one batch each.

Every batch consists of two halves. The direction is always that of the whole batch; only the Gramian that the weights
are solved on differs:

* plain: of the whole batch, noise included;
* unbiased: without the noise, of this step alone (``Unbiased``);
* unbiased, 0.9 and 0.99: the same, averaged over the steps;
* smoothed weights: plain, with the weights averaged over the steps (``Smoothed``, 0.9);
* exact: of the exact gradients, which nobody has; what a perfect estimate of the Gramian would give.

``python benchmarks/noise.py`` takes about four minutes on one core.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _common import provenance, table, write

import mogb
from mogb.base import Aggregator
from mogb.compare.optimizers import make_optimizer
from mogb.jacobian import Jacobian
from mogb.metrics.conflict import harmony
from mogb.noise import Unbiased, estimate_noise, pooled
from mogb.problems.base import Problem
from mogb.problems.bowls import Bowls
from mogb.problems.specialists import Specialists
from mogb.wrappers.normalized import Normalized
from mogb.wrappers.smoothed import Smoothed

Make = Callable[[], Aggregator]
METHODS: dict[str, Make] = {
    "mgda": lambda: mogb.make("mgda"),
    "normalized(mgda)": lambda: Normalized(mogb.make("mgda")),
    "upgrad": lambda: mogb.make("upgrad"),
    "nash_mtl": lambda: mogb.make("nash_mtl"),
}
# Where one batch is looked at many times; the noise of one of the two halves.
PLACES: dict[str, tuple[Callable[[], Problem], int]] = {
    "bowls, start, noise 0.2": (lambda: Bowls(noise=0.2 * 2**0.5), 0),
    "bowls, start, noise 1": (lambda: Bowls(noise=2**0.5), 0),
    "bowls, start, noise 5": (lambda: Bowls(noise=5 * 2**0.5), 0),
    "bowls, start, noise 20": (lambda: Bowls(noise=20 * 2**0.5), 0),
    "specialists, start, 2 x 4 prompts": (lambda: Specialists(groups=4), 1),
    "specialists, start, 2 x 16 prompts": (lambda: Specialists(groups=16), 1),
    "specialists, start, 2 x 64 prompts": (lambda: Specialists(groups=64), 1),
    "specialists, start, 2 x 256 prompts": (lambda: Specialists(groups=256), 1),
}
TRAINED: dict[str, Callable[[], Problem]] = {
    "bowls, noise 0.2": lambda: Bowls(noise=0.2 * 2**0.5),
    "bowls, noise 1": lambda: Bowls(noise=2**0.5),
    "bowls, noise 5": lambda: Bowls(noise=5 * 2**0.5),
    "specialists, 2 x 4 prompts": lambda: Specialists(groups=4),
    "specialists, 2 x 16 prompts": lambda: Specialists(groups=16),
    "specialists, 2 x 64 prompts": lambda: Specialists(groups=64),
}
EXACT = "exact"
WAYS: dict[str, Callable[[Make], Aggregator]] = {
    "plain": lambda make: make(),
    "unbiased": lambda make: Unbiased(make()),
    "unbiased, 0.9": lambda make: Unbiased(make(), decay=0.9),
    "unbiased, 0.99": lambda make: Unbiased(make(), decay=0.99),
    "smoothed weights": lambda make: Smoothed(make(), decay=0.9),
    EXACT: lambda make: make(),
}


def draw(problem: Problem, x: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of two independent half-batches at every point, ``[S, K, N]`` each."""
    return problem.jacobian(x, generator)[1], problem.jacobian(x, generator)[1]


def direction(agg: Aggregator, first: torch.Tensor, second: torch.Tensor, exact: torch.Tensor, way: str) -> np.ndarray:
    """Of the whole batch, with weights from what the way looks at."""
    whole = (first + second) / 2
    if isinstance(agg, Unbiased):
        return agg.direct(Jacobian((torch.cat([first, second]),)), np.ones(2 * len(first)))[0][0].numpy()
    seen = exact if way == EXACT else whole
    weights = agg._solve(Jacobian((seen,)).gramian(), np.ones(len(first))).weights
    return weights @ whole.numpy()


def look(problem: Problem, start: int, draws: int, seed: int) -> dict[str, Any]:
    """Many batches at one point: how the directions agree with the exact gradients."""
    x = problem.starts()[start][None]
    exact = problem.jacobian(x)[1][0]
    generator = torch.Generator().manual_seed(seed)
    batches = [tuple(half[0] for half in draw(problem, x, generator)) for _ in range(draws)]
    found: dict[str, Any] = {"signal_share": pooled(estimate_noise(*batch) for batch in batches).signal_share.tolist()}
    for method, make in METHODS.items():
        found[method] = {}
        for way in ("plain", "unbiased", EXACT):
            steps = np.array([direction(WAYS[way](make), *batch, exact, way) for batch in batches])
            seen = harmony(steps, np.broadcast_to(exact.numpy(), (draws, *exact.shape)))
            found[method][way] = {"held_out_min_cosine": seen.minimum, "held_out_conflicts": seen.conflict_rate}
    return found


def train(problem: Problem, method: str, way: str, seed: int) -> list[float]:
    """The distance to the front from every published start, averaged over the last tenth of a quick run."""
    settings = problem.settings
    x = problem.starts().numpy().copy()
    aggregators = [WAYS[way](METHODS[method]) for _ in x]
    optimizer = make_optimizer(settings.optimizer, settings.quick_lr, x.shape)
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for step in range(settings.quick_steps):
        here = torch.from_numpy(x)
        first, second = draw(problem, here, generator)
        exact = problem.jacobian(here)[1] if way == EXACT else first
        steps = [direction(agg, *rows, way) for agg, *rows in zip(aggregators, first, second, exact, strict=True)]
        x = x - optimizer(np.array(steps))
        if step >= 0.9 * settings.quick_steps:
            kept.append(problem.distance_to_front(problem.losses(torch.from_numpy(x))))
    return torch.stack(kept).mean(0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=200, help="batches at one point (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="of the noise in training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    looked = {name: look(make(), start, options.draws, options.seed) for name, (make, start) in PLACES.items()}
    trained: dict[str, Any] = {}
    for name, make in TRAINED.items():
        trained[name] = {
            method: {
                way: [v for seed in range(options.seeds) for v in train(make(), method, way, options.seed + seed)]
                for way in WAYS
            }
            for method in METHODS
        }
        print(f"trained on {name}")
    payload = {
        "provenance": provenance(options.seed),
        "problems": {name: dataclasses.asdict(make()) for name, make in TRAINED.items()},  # type: ignore[call-overload]
        "draws": options.draws, "seeds": options.seeds, "at_one_point": looked, "distances": trained,
    }  # fmt: skip
    write("noise", payload, _text(looked, trained))


def _text(looked: dict[str, Any], trained: dict[str, Any]) -> str:
    first = []
    for place, found in looked.items():
        shares = ", ".join(f"{value:.2f}" for value in found["signal_share"])
        for method in METHODS:
            cells = [
                f"{found[method][way]['held_out_min_cosine']:+.2f} ({found[method][way]['held_out_conflicts']:.0%})"
                for way in ("plain", "unbiased", EXACT)
            ]
            first.append([place if method == "mgda" else "", shares if method == "mgda" else "", method, *cells])
    second = []
    for name, found in trained.items():
        for method in METHODS:
            medians = {way: float(np.median(found[method][way])) for way in WAYS}
            best = min(value for way, value in medians.items() if way != EXACT)
            cells = [
                f"**{value:.3f}**" if value == best and way != EXACT else f"{value:.3f}"
                for way, value in medians.items()
            ]
            second.append([name if method == "mgda" else "", method, *cells])
    return "\n\n".join([
        "# Noise",
        "## Many batches at one point",
        "The mean of the smallest cosine between the direction of a batch and the exact gradients, and the share of "
        "batches in which it is negative. Signal: share of the expected gradients in the squared norms of a batch, "
        "objective by objective.",
        table(["where", "signal", "method", "plain", "unbiased", "exact Gramian"], first),
        "## Training",
        "Distance to the front, averaged over the last tenth of the run; median over starting points and noise seeds. "
        "Bold: the best, the exact Gramian aside.",
        table(["problem", "method", *WAYS], second),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
