"""Time per call of every method, mogb and TorchJD on the same Jacobians, interleaved in one process.

    python benchmarks/aggregators.py [--repeats 15] [--seed 0] [--quick]

Float32 Jacobians [K, N] on one CPU thread, K in {2, 5, 16, 64, 256}, N in {1e4, 1e6}; the rows conflict mildly (half of
their mean is subtracted) and their norms differ by up to a factor of 10. Speed without accuracy means nothing, so
every cell of a peer carries the relative error of its direction, against a solution in extended precision where there
is one for the method and K <= 64, and against ours otherwise. A call that would take minutes is not made: the cell
says what the next smaller one took.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _common import interleaved, provenance, table, write
from _reference import cagrad, config, dualproj, fairgrad, imtl_g, mgda, nash_mtl, upgrad
from rich.progress import track

import mogb

Call = Callable[[torch.Tensor], torch.Tensor]
SIZES = (2, 5, 16, 64, 256)
LENGTHS = (10_000, 1_000_000)
ACCURATE = 1e-3
TOO_LONG = 20.0  # seconds: a peer that took longer in a smaller cell is not called in a larger one

TRUTHS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mgda": mgda,
    "upgrad": upgrad,
    "dualproj": dualproj,
    "cagrad": cagrad,
    "nash_mtl": nash_mtl,
    "fairgrad": fairgrad,
    "imtl_g": imtl_g,
    "config": config,
}


def pairs() -> dict[str, tuple[Callable[[int], Call], Callable[[int], Call] | None]]:
    """Every method of mogb's first list, with its counterpart in TorchJD at the same settings."""
    from torchjd import aggregation as peer

    return {
        "mean": (lambda k: mogb.make("weighted_sum"), lambda k: peer.Mean()),
        "sum": (lambda k: mogb.make("weighted_sum", weights=[1.0] * k), lambda k: peer.Sum()),
        "mgda": (lambda k: mogb.make("mgda"), lambda k: peer.MGDA()),
        "marble": (lambda k: mogb.make("marble"), None),
        "pcgrad": (lambda k: mogb.make("pcgrad"), lambda k: peer.PCGrad()),
        "nash_mtl": (lambda k: mogb.make("nash_mtl", max_norm=0), lambda k: peer.NashMTL(n_tasks=k, max_norm=0.0)),
        "cagrad": (lambda k: mogb.make("cagrad", c=0.5, rescale=0), lambda k: peer.CAGrad(c=0.5)),
        "imtl_g": (lambda k: mogb.make("imtl_g"), lambda k: peer.IMTLG()),
        "aligned_mtl": (lambda k: mogb.make("aligned_mtl"), lambda k: peer.AlignedMTL()),
        "upgrad": (lambda k: mogb.make("upgrad"), lambda k: peer.UPGrad()),
        "dualproj": (lambda k: mogb.make("dualproj"), lambda k: peer.DualProj()),
        "config": (lambda k: mogb.make("config"), lambda k: peer.ConFIG()),
        "fairgrad": (lambda k: mogb.make("fairgrad"), lambda k: peer.FairGrad(alpha=1.0)),
        "graddrop": (lambda k: mogb.make("graddrop"), lambda k: peer.GradDrop()),
        "rlw": (lambda k: mogb.make("rlw"), lambda k: peer.Random()),
    }


def jacobian_of(size: int, length: int, seed: int) -> torch.Tensor:
    """Float32 rows that conflict mildly, with norms spread over a factor of ten."""
    generator = torch.Generator().manual_seed(seed * 1000 + size)
    rows = torch.randn(size, length, generator=generator)
    rows -= 0.5 * rows.mean(dim=0)
    rows *= 10 ** torch.rand(size, 1, generator=generator)
    return rows


def truth_of(method: str, jacobian: torch.Tensor) -> torch.Tensor | None:
    """The exact direction in float64, where an independent solution is affordable."""
    size, length = jacobian.shape
    if method in ("mean", "sum"):
        return jacobian.double().sum(0) / (size if method == "mean" else 1)
    if method not in TRUTHS or size > 64:
        return None
    rows = jacobian.double()
    if length > 20_000:  # an orthogonal change of basis keeps every inner product, and makes the rows short
        rows = torch.linalg.qr(rows.mT, mode="r").R.mT
    weights = TRUTHS[method](rows.numpy())
    return torch.from_numpy(weights.astype(float)) @ jacobian.double()


