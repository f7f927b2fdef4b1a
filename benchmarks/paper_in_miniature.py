"""MARBLE's main comparison in miniature: does balancing pay, and when?

Every mode trains the tiny model on the same budget of pictures and steps, at the same standard deviation of the
combined advantage, from the same base, with the same seeds, under two scalings of the rewards: ``in_the_wild`` (general
rewards vary little among pictures of one prompt, specialists ten times as much, as the real ones do) and its reverse.
Final rewards are measured on held-out prompts with noise that all runs share. Intervals are 95 % over the seeds
(Student's t).

A run that is there is not repeated, and one that was interrupted goes on where it was:

    python benchmarks/paper_in_miniature.py --out runs/miniature
    python benchmarks/paper_in_miniature.py --out runs/miniature --modes marble_exact,cagrad --seeds 5
    python benchmarks/paper_in_miniature.py --out runs/miniature --only-table
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import RESULTS, provenance, table, write
from scipy import stats

from mogb_diffusion.config import Run, load_run
from mogb_diffusion.datasets import evaluation_prompts
from mogb_diffusion.evaluation import evaluate
from mogb_diffusion.tracking import read_metrics
from mogb_diffusion.trainer import Trainer

MODES = ("weighted_sum", "gdpo", "fixed", "marble", "marble_every_step", "marble_exact")
SCALINGS = ("in_the_wild", "in_the_wild_reversed")


def make_run(mode: str, scaling: str, seed: int, epochs: int, images: int) -> Run:
    """One cell of the comparison."""
    scaled = [f"rewards.{k}.options={{scale: {scaling}}}" for k in range(5)]
    return load_run(
        "tiny",
        [
            f"name={scaling}-{mode}-{seed}", f"seed={seed}", f"epochs={epochs}", *scaled,
            f"balancing={{mode: '{mode}', advantage_scale: 1.0}}", f"evaluation.images={images}",
            "tracking.samples_every=0", "checkpoints={every: 5, keep_last: 1}",
        ],
    )  # fmt: skip


def train(run: Run, folder: Path) -> dict[str, Any]:
    """The result of one run: scores as they are (rewards unscaled), and the minutes it took."""
    path = folder / "result.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    begun = time.monotonic()
    trainer = Trainer(run, folder)
    trainer.train(resume=True)
    for reward in trainer.examiner.rewards.values():  # compare rewards as they are, whatever was trained on
        reward.factor = 1.0  # type: ignore[attr-defined]
    common = load_run("tiny", [f"evaluation.images={run.evaluation.images}"])  # prompts and noise that all runs share
    prompts = evaluation_prompts(common)
    scores, _ = evaluate(trainer.model, trainer.examiner, prompts, common, trainer.ranks)
    with trainer.policy.reference():
        base, _ = evaluate(trainer.model, trainer.examiner, prompts, common, trainer.ranks)
    trainer.close()
    result = {
        "scores": {name: score.mean for name, score in scores.items()},
        "base": {name: score.mean for name, score in base.items()},
        "minutes": (time.monotonic() - begun) / 60,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    return result


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * error


def summarize(results: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Gains over the base, their composite z-score and the worst of them, by scaling and mode."""
    summary: dict[str, Any] = {}
    for scaling, modes in results.items():
        names = list(next(iter(modes.values()))[0]["scores"])
        gains = {
            mode: [[run["scores"][name] - run["base"][name] for name in names] for run in runs]
            for mode, runs in modes.items()
        }
        everything = np.array([row for rows in gains.values() for row in rows])
        centre, spread = everything.mean(axis=0), everything.std(axis=0)
        spread[spread == 0] = 1
        summary[scaling] = {"names": names, "modes": {}}
        for mode, rows in gains.items():
            z = (np.array(rows) - centre) / spread
            summary[scaling]["modes"][mode] = {
                "gains": [interval([row[k] for row in rows]) for k in range(len(names))],
                "composite": interval(z.mean(axis=1).tolist()),
                "worst": interval(z.min(axis=1).tolist()),
                "seeds": len(rows),
                "minutes": float(np.mean([run["minutes"] for run in modes[mode]])),
            }
    return summary


