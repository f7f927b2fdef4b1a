"""Shows how far a comparison is: a bar with an ETA on a terminal, a line now and then in a log."""

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mogb.compare.plan import Plan, Run
from mogb.compare.pool import Event
from mogb.problems import make_problem

LOG_EVERY = 30.0  # seconds between lines where there is no terminal


class Watch:
    """Counts work, in steps weighted by what a step of the problem costs, while it is done.

    Args:
        plan: What is run.
        left: The runs that are to be done.
        console: Where to write.
    """

    def __init__(self, plan: Plan, left: Sequence[Run], console: Console) -> None:
        self.console, self.count, self.finished, self.failed = console, len(left), 0, 0
        costs = {name: _cost(plan, name) for name in {run.problem for run in left}}
        self.costs = {run.key: costs[run.problem] for run in left}
        self.total = sum(self.costs.values())
        self.shares = dict.fromkeys(self.costs, 0.0)
        self.done_cost = 0.0
        self.began = self.spoke = time.monotonic()
        self.bar: Progress | None = None
        self.task = TaskID(0)

    def __enter__(self) -> "Watch":
        if self.console.is_terminal and self.count:
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self.task = self.bar.add_task(self._label(), total=self.total)
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def __call__(self, run: Run, event: Event) -> None:
        """Takes note of an event."""
        share = 1.0 if event.kind == "done" else event.value
        self.done_cost += (share - self.shares[run.key]) * self.costs[run.key]
        self.shares[run.key] = share
        if event.kind == "done":
            self.finished += 1
            self.failed += event.value["status"] != "ok"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done_cost, description=self._label())
        elif event.kind == "done" and time.monotonic() - self.spoke > LOG_EVERY:
            self.spoke = time.monotonic()
            self.console.print(f"{self._label()}, {self.left()} left", highlight=False)

    def left(self) -> str:
        """The estimated time to the end, such as ``"2 min 5 s"``."""
        if self.done_cost <= 0:
            return "unknown time"
        return duration((time.monotonic() - self.began) * (self.total / self.done_cost - 1))

    def _label(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.finished}/{self.count} runs{failed}"


def duration(seconds: float) -> str:
    """Seconds in words: ``"42 s"``, ``"2 min 5 s"``, ``"1 h 3 min"``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _cost(plan: Plan, name: str) -> float:
    """Of one run, in arbitrary units: a fixed part of a step, and one solve per starting point."""
    problem = make_problem(name)
    return plan.steps_of(problem) * (2.0 + len(problem.starts()) * (1.0 + problem.num_objectives / 8))
