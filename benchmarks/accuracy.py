"""How exact are the small solvers? mogb and TorchJD beside solutions in extended precision.

    python benchmarks/accuracy.py [--draws 20] [--seed 0] [--quick]

Random Jacobians in float64, K in {2, 3, 5, 16, 64}, row norms spread log-uniformly over a factor of 1 to 10^6, plain
(independent rows) and close to Pareto stationarity (0.95 of the mean subtracted). For every method: the worst relative
error of the direction, the worst cosine between direction and a gradient, the share of directions that conflict
with a gradient (cosine below -1e-6), and our own certified residual. TorchJD's methods are called with their defaults.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from _common import provenance, table, write
from _reference import cagrad, config, dualproj, fairgrad, imtl_g, mgda, nash_mtl, upgrad
from rich.progress import track

import mogb

SIZES = (2, 3, 5, 16, 64)
SPREADS = (1.0, 1e2, 1e4, 1e6)
KINDS = ("plain", "near-Pareto")
CONFLICT = -1e-6


@dataclass(frozen=True)
class Subject:
    """A method of mogb, its independent solution, and its counterpart in TorchJD."""

    ours: Callable[[], mogb.Aggregator]
    truth: Callable[[np.ndarray], np.ndarray]
    peer: Callable[[int], Callable[[torch.Tensor], torch.Tensor]]
    non_conflicting: bool


@dataclass
class Cell:
    """Worst figures of one implementation over the draws of one cell."""

    error: float = 0.0
    cosine: float = 1.0
    conflicts: int = 0
    failures: int = 0
    draws: int = 0
    residual: float = 0.0


def subjects() -> dict[str, Subject]:
    """The methods whose answer is defined by a small problem or a linear system."""
    from torchjd import aggregation as peer

    return {
        "mgda": Subject(lambda: mogb.make("mgda"), mgda, lambda k: peer.MGDA(), True),
        "upgrad": Subject(lambda: mogb.make("upgrad"), upgrad, lambda k: peer.UPGrad(), True),
        "dualproj": Subject(lambda: mogb.make("dualproj"), dualproj, lambda k: peer.DualProj(), True),
        "nash_mtl": Subject(
            lambda: mogb.make("nash_mtl", max_norm=0), nash_mtl, lambda k: peer.NashMTL(n_tasks=k, max_norm=0.0), True
        ),
        "fairgrad": Subject(
            lambda: mogb.make("fairgrad", alpha=2.0),
            lambda j: fairgrad(j, 2.0),
            lambda k: peer.FairGrad(alpha=2.0),
            True,
        ),
        "cagrad": Subject(lambda: mogb.make("cagrad", c=0.5, rescale=0), cagrad, lambda k: peer.CAGrad(c=0.5), False),
        "imtl_g": Subject(lambda: mogb.make("imtl_g"), imtl_g, lambda k: peer.IMTLG(), False),
        "config": Subject(lambda: mogb.make("config"), config, lambda k: peer.ConFIG(), True),
    }


def draw(size: int, spread: float, kind: str, generator: np.random.Generator) -> np.ndarray:
    """A Jacobian ``[K, 2 K + 20]``."""
    rows = generator.standard_normal((size, 2 * size + 20))
    if kind == "near-Pareto":
        rows -= 0.95 * rows.mean(axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows * np.exp(generator.uniform(0, np.log(spread), (size, 1)))


def score(cell: Cell, direction: np.ndarray, truth: np.ndarray, jacobian: np.ndarray) -> None:
    """Folds one direction into a cell."""
    cell.draws += 1
    if not np.isfinite(direction).all():
        cell.failures += 1
        return
    length = max(float(np.linalg.norm(direction)), 1e-300)
    cosine = float((jacobian @ direction / np.linalg.norm(jacobian, axis=1)).min() / length)
    cell.error = max(cell.error, float(np.linalg.norm(direction - truth) / np.linalg.norm(truth)))
    cell.cosine = min(cell.cosine, cosine)
    cell.conflicts += cosine < CONFLICT


def run_cell(subject: Subject, size: int, spread: float, kind: str, draws: int, seed: int) -> dict[str, Any]:
    """One method at one size and spread: our cell and the peer's."""
    generator = np.random.default_rng([seed, size, int(np.log10(spread)), KINDS.index(kind)])
    ours, theirs = Cell(), Cell()
    for _ in range(draws):
        jacobian = draw(size, spread, kind, generator)
        truth = (subject.truth(jacobian) @ jacobian.astype(np.longdouble)).astype(float)
        rows = torch.from_numpy(jacobian)
        solution = subject.ours().solve(rows @ rows.mT)
        ours.residual = max(ours.residual, solution.residual)
        score(ours, subject.ours()(rows).numpy(), truth, jacobian)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                score(theirs, subject.peer(size)(rows).numpy(), truth, jacobian)
        except Exception as error:  # a peer's crash is a row of the table, not the end of the benchmark
            theirs.draws += 1
            theirs.failures += 1
            print(f"TorchJD raised {type(error).__name__} at K = {size}: {str(error)[:90]}")
    return {"mogb": asdict(ours), "torchjd": asdict(theirs)}


def rows_of(cells: list[dict[str, Any]], non_conflicting: dict[str, bool]) -> list[list[str]]:
    """The printed table: worst over the spreads of each method, kind and size."""
    rows = []
    keys = dict.fromkeys((cell["method"], cell["kind"], cell["K"]) for cell in cells)
    for method, kind, size in keys:
        mine = [c for c in cells if (c["method"], c["kind"], c["K"]) == (method, kind, size)]
        row = [method, kind, str(size)]
        for who in ("mogb", "torchjd"):
            part = [c[who] for c in mine]
            draws = sum(p["draws"] for p in part)
            conflicts = f"{sum(p['conflicts'] for p in part)}/{draws}" if non_conflicting[method] else "n/a"
            row += [f"{max(p['error'] for p in part):.1e}", f"{min(p['cosine'] for p in part):+.1e}", conflicts]
            row += [str(sum(p["failures"] for p in part))] if who == "torchjd" else []
        row.append(f"{max(c['mogb']['residual'] for c in mine):.1e}")
        rows.append(row)
    return rows


def main() -> None:
    """Runs every cell and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20, help="Jacobians per cell (a quarter of it at K = 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="K up to 5, 3 draws, nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    chosen = subjects()
    sizes = SIZES[:3] if options.quick else SIZES
    draws = 3 if options.quick else options.draws
    plan = [(m, kind, k, spread) for m in chosen for kind in KINDS for k in sizes for spread in SPREADS]
    cells = []
    for method, kind, size, spread in track(plan, description="accuracy"):
        count = max(draws // 4, 2) if size >= 64 else draws
        cell = run_cell(chosen[method], size, spread, kind, count, options.seed)
        cells.append({"method": method, "kind": kind, "K": size, "spread": spread, **cell})
    header = ["method", "rows", "K", "mogb error", "mogb worst cos", "conflicts", "TorchJD error", "worst cos"]
    header += ["conflicts", "failures", "mogb certified residual"]
    text = table(header, rows_of(cells, {name: subject.non_conflicting for name, subject in chosen.items()}))
    text += "\n\nWorst over the spreads 1, 1e2, 1e4 and 1e6 of the row norms. `n/a`: theory allows conflicts."
    if options.quick:
        print(text)
    else:
        seconds = round(time.perf_counter() - start)
        write("accuracy", {"provenance": provenance(options.seed), "seconds": seconds, "cells": cells}, text)


if __name__ == "__main__":
    main()
