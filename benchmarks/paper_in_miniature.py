"""MARBLE's main comparison in miniature: does balancing pay, and when?

Every mode trains the tiny model on the same budget of pictures and steps, at the same standard deviation of the
combined advantage, from the same base, with the same seeds, under two scalings of the rewards: ``in_the_wild`` (general
rewards vary little among pictures of one prompt, specialists ten times as much, as the real ones do) and its reverse.
Final rewards are measured on held-out prompts with prompts and noise that all runs share, as they are, whatever they
were scaled with in training. Intervals are 95 % over the seeds (Student's t); differences from fixed coefficients are
paired by seed. Only seeds that every mode of a scaling has finished count.

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
from mogb_diffusion.rewards.world import REWARDS
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
            "evaluation.prompts=[]", "tracking.samples_every=0", "checkpoints={every: 5, keep_last: 1}",
        ],
    )  # fmt: skip


def train(run: Run, folder: Path) -> dict[str, Any]:
    """The result of one run: scores as they are (rewards unscaled), and the minutes of the processor that it took."""
    path = folder / "result.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    begun = time.process_time()
    trainer = Trainer(run, folder)
    trainer.train(resume=True)
    minutes = (time.process_time() - begun) / 60
    result = {"scores": examine(trainer), "base": base_scores(trainer, folder.parent / "base.json"), "minutes": minutes}
    trainer.close()
    path.write_text(json.dumps(result, indent=1) + "\n")
    return result


def examine(trainer: Trainer) -> dict[str, float]:
    """Mean rewards as they are on held-out prompts, with the noise that all runs share."""
    for reward in trainer.examiner.rewards.values():
        reward.factor = 1.0  # type: ignore[attr-defined]
    common = load_run("tiny", [f"evaluation.images={trainer.run.evaluation.images}"])
    scores, _ = evaluate(trainer.model, trainer.examiner, evaluation_prompts(common), common, trainer.ranks)
    return {name: score.mean for name, score in scores.items()}


def base_scores(trainer: Trainer, path: Path) -> dict[str, float]:
    """The same of the base model, once for all runs."""
    if not path.exists():
        with trainer.policy.reference():
            path.write_text(json.dumps(examine(trainer), indent=1) + "\n")
    found: dict[str, float] = json.loads(path.read_text())
    return found


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
            mode: np.array([[run["scores"][name] - run["base"][name] for name in names] for run in runs])
            for mode, runs in modes.items()
        }
        everything = np.concatenate(list(gains.values()))
        centre, spread = everything.mean(axis=0), everything.std(axis=0)
        spread[spread == 0] = 1
        composites = {mode: ((rows - centre) / spread).mean(axis=1) for mode, rows in gains.items()}
        summary[scaling] = {"names": names, "modes": {}}
        for mode, rows in gains.items():
            summary[scaling]["modes"][mode] = {
                "gains": [interval(column.tolist()) for column in rows.T],
                "composite": interval(composites[mode].tolist()),
                "worst": interval(((rows - centre) / spread).min(axis=1).tolist()),
                "worst_gain": interval(rows.min(axis=1).tolist()),
                "against_fixed": interval((composites[mode] - composites["fixed"]).tolist())
                if "fixed" in composites else None,
                "seeds": len(rows),
                "minutes": float(np.mean([run["minutes"] for run in modes[mode]])),
            }  # fmt: skip
    return summary


def as_markdown(summary: dict[str, Any]) -> str:
    """One table per scaling, and what it says."""
    parts = []
    for scaling, found in summary.items():
        rows = []
        for mode, r in found["modes"].items():
            against = r["against_fixed"]
            rows.append((
                mode, *(f"{m:+.3f} ± {h:.3f}" for m, h in r["gains"]),
                f"{r['worst_gain'][0]:+.3f} ± {r['worst_gain'][1]:.3f}",
                *(f"{m:+.2f} ± {h:.2f}" for m, h in (r["composite"], r["worst"])),
                "" if against is None or mode == "fixed" else f"{against[0]:+.2f} ± {against[1]:.2f}",
                f"{r['minutes']:.1f}",
            ))  # fmt: skip
        header = (
            "mode", *found["names"], "worst gain", "composite z", "worst z", "composite less that of fixed", "minutes",
        )  # fmt: skip
        parts.append(f"### {scaling}\n\n{table(header, rows)}\n\n{verdict(found['modes'])}")
    return "\n\n".join(parts)


def verdict(modes: dict[str, Any]) -> str:
    """Which modes differ from fixed coefficients by more than the interval of the difference."""
    if "fixed" not in modes:
        return ""
    against = {mode: r["against_fixed"] for mode, r in modes.items() if mode != "fixed"}
    better = [mode for mode, (mean, half) in against.items() if mean > half]
    worse = [mode for mode, (mean, half) in against.items() if mean < -half]
    told = [f"better than fixed coefficients beyond the interval: {', '.join(better)}"] if better else []
    told += [f"worse: {', '.join(worse)}"] if worse else []
    told = told or ["no mode differs from fixed coefficients beyond the interval"]
    return f"Composite: {'; '.join(told)}."


def draw_curves(out: Path, results: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Rewards of the rollouts, as they are, over the epochs: means over seeds and over three epochs."""
    from matplotlib.figure import Figure

    recipe = load_run("tiny")
    figure = Figure(figsize=(15, 2.9 * len(results)), layout="constrained", dpi=110)
    axes = figure.subplots(len(results), len(recipe.rewards), squeeze=False)
    for line, (scaling, modes) in zip(axes, results.items(), strict=True):
        for reward, axis in zip(recipe.rewards, line, strict=True):
            factor = REWARDS[reward.name](scale=scaling).factor
            for mode, runs in modes.items():
                rows = [read_metrics(out / f"{scaling}-{mode}-{seed}") for seed in range(len(runs))]
                series = [[r["rewards"][reward.label] for r in found if r["kind"] == "epoch"] for found in rows]
                mean = np.nanmean(np.array(series, dtype=float), axis=0) / factor
                smooth = np.convolve(mean, np.ones(3) / 3, mode="valid")
                axis.plot(np.arange(len(smooth)) + 2, smooth, lw=1.2, label=mode)
            axis.set_title(f"{reward.label}, {scaling}", fontsize=8)
            axis.set_xlabel("epoch", fontsize=7)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.25)
    axes[0][0].legend(fontsize=6)
    figure.savefig(RESULTS / "paper_in_miniature.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/miniature", metavar="DIR")
    parser.add_argument("--modes", default=",".join(MODES), help="with commas between")
    parser.add_argument("--scalings", default=",".join(SCALINGS), help="also as_is")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--epochs", type=int, default=10, metavar="N")
    parser.add_argument("--images", type=int, default=408, metavar="N", help="evaluation pictures")
    parser.add_argument("--only-table", action="store_true", help="of the runs that are finished")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out, modes, scalings = Path(options.out), options.modes.split(","), options.scalings.split(",")
    results: dict[str, dict[str, list[dict[str, Any]]]] = {
        scaling: {mode: [] for mode in modes} for scaling in scalings
    }
    for seed in range(options.seeds):  # all modes with one seed before the next one: an early table is a fair one
        for scaling in scalings:
            found = {}
            for mode in modes:
                run = make_run(mode, scaling, seed, options.epochs, options.images)
                if options.only_table and not (out / run.name / "result.json").exists():
                    continue
                found[mode] = train(run, out / run.name)
                print(f"{run.name}: {found[mode]['scores']}", flush=True)
            for mode, result in found.items() if len(found) == len(modes) else ():
                results[scaling][mode].append(result)
    finished = {scaling: by_mode for scaling, by_mode in results.items() if all(by_mode.values())}
    if not finished:
        raise SystemExit("No seed is finished in all modes yet.")
    summary = summarize(finished)
    told = ", ".join(f"{len(next(iter(by_mode.values())))} seeds {scaling}" for scaling, by_mode in finished.items())
    payload = {"provenance": provenance(0), "options": vars(options), "summary": summary, "runs": finished}
    head = (
        f"Gains over the base on {options.images} held-out pictures with common noise after {options.epochs} epochs; "
        f"{told}; equal deviation of the combined advantage; rewards are measured as they are. z: gains standardized "
        "over all runs of a table. ±: 95 % intervals over seeds. minutes: of the processor, for the training.\n\n"
    )
    write("paper_in_miniature", payload, head + as_markdown(summary))
    draw_curves(out, finished)


if __name__ == "__main__":
    main()
