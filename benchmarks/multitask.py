"""Every method on three problems of real data: metrics of every task, Δm against training each task alone.

    python benchmarks/multitask.py [--methods all] [--problems digits,regression,cartpole] [--seeds 5] [--workers 1]
                                   [--tune] [--quick] [--resume] [--out benchmarks/results]

The problems are the examples of docs/examples, with their own data, networks and training loops: two overlaid digits
(K = 3: two classes and their sum), four measurements of patients in SI units (K = 4, scales spread 1.6e4), and CartPole
with four rewards. Every run is a line of OUT/multitask.jsonl; ``--resume`` keeps the runs that are there and were made
with the same settings. A method that refuses a problem or diverges is a row that says why.

Learning rates: one for each problem, for all methods and for single tasks. ``--tune`` shows how it was chosen: from a
grid, for the weighted sum, on validation data, over seeds that are not among those of the table; the smallest rate
within one standard error of the best. Steps are scaled by Adam, so that the length of a direction hardly matters;
still, a method whose best learning rate is another one is at a disadvantage.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from _common import RESULTS, provenance, table
from _multitask_runs import ALONE, PROBLEMS, Job, example, run
from _multitask_summary import BASELINE, Row, changes, interval, ranking, summarize
from _multitask_tables import draw, failures, overall_table, problem_table, verdict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import mogb
from mogb.compare.pool import run_jobs
from mogb.specs import SpecError, parse_specs

GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TUNING_SEEDS = (100, 101, 102)
KEY = ("problem", "method", "seed", "split", "lr", "steps")


def plan(problems: Sequence[str], methods: Sequence[str], seeds: Sequence[int], *, quick: bool) -> list[Job]:
    """All runs of the table, seed by seed, so that what an interruption leaves can be compared."""
    jobs = []
    for seed in seeds:
        for problem in problems:
            module = example(problem)
            steps = module.QUICK_STEPS if quick else module.STEPS
            names = [*(f"{ALONE}{task}" for task in module.TASKS), *methods]
            jobs += [Job(problem, name, seed, "test", module.LR, steps) for name in names]
    return jobs


def tuning_plan(problems: Sequence[str], *, quick: bool) -> list[Job]:
    """The weighted sum on validation data, for every learning rate of the grid."""
    return [
        Job(problem, BASELINE, seed, "validation", lr, module.QUICK_STEPS if quick else module.STEPS)
        for problem in problems
        for module in (example(problem),)
        for lr in GRID
        for seed in TUNING_SEEDS
    ]


def execute(jobs: Sequence[Job], log: pathlib.Path, workers: int) -> None:
    """Runs jobs and appends each to the log as it is done."""
    console = Console(stderr=True)
    began = time.monotonic()
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                   console=console, disable=not console.is_terminal)  # fmt: skip
    with bar, log.open("a") as lines:
        task = bar.add_task("multitask", total=len(jobs))
        for count, record in enumerate(_records(jobs, workers), 1):
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            bar.update(task, advance=1, description=f"{record['problem']} {record['method']}")
            if not console.is_terminal and count % 25 == 0:
                left = (time.monotonic() - began) / count * (len(jobs) - count)
                console.print(f"{count}/{len(jobs)} runs, about {left / 60:.0f} min left", highlight=False)


def _records(jobs: Sequence[Job], workers: int) -> Iterator[dict[str, Any]]:
    for event in run_jobs(run, jobs, workers):
        if event.kind == "done":
            yield event.value
        elif event.kind == "lost":
            lost = {"status": "failed", "reason": event.value, "metrics": {}, "seconds": 0.0}
            yield asdict(jobs[event.index]) | lost


def read_log(log: pathlib.Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The records by what makes a run; the last line of an interrupted run may be cut off."""
    found = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[tuple(record[name] for name in KEY)] = record
    return found


def key_of(job: Job) -> tuple[Any, ...]:
    """What makes a run, as :func:`read_log` keys it."""
    return tuple(asdict(job)[name] for name in KEY)


def tuning_scores(
    problem: str, jobs: Sequence[Job], records: Mapping[tuple[Any, ...], Any]
) -> dict[float, list[float]]:
    """Mean change of the validation metrics against the mean over the grid, in percent: a learning rate's, by seed."""
    module = example(problem)
    found = {job: records[key_of(job)]["metrics"] for job in jobs if job.problem == problem}
    means = {task: float(np.mean([metrics[task] for metrics in found.values()])) for task in module.TASKS}
    scores: dict[float, list[float]] = {lr: [] for lr in GRID}
    for job, metrics in found.items():
        scores[job.lr].append(float(np.mean(list(changes(metrics, means, module.HIGHER_IS_BETTER).values()))))
    return scores


def choose(scores: Mapping[float, Sequence[float]]) -> float:
    """The smallest learning rate whose mean is within one standard error of the best one."""
    best = max(scores.values(), key=np.mean)
    bound = float(np.mean(best) - np.std(best, ddof=1) / np.sqrt(len(best)))
    return min(lr for lr, found in scores.items() if np.mean(found) >= bound)


