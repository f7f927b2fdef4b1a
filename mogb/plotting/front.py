"""The points that a sweep reached, against the true front."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mogb.front import FRONT_SAMPLES, Reached
from mogb.metrics.front import non_dominated
from mogb.plotting.paths import draw_set
from mogb.plotting.style import BLUE, GREY, PALE, Picture, headline, new_figure, require_matplotlib, save, styled
from mogb.problems import make_problem
from mogb.problems.base import Problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = "viridis"
LINES = 200  # of the true front, in parallel coordinates


def draw_front(reached: Reached, folder: Path) -> Picture:
    """Writes ``front.png``: two axes for two objectives, three for three, parallel coordinates for more.

    Raises:
        InputError: matplotlib is missing.
    """
    require_matplotlib()
    problem = make_problem(reached.sweep.problem)
    path = folder / "front.png"
    with styled():
        figure = new_figure(7.2, 5.6)
        draw = {2: _plane, 3: _space}.get(problem.num_objectives, _parallel)
        draw(figure, reached, problem)
        headline(figure, f"{reached.sweep.method} on {problem.name}", _figures(reached))
        save(figure, path)
    return Picture(path, "Front", problem.name, f"One point per run, swept over {reached.swept}.")


def _plane(figure: "Figure", reached: Reached, problem: Problem) -> None:
    axis = figure.add_axes((0.11, 0.1, 0.86 if reached.preferences is None else 0.74, 0.78))
    front, window = problem.pareto_front(FRONT_SAMPLES), problem.plot_window
    if window is not None and window.log:
        axis.set(xscale="log", yscale="log")
    axis.grid(color="#eeeeee", linewidth=0.6, zorder=0)
    if front is not None:
        draw_set(axis, front.numpy())
    _points(figure, axis, reached)
    axis.set(xlabel="$f_1$", ylabel="$f_2$")


def _space(figure: "Figure", reached: Reached, problem: Problem) -> None:
    axis: Any = figure.add_axes((0.02, 0.02, 0.86, 0.86), projection="3d")
    front, units = problem.pareto_front(FRONT_SAMPLES), problem.units.numpy()
    if front is not None:
        axis.scatter(*(front.numpy() / units).T, s=3, color=GREY, alpha=0.3, linewidths=0, depthshade=False)
    _points(figure, axis, reached, units)
    axis.set(xlabel="$f_1$ / unit", ylabel="$f_2$ / unit", zlabel="$f_3$ / unit")
    axis.view_init(elev=26, azim=38)


def _parallel(figure: "Figure", reached: Reached, problem: Problem) -> None:
    axis = figure.add_axes((0.1, 0.1, 0.86, 0.78))
    front, units, places = problem.pareto_front(LINES), problem.units.numpy(), np.arange(problem.num_objectives)
    if front is not None:
        axis.plot(places, (front.numpy() / units).T, color=PALE, linewidth=0.6, zorder=1)
    for rows in reached.losses:
        axis.plot(places, (rows / units).T, color=BLUE, linewidth=1.1, alpha=0.7, zorder=2)
    axis.set(ylabel="loss / unit", xticks=places[:: max(1, len(places) // 12)])
    axis.set_xlabel("objective; pale: the true front")


def _points(figure: "Figure", axis: Any, reached: Reached, units: np.ndarray | None = None) -> None:
    """Colored by the preference for the first objective; hollow where another point of the same seed dominates."""
    shares = None if reached.preferences is None else np.array(reached.preferences)[:, 0]
    drawn = None
    for rows in reached.losses:
        fine = np.isfinite(rows).all(1)
        if not fine.any():
            continue
        best = np.zeros(len(rows), dtype=bool)
        best[fine] = non_dominated(rows[fine])
        places = rows if units is None else rows / units
        for mask, filled in ((fine & best, True), (fine & ~best, False)):
            if not mask.any():
                continue
            look: dict[str, Any] = {"s": 46, "zorder": 4, "linewidths": 1.4 if not filled else 0.8}
            if shares is None:
                look |= {"color": BLUE} if filled else {"facecolors": "none", "edgecolors": BLUE}
            else:
                look |= {"c": shares[mask], "cmap": COLORS, "vmin": 0.0, "vmax": 1.0}
                look |= {"edgecolors": "white", "marker": "o"} if filled else {"marker": "x"}
                if not filled:
                    look.pop("edgecolors", None)
            drawn = axis.scatter(*places[mask].T, **look)
    if shares is not None and drawn is not None:
        bar = figure.add_axes((0.88, 0.2, 0.022, 0.55))
        figure.colorbar(drawn, cax=bar, label="preference for the first objective")


def _figures(reached: Reached) -> str:
    parts = [f"{len(reached.losses[0])} {reached.swept}, {reached.sweep.seeds} seeds"]
    for name, label, form in (("hypervolume_share", "hypervolume", "{:.1%}"), ("igd_plus", "IGD+", "{:.3g}")):
        found = reached.spread(name)
        if found is not None:
            parts.append(f"{label} {form.format(found[0])}")
    return "; ".join(parts)
