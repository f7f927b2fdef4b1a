"""Methods × problems × seeds -> records, tables and findings; what ``mogb compare`` does, without the command line.

>>> records = run(["mgda", "cagrad(c=0.2)"], ["quadratic_elementwise"], steps=5)
>>> [record["status"] for record in records]
['ok', 'ok']
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from mogb.compare.execute import execute_all
from mogb.compare.plan import DEFAULT_SEEDS, LAUNCH_METHODS, QUICK_PROBLEMS, InputError, Plan, Run
from mogb.compare.pool import Event
from mogb.compare.store import Record, Store, open_store
from mogb.compare.summary import Summary
from mogb.specs import SpecError, parse_spec

__all__ = [
    "DEFAULT_SEEDS",
    "LAUNCH_METHODS",
    "QUICK_PROBLEMS",
    "InputError",
    "Plan",
    "Record",
    "Run",
    "Summary",
    "run",
    "run_plan",
]


def run(
    methods: Sequence[str],
    problems: Sequence[str],
    *,
    seeds: int = 1,
    steps: int | None = None,
    quick: bool = False,
    workers: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> list[Record]:
    """Runs a comparison and returns its records in the order of problems, seeds and methods.

    Args:
        methods: Specifications such as ``"mgda"``, ``"cagrad(c=0.2)"``, ``"smoothed(mgda,decay=0.9)"``.
        problems: Names of problems, see :func:`mogb.problems.registered_problems`.
        seeds: How many: seed 0 starts from the published points, the others from random ones.
        steps: For every problem; None means each problem's own number.
        quick: Whether to take each problem's short number of steps.
        workers: Processes; 0 means this one. More than 0 needs an importable main module, as multiprocessing does.
        out: A folder for ``results.jsonl``; None keeps the records in memory only.
        resume: Complete what the folder holds.
        overwrite: Replace what the folder holds.

    Raises:
        InputError: An argument that cannot be; the message names it, its value and the remedy.
    """
    plan = Plan(tuple(map(normal_form, methods)), tuple(problems), seeds, steps, quick)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise InputError(f"workers must be a whole number of at least 0, but got {workers!r}.")
    if out is None:
        done = run_plan(plan, None, workers)
    else:
        with open_store(Path(out), plan, resume=resume, overwrite=overwrite) as store:
            done = run_plan(plan, store, workers)
    return [done[item.key] for item in plan.mine()]


def run_plan(
    plan: Plan, store: Store | None, workers: int, watch: Callable[[Run, Event], None] = lambda run, event: None
) -> dict[str, Record]:
    """Does the runs of a plan that a store does not hold yet; each is stored before anything else happens.

    Args:
        plan: What to run.
        store: Where records go; None keeps them in memory.
        workers: How many processes; 0 means this one.
        watch: Called with every event, for a progress bar.

    Returns:
        All records by key, those of the store included.
    """
    done = {} if store is None else store.done
    left = [item for item in plan.mine() if item.key not in done]
    for event in execute_all(plan, left, workers):
        if event.kind == "done":
            if store is None:
                done[event.value["key"]] = event.value
            else:
                store.append(event.value)
        watch(left[event.index], event)
    return done


def normal_form(method: str) -> str:
    """The specification in the form in which records name it.

    Raises:
        InputError: It cannot be read.
    """
    try:
        return str(parse_spec(method))
    except SpecError as error:
        raise InputError(f"methods: {error}") from error