def compare_scaled(method: str, direction: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error; AlignedMTL sums over the tasks here and averages there, so only its direction is compared."""
    direction = direction.double()
    if method == "aligned_mtl":
        direction, truth = direction / direction.norm(), truth / truth.norm()
    return float((direction - truth).norm() / truth.norm())


def run_cell(method: str, size: int, length: int, repeats: int, seed: int, skip_peer: float | None) -> dict[str, Any]:
    """Both implementations of one method on one Jacobian."""
    make_ours, make_theirs = pairs()[method]
    jacobian = jacobian_of(size, length, seed)
    ours = make_ours(size)
    calls: dict[str, Callable[[], object]] = {"mogb": lambda: ours(jacobian)}
    cell: dict[str, Any] = {"method": method, "K": size, "N": length}
    our_direction = ours(jacobian)
    truth = truth_of(method, jacobian)
    if truth is not None:
        cell["mogb_error"] = compare_scaled(method, our_direction, truth)
    if make_theirs is not None and skip_peer is None:
        theirs = make_theirs(size)
        calls["torchjd"] = lambda: theirs(jacobian)
        try:
            direction = theirs(jacobian)
        except Exception as error:  # a peer's crash is a cell of the table
            cell["torchjd_failure"] = f"{type(error).__name__}"
            del calls["torchjd"]
        else:
            if method not in ("rlw", "graddrop", "pcgrad"):  # these draw random numbers
                cell["torchjd_error"] = compare_scaled(
                    method, direction, our_direction.double() if truth is None else truth
                )
    elif make_theirs is not None:
        cell["torchjd_skipped"] = skip_peer
    seconds = interleaved(calls, repeats)
    return cell | seconds


def text_of(cells: list[dict[str, Any]]) -> str:
    """The printed table: one row per method and N, one column per K."""
    sizes = sorted({cell["K"] for cell in cells})
    header = ["method", "N", *(f"K = {size}" for size in sizes)]
    rows = []
    for method, length in dict.fromkeys((cell["method"], cell["N"]) for cell in cells):
        mine = {cell["K"]: cell for cell in cells if (cell["method"], cell["N"]) == (method, length)}
        rows.append([method, f"{length:.0e}", *(_entry(mine[k]) if k in mine else "" for k in sizes)])
    lead = (
        "Milliseconds per call: mogb / TorchJD 0.18 (ratio); in brackets TorchJD's relative error where above 1e-3.\n\n"
    )
    return lead + table(header, rows) + "\n\n" + _verdict(cells)


def _entry(cell: dict[str, Any]) -> str:
    ours = f"{cell['mogb'] * 1e3:.3g}"
    if "torchjd_skipped" in cell:
        return f"{ours} / not run ({cell['torchjd_skipped']:.0f} s at a smaller K)"
    if "torchjd_failure" in cell:
        return f"{ours} / {cell['torchjd_failure']}"
    if "torchjd" not in cell:
        return ours
    text = f"{ours} / {cell['torchjd'] * 1e3:.3g} ({cell['torchjd'] / cell['mogb']:.1f}x)"
    error = cell.get("torchjd_error", 0.0)
    return text + (f" [{error:.0e}]" if not error <= ACCURATE else "")


def _verdict(cells: list[dict[str, Any]]) -> str:
    comparable = [c for c in cells if "torchjd" in c and c["method"] not in ("mean", "sum")]
    fair = [c for c in comparable if c.get("torchjd_error", 0.0) <= ACCURATE]
    slower = [c for c in fair if c["mogb"] > c["torchjd"]]
    plain = [c for c in cells if "torchjd" in c and c["method"] in ("mean", "sum")]
    late = max((c["mogb"] - c["torchjd"] for c in plain), default=0.0)
    small = [c["torchjd"] / c["mogb"] for c in comparable if c["method"] in ("nash_mtl", "cagrad") and c["K"] <= 5]
    named = ", ".join(f"{c['method']} K={c['K']} N={c['N']:.0e}" for c in slower) or "none"
    small_text = f"{min(small):.0f} times" if small else "not measured"
    return (
        f"TorchJD answers to 1e-3 in {len(fair)} of {len(comparable)} cells; mogb is slower in: {named}. "
        f"Mean and sum: at most {late * 1e6:.0f} µs behind. Nash-MTL and CAGrad, K <= 5: at least {small_text} faster."
    )


def main() -> None:
    """Runs every cell and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="the K to measure, such as 2,5,16")
    parser.add_argument("--quick", action="store_true", help="K up to 16, N = 1e4, nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    asked = tuple(int(size) for size in options.sizes.split(","))
    sizes, lengths = (SIZES[:3], LENGTHS[:1]) if options.quick else (asked, LENGTHS)
    cells: list[dict[str, Any]] = []
    for method, length in track([(m, n) for n in lengths for m in pairs()], description="aggregators"):
        skip = None
        for size in sizes:
            cell = run_cell(method, size, length, options.repeats, options.seed, skip)
            cells.append(cell)
            if cell.get("torchjd", 0.0) > TOO_LONG:
                skip = cell["torchjd"]
    text = text_of(cells)
    if options.quick:
        print(text)
    else:
        seconds = round(time.perf_counter() - start)
        write("aggregators", {"provenance": provenance(options.seed), "seconds": seconds, "cells": cells}, text)


if __name__ == "__main__":
    main()