def as_markdown(summary: dict[str, Any]) -> str:
    """One table per scaling, and what it says."""
    parts = []
    for scaling, found in summary.items():
        rows = [
            (
                mode, *(f"{m:+.3f} ± {h:.3f}" for m, h in r["gains"]),
                *(f"{m:+.2f} ± {h:.2f}" for m, h in (r["composite"], r["worst"])), f"{r['minutes']:.1f}",
            )
            for mode, r in found["modes"].items()
        ]  # fmt: skip
        header = ("mode", *found["names"], "composite z", "worst z", "minutes")
        parts.append(f"### {scaling}\n\n{table(header, rows)}\n\n{verdict(found['modes'])}")
    return "\n\n".join(parts)


def verdict(modes: dict[str, Any]) -> str:
    """Whether any mode differs from fixed coefficients by more than the intervals."""
    if "fixed" not in modes:
        return ""
    mean, half = modes["fixed"]["composite"]
    better = [m for m, r in modes.items() if r["composite"][0] - r["composite"][1] > mean + half]
    worse = [m for m, r in modes.items() if r["composite"][0] + r["composite"][1] < mean - half]
    told = [f"better than fixed coefficients beyond both intervals: {', '.join(better)}"] if better else []
    told += [f"worse: {', '.join(worse)}"] if worse else []
    return (
        ("Composite " + "; ".join(told) + ".")
        if told
        else "No mode differs from fixed coefficients beyond the intervals."
    )


def draw_curves(out: Path, scalings: list[str], modes: list[str], seeds: int) -> None:
    """Rewards of the rollouts over the epochs, the mean over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 2.8 * len(scalings)), layout="constrained", dpi=110)
    names = load_run("tiny").reward_names
    axes = figure.subplots(len(scalings), len(names), squeeze=False)
    for line, scaling in zip(axes, scalings, strict=True):
        for name, axis in zip(names, line, strict=True):
            for mode in modes:
                runs = [read_metrics(out / f"{scaling}-{mode}-{seed}") for seed in range(seeds)]
                series = [[r["rewards"][name] for r in rows if r["kind"] == "epoch"] for rows in runs]
                axis.plot(np.array(series, dtype=float).mean(axis=0), lw=1.2, label=mode)
            axis.set_title(f"{name}, {scaling}", fontsize=8)
            axis.grid(alpha=0.25)
    axes[0][0].legend(fontsize=6)
    figure.savefig(RESULTS / "paper_in_miniature.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/miniature", metavar="DIR")
    parser.add_argument("--modes", default=",".join(MODES), help="with commas between")
    parser.add_argument("--scalings", default=",".join(SCALINGS), help="also as_is")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--epochs", type=int, default=24, metavar="N")
    parser.add_argument("--images", type=int, default=400, metavar="N", help="evaluation pictures")
    parser.add_argument("--only-table", action="store_true", help="of the runs that are finished")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out, modes, scalings = Path(options.out), options.modes.split(","), options.scalings.split(",")
    results: dict[str, dict[str, list[dict[str, Any]]]] = {
        scaling: {mode: [] for mode in modes} for scaling in scalings
    }
    for seed in range(options.seeds):  # all modes with one seed before the next one: an early table is a fair one
        for scaling in scalings:
            for mode in modes:
                run = make_run(mode, scaling, seed, options.epochs, options.images)
                if options.only_table and not (out / run.name / "result.json").exists():
                    continue
                results[scaling][mode].append(train(run, out / run.name))
                print(f"{run.name}: {results[scaling][mode][-1]['scores']}", flush=True)
    finished = {s: {m: runs for m, runs in by_mode.items() if runs} for s, by_mode in results.items()}
    finished = {s: by_mode for s, by_mode in finished.items() if by_mode}
    if not finished:
        raise SystemExit("No run is finished yet.")
    summary = summarize(finished)
    counts = sorted({r["seeds"] for found in summary.values() for r in found["modes"].values()})
    payload = {"provenance": provenance(0), "options": vars(options), "summary": summary, "runs": finished}
    head = (
        f"Gains over the base on {options.images} held-out pictures with common noise, {options.epochs} epochs, "
        f"{'-'.join(map(str, counts))} seeds, equal deviation of the combined advantage; rewards are measured as they "
        "are. z: gains standardized over all runs of a table.\n\n"
    )
    write("paper_in_miniature", payload, head + as_markdown(summary))
    if counts == [options.seeds]:
        draw_curves(out, scalings, modes, options.seeds)


if __name__ == "__main__":
    main()
