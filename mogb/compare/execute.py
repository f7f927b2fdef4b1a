"""Runs a plan, or what is left of it, and turns every run into a record."""

import platform
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from mogb.compare.loop import RunFailed, follow, starts_of
from mogb.compare.measure import measure
from mogb.compare.plan import Plan, Run
from mogb.compare.pool import Event, run_jobs
from mogb.compare.store import Record
from mogb.problems import make_problem

Job = tuple[Run, Plan]


def execute(job: Job, progress: Callable[[float], None] = lambda _: None) -> Record:
    """The record of one run. A method that fails gives a record that says why."""
    run, plan = job
    problem = make_problem(run.problem)
    began, cpu_began = time.perf_counter(), time.process_time()
    try:
        with np.errstate(all="ignore"):  # what overflows is found by the checks of every step
            found = measure(run, problem, follow(run, plan, problem, progress))
    except RunFailed as error:
        found = _failure(str(error))
    except Exception as error:  # whatever a method does wrong is a row of the table, not the end of the others
        found = _failure(_describe(error))
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    return _header(run, plan) | found | {
        "wall_seconds": round(wall, 3), "cpu_seconds": round(cpu, 3), "versions": versions(),
    }  # fmt: skip


def execute_all(plan: Plan, runs: Sequence[Run], workers: int) -> Iterator[Event]:
    """What happens while these runs are done; the value of a ``"done"`` event is a record.

    Args:
        plan: Which they belong to.
        runs: In any order: it does not change a number.
        workers: How many processes; 0 means this one.
    """
    if workers == 0:
        for index, run in enumerate(runs):
            yield Event(index, "done", _on_one_thread((run, plan)))
        return
    for event in run_jobs(execute, [(run, plan) for run in runs], workers):
        yield Event(event.index, "done", _lost(runs[event.index], plan, event.value)) if event.kind == "lost" else event


def _on_one_thread(job: Job) -> Record:
    """As a worker does it: the number of threads may decide about the last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return execute(job)
    finally:
        torch.set_num_threads(before)


def versions() -> dict[str, str]:
    """What produced a record."""
    from mogb import __version__

    return {
        "mogb": __version__, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(),
    }  # fmt: skip


def _header(run: Run, plan: Plan) -> Record:
    problem = make_problem(run.problem)
    settings = problem.settings
    return {
        "key": run.key, "method": run.method, "problem": run.problem, "seed": run.seed, "status": "ok", "error": None,
        "steps": plan.steps_of(problem), "optimizer": settings.optimizer,
        "lr": settings.quick_lr if plan.quick else settings.lr, "starts": len(starts_of(problem, run.seed)),
    }  # fmt: skip


def _failure(why: str) -> Record:
    return {"status": "failed", "error": " ".join(why.split())}


def _describe(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.name}, line {place.lineno} of {place.filename.rsplit('/', 1)[-1]})"


def _lost(run: Run, plan: Plan, why: str) -> Record:
    """A failure that says nothing about the method: ``--resume`` tries again."""
    about = {"lost": True, "wall_seconds": None, "cpu_seconds": None, "versions": versions()}
    return _header(run, plan) | _failure(why) | about
