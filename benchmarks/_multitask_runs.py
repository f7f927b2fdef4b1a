"""One run of the multi-task benchmark: an example's own training loop, with a method, a seed and a learning rate."""

import importlib
import math
import pathlib
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import numpy as np

import mogb
from mogb.specs import parse_spec

EXAMPLES = pathlib.Path(__file__).parents[1] / "docs" / "examples"
PROBLEMS = {"digits": "multi_digits", "regression": "scaled_regression", "cartpole": "cartpole_rewards"}
ALONE = "alone:"  # and a task: trained on this task only
# What methods raise when they are given something they cannot work with.
REFUSALS = (ValueError, TypeError, RuntimeError, ArithmeticError)


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        problem: A key of ``PROBLEMS``.
        method: As for ``mogb compare``, such as ``cagrad(c=0.2)``; ``alone:TASK`` trains on one task.
        seed: Of the data's split, the network, the batches and the method.
        split: ``"test"``, or ``"validation"`` for tuning.
        lr: Of Adam.
        steps: As the example counts them.
    """

    problem: str
    method: str
    seed: int
    split: str
    lr: float
    steps: int


def example(problem: str) -> ModuleType:
    """The module of a problem: its tasks, metrics, training loop and settings."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(PROBLEMS[problem])


def run(job: Job, progress: Callable[[float], None] = lambda _: None) -> dict[str, Any]:
    """Trains and evaluates; a method that cannot work with the problem is a record that says why."""
    warnings.simplefilter("ignore")
    module, start = example(job.problem), time.process_time()
    alone = job.method.startswith(ALONE)
    tasks = (job.method.removeprefix(ALONE),) if alone else module.TASKS
    method = mogb.make("weighted_sum") if alone else parse_spec(job.method).build(job.seed)
    record = asdict(job) | {"status": "ok", "reason": "", "metrics": {}}
    try:
        model, reports = module.train(method, seed=job.seed, tasks=tasks, steps=job.steps, lr=job.lr)
        record["metrics"] = module.evaluate(model, seed=job.seed, split=job.split, tasks=tasks)
        record |= _diagnostics(reports, len(tasks))
        if not all(math.isfinite(value) for value in record["metrics"].values()):
            record |= {"status": "failed", "reason": "diverged: a metric is not finite"}
    except REFUSALS as error:
        record |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    return record | {"seconds": round(time.process_time() - start, 3)}


def _diagnostics(reports: list[mogb.Report], size: int) -> dict[str, Any]:
    pairs = max(1, size * (size - 1) // 2)
    conflicts = [report.conflicts / pairs for report in reports if report.conflicts is not None]
    cosines = [report.min_cosine for report in reports if not math.isnan(report.min_cosine)]
    return {
        "passes": float(np.mean([report.backward_passes for report in reports])),
        "conflicts": float(np.mean(conflicts)) if conflicts else None,
        "uphill": float(np.mean(np.array(cosines) < -1e-6)) if cosines else None,
        "unconverged": sum(not report.converged for report in reports),
    }
