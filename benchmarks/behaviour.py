"""What every method does, in a few numbers each: from a finished comparison, and from timing its small problem.

    mogb compare --quick --methods ALL --out runs/all     (ALL: every name of mogb list, with commas between)
    python benchmarks/behaviour.py runs/all

Writes ``results/behaviour.json`` and ``.md``, and ``mogb/behaviour.json``, which ``mogb recommend`` answers from.
"""

import argparse
import json
import pathlib
import time
from typing import Any

import numpy as np
import torch
from _common import provenance, table, write

import mogb
from mogb.base import needs_losses
from mogb.compare.findings import scaled_pairs, shifts
from mogb.compare.merge import read_summary
from mogb.compare.summary import Summary
from mogb.problems import make_problem

SIZES = (4, 64)
PACKAGED = pathlib.Path(mogb.__file__).parent / "behaviour.json"
ABOUT_LOSSES = ("needs losses", "ratios of losses", "length of its loss")  # how methods refuse losses below zero


def figures(summary: Summary, method: str) -> dict[str, Any]:
    """Of one method over all problems of a comparison."""
    distance, coverage = summary.distance_ranking, summary.coverage_ranking
    assert distance is not None
    assert coverage is not None
    at = distance.methods.index(method)
    rows = [row for row in summary.rows if row["method"] == method]
    moved = [shifts(summary, plain, scaled, method) for plain, scaled in scaled_pairs(summary)]
    noisy = [row for row in rows if make_problem(row["problem"]).stochastic]
    errors = [row["error"] for row in rows if row["error"]]
    return {
        "rank": _three(distance.overall[at], distance.overall_low[at], distance.overall_high[at]),
        "coverage_rank": _three(coverage.overall[at], coverage.overall_low[at], coverage.overall_high[at]),
        "arrived": _mean([row["arrived"] for row in rows]),
        "conflicts": _mean([row["conflict_rate"] for row in rows]),
        "held_out_conflicts": (
            None if any(row["failed"] for row in noisy) else _mean([row["held_out_conflict_rate"] for row in noisy])
        ),
        "scale_shift": _mean([float(np.median(found)) for found in moved if found is not None]),
        "runs": sum(row["runs"] for row in rows), "failed": sum(row["failed"] for row in rows),
        "refused_losses": any(text in error for error in errors for text in ABOUT_LOSSES),
    }  # fmt: skip


def microseconds(name: str, size: int, repeats: int = 7, calls: int = 20) -> float | None:
    """The fastest of several averages over some solves; None for a method without weights."""
    agg = mogb.make(name)
    if not agg.yields_weights:
        return None
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(size, 2 * size, generator=generator, dtype=torch.float64)
    gramian = (rows @ rows.mT).numpy()
    losses = np.linspace(0.5, 2.0, size) if needs_losses(agg) else np.ones(size)
    agg.parameters()
    best = float("inf")
    for _ in range(repeats):
        spent = 0.0
        for _ in range(calls):
            start = time.perf_counter()
            agg._solve(gramian, losses)
            spent += time.perf_counter() - start
            if "update" in agg.phases:
                agg.update(torch.from_numpy(losses))
            if "end_epoch" in agg.phases:
                agg.end_epoch()
        best = min(best, spent / calls)
    return round(1e6 * best, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="written by mogb compare")
    options = parser.parse_args()
    torch.set_num_threads(1)
    summary = read_summary(options.folder)
    methods = {}
    for name in mogb.registered():
        timed = {f"microseconds_{size}": microseconds(name, size) for size in SIZES}
        methods[name] = figures(summary, name) | timed if name in summary.methods else timed
    about = {"problems": summary.problems, "seeds": len(summary.seeds), "quick": bool(summary.settings.get("quick"))}
    payload = {"provenance": provenance(0), "comparison": about, "methods": methods}
    PACKAGED.write_text(json.dumps(payload, indent=1) + "\n")
    write("behaviour", payload, _text(methods, about))


def _text(methods: dict[str, Any], about: dict[str, Any]) -> str:
    ranked = sorted(methods, key=lambda name: methods[name].get("rank", [np.inf])[0])
    rows = []
    for name in ranked:
        found = methods[name]
        rank = found.get("rank")
        rows.append([
            name, "-" if rank is None else f"{rank[0]:.1f} [{rank[1]:.1f}, {rank[2]:.1f}]",
            *(_percent(found.get(key)) for key in ("arrived", "conflicts", "held_out_conflicts", "scale_shift")),
            f"{found.get('failed', 0)} of {found.get('runs', 0)}",
            *("-" if (taken := found[f"microseconds_{size}"]) is None else f"{taken:.0f}" for size in SIZES),
        ])  # fmt: skip
    header = ["method", "rank", "arrived", "conflicts", "held out", "scale shift", "failed", "µs, K = 4", "µs, K = 64"]
    return "\n\n".join([
        "# Behaviour",
        f"Over {len(about['problems'])} problems, {about['seeds']} seed(s), {'quick' if about['quick'] else 'full'} "
        "length. Rank: mean by distance to the front, with its 95 % interval. Held out: conflicts with exact gradients "
        "on stochastic problems, where no run failed. Scale shift: how far rescaling one loss moves the end points, in "
        "extents of the Pareto set. µs: one solve of the small problem, none for methods that yield no weights.",
        table(header, rows),
    ])  # fmt: skip


def _three(*values: float) -> list[float]:
    return [round(float(value), 2) for value in values]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None and np.isfinite(value)]
    return round(float(np.mean(known)), 4) if known else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


if __name__ == "__main__":
    main()
