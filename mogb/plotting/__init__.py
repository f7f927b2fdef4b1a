"""Records -> figures. Everything here needs matplotlib, which is imported when the first figure is drawn."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from mogb.compare.merge import read_summary
from mogb.compare.pool import run_jobs
from mogb.compare.summary import Summary
from mogb.plotting.conflicts import draw_conflicts
from mogb.plotting.invariance import draw_invariance
from mogb.plotting.paths import draw_paths
from mogb.plotting.ranks import draw_ranks
from mogb.plotting.style import Picture, require_matplotlib, styled
from mogb.plotting.weights import draw_weights

__all__ = ["Picture", "draw_all", "require_matplotlib"]

Job = tuple[Path, str, str]  # the folder, the kind of figure, the problem

KINDS: dict[str, Callable[[Summary, str, Path], list[Picture]]] = {
    "ranks": lambda summary, _, folder: draw_ranks(summary, folder),
    "invariance": lambda summary, _, folder: draw_invariance(summary, folder),
    "paths": draw_paths,
    "conflicts": lambda summary, _, folder: draw_conflicts(summary, folder),
    "weights": lambda summary, _, folder: draw_weights(summary, folder),
}


def draw_all(summary: Summary, folder: Path, workers: int = 0) -> list[Picture]:
    """Draws every figure that the records allow, as PNG files.

    Args:
        summary: What to draw.
        folder: Where to; with workers, it must hold the results of the summary.
        workers: How many processes; 0 means this one.

    Raises:
        InputError: matplotlib is missing.
    """
    require_matplotlib()
    paths = [(folder, "paths", name) for name in summary.problems]
    jobs: list[Job] = [(folder, "ranks", ""), (folder, "invariance", ""), *paths, (folder, "conflicts", ""),
                       (folder, "weights", "")]  # fmt: skip
    if workers == 0:
        return [picture for job in jobs for picture in _draw(summary, job)]
    drawn = {event.index: event.value for event in run_jobs(_draw_from_folder, jobs, workers) if event.kind == "done"}
    return [picture for index in sorted(drawn) for picture in drawn[index]]


def _draw(summary: Summary, job: Job) -> list[Picture]:
    folder, kind, name = job
    with styled():
        return KINDS[kind](summary, name, folder)


def _draw_from_folder(job: Job, progress: Callable[[float], None]) -> list[Picture]:
    return _draw(_summary(job[0]), job)


@lru_cache(maxsize=1)
def _summary(folder: Path) -> Summary:
    return read_summary(folder)