def tuning_table(problems: Sequence[str], jobs: Sequence[Job], records: Mapping[tuple[Any, ...], Any]) -> str:
    """One row a problem: the score of every learning rate, what the rule chooses, and what is used."""
    lines = []
    for problem in problems:
        scores = tuning_scores(problem, jobs, records)
        cells = [interval(scores[lr]).text(sign=True) for lr in GRID]
        lines.append([problem, *cells, f"{choose(scores):g}", f"{example(problem).LR:g}"])
    return table(["problem", *(f"lr {lr:g}" for lr in GRID), "chosen", "used"], lines)


def publish(
    options: argparse.Namespace, rows: Mapping[str, list[Row]], alone: Mapping[str, Any], tuning: str, total: float
) -> None:
    """Writes ``multitask.json``, ``multitask.md`` and ``multitask.png``, and prints the tables."""
    meta = provenance(0) | {"seeds": options.seeds}
    draw(rows, options.out / "multitask.png")
    parts = [
        f"`{meta['command']}` at commit {meta['commit']}, seeds 0 to {options.seeds - 1}, on {meta['machine']}; "
        f"{total / 60:.0f} core-minutes.",
        "Δm: mean change of the tasks' test metrics against training each task alone with the same seed, in percent; "
        "positive is better. ± is half the 95 % t-interval over seeds. ▲ ▼: better or worse than the weighted sum "
        "(paired t-test over seeds, Holm-corrected at 5 %); no mark: cannot be told apart. Ranks are by Δm, with "
        "bootstrap intervals over problems and seeds; with three problems they are wide.",
        verdict(rows),
        overall_table(rows),
        "![Δm of every method](multitask.png)",
    ]
    for problem, found in rows.items():
        module = example(problem)
        steps, lr = (module.QUICK_STEPS if options.quick else module.STEPS), module.LR
        parts += [f"## {problem}: {len(module.TASKS)} tasks, {steps} steps, learning rate {lr:g}",
                  problem_table(problem, found, alone[problem])]  # fmt: skip
    parts += ["## What failed, and why", failures(rows)]
    if tuning:
        parts += [
            "## Learning rates: the weighted sum on validation data, % against the mean over the grid (chosen: the "
            "smallest within one standard error of the best)",
            tuning,
        ]
    text = "\n\n".join(parts)
    (options.out / "multitask.md").write_text(text + "\n")
    order = ranking(rows)
    payload = {
        "provenance": meta,
        "core_seconds": round(total),
        "ranks": {} if order is None else dict(zip(order.methods, order.overall.round(3).tolist(), strict=True)),
        "alone": {problem: {t: asdict(i) for t, i in found.items()} for problem, found in alone.items()},
        "rows": {problem: [asdict(row) | {"verdict": row.verdict} for row in found] for problem, found in rows.items()},
    }
    (options.out / "multitask.json").write_text(json.dumps(_plain(payload), indent=1, allow_nan=False) + "\n")
    print(text)


def _plain(value: Any) -> Any:
    """The same with null for NaN, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def main() -> None:
    """Runs what is missing, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="all", help="as for mogb compare; all: every registered one")
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--tune", action="store_true", help="run the grid of learning rates as well")
    parser.add_argument("--quick", action="store_true", help="few steps, to see that everything works")
    parser.add_argument("--resume", action="store_true", help="keep the runs of an earlier call")
    parser.add_argument("--out", type=pathlib.Path, help="default: benchmarks/results; with --quick: runs/multitask")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out = options.out or (pathlib.Path("runs/multitask") if options.quick else RESULTS)
    problems = options.problems.split(",")
    if unknown := [problem for problem in problems if problem not in PROBLEMS]:
        parser.error(f"unknown problem {unknown[0]!r}. Known ones: {', '.join(PROBLEMS)}.")
    if options.seeds < 1 or options.workers < 1:
        parser.error("--seeds and --workers must be at least 1.")
    try:
        asked = mogb.registered() if options.methods == "all" else tuple(map(str, parse_specs(options.methods)))
    except SpecError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "multitask.jsonl"
    if log.exists() and not options.resume:
        log.unlink()
    jobs = plan(problems, asked, range(options.seeds), quick=options.quick)
    grid = tuning_plan(problems, quick=options.quick) if options.tune else []
    there = read_log(log)
    log.write_text("".join(json.dumps(record) + "\n" for record in there.values()))  # without a line that was cut off
    execute([job for job in grid + jobs if key_of(job) not in there], log, options.workers)
    records = read_log(log)
    mine = [records[key_of(job)] for job in jobs]
    rows, alone = {}, {}
    for problem in problems:
        module, found = example(problem), [record for record in mine if record["problem"] == problem]
        rows[problem] = summarize(found, module.HIGHER_IS_BETTER)
        alone[problem] = {
            task: interval([r["metrics"][task] for r in found if r["method"] == f"{ALONE}{task}"])
            for task in module.TASKS
        }
    tuning = tuning_table(problems, grid, records) if grid else ""
    publish(options, rows, alone, tuning, sum(record["seconds"] for record in mine))


if __name__ == "__main__":
    sys.exit(main())
