"""Where methods went: trajectories over loss contours, and against the front."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mogb.compare.store import Record
from mogb.compare.summary import Summary
from mogb.plotting.style import BLACK, GREY, HUES, Panels, Picture, few_ticks, headline, label_outer, panels, save
from mogb.problems import make_problem
from mogb.problems.base import Interval, Problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GRID = 160  # points of the loss landscape along each axis
LEVELS = 14
FRONT = 400
SECTION = "Trajectories"


def draw_paths(summary: Summary, name: str, folder: Path) -> list[Picture]:
    """The pictures of one problem: none if it has neither two coordinates nor two or three objectives."""
    problem = make_problem(name)
    records = [_drawable(summary, name, method) for method in summary.methods]
    if problem.plot_window is None or not any(records):
        return []
    pictures = []
    if problem.plot_window.x is not None:
        pictures.append(_in_parameter_space(summary, problem, records, folder))
    if not _any_in_sight(problem, records):
        return pictures
    if problem.num_objectives == 2:
        pictures.append(_in_objective_space(summary, problem, records, folder))
    elif problem.num_objectives == 3:
        pictures.append(_in_three_dimensions(summary, problem, records, folder))
    return pictures


def _drawable(summary: Summary, name: str, method: str) -> Record | None:
    record = summary.records.get(f"{name}/0/{method}")
    return record if record is not None and record.get("trajectory") else None


def _any_in_sight(problem: Problem, records: list[Record | None]) -> bool:
    """Whether any path comes into the window of the losses: on hard problems, all may stay far above the front."""
    window = problem.plot_window
    assert window is not None
    paths = [np.array(record["trajectory"]["losses"], dtype=float) for record in records if record is not None]
    high = np.array([limit[1] for limit in window.losses])
    return any(bool((path[..., : len(high)] <= high).all(-1).any()) for path in paths)


def _in_parameter_space(summary: Summary, problem: Problem, records: list[Record | None], folder: Path) -> Picture:
    found = panels(len(records))
    window = problem.plot_window
    assert window is not None
    assert window.x is not None
    heights, levels = _landscape(problem, window.x)
    pareto = problem.pareto_set(FRONT)
    for axis, record, method in zip(found.axes, records, summary.methods, strict=True):
        extent = (*window.x[0], *window.x[1])
        axis.contourf(heights, levels=levels, extent=extent, cmap="Greys", vmin=-0.35, vmax=2.6, zorder=0)
        axis.contour(heights, levels=levels, extent=extent, colors="#a8a8a8", linewidths=0.4, zorder=1)
        if pareto is not None:
            draw_set(axis, pareto.numpy())
        _draw_panel(axis, record, method, "x")
    found.axes[0].set(xlim=window.x[0], ylim=window.x[1])
    few_ticks(found.axes[0])
    _legend(found, "Pareto set", "darker: larger mean of the\nlosses, in their units")
    label_outer(found, "$x_1$", "$x_2$")
    headline(found.figure, problem.name, "the way through parameter space, over contours of the mean loss")
    path = folder / f"trajectories_{problem.name}.png"
    save(found.figure, path)
    return Picture(
        path, SECTION, f"{problem.name}: parameter space",
        f"{_protocol(records)} Every panel is a method; a colour is a starting point. Crosses end off the front.",
    )  # fmt: skip


def _in_objective_space(summary: Summary, problem: Problem, records: list[Record | None], folder: Path) -> Picture:
    found = panels(len(records))
    window = problem.plot_window
    assert window is not None
    front = problem.pareto_front(FRONT)
    for axis, record, method in zip(found.axes, records, summary.methods, strict=True):
        if window.log:
            axis.set(xscale="log", yscale="log")
        if front is not None:
            draw_set(axis, front[:, :2].numpy())
        axis.grid(color="#eeeeee", linewidth=0.6, zorder=0)
        _draw_panel(axis, record, method, "losses")
    found.axes[0].set(xlim=window.losses[0], ylim=window.losses[1])
    if not window.log:
        few_ticks(found.axes[0])
    _legend(found, "Pareto front", "")
    label_outer(found, "$f_1$", "$f_2$")
    headline(found.figure, problem.name, "the way through objective space, against the front")
    path = folder / f"objectives_{problem.name}.png"
    save(found.figure, path)
    return Picture(
        path, SECTION, f"{problem.name}: objective space",
        f"{_protocol(records)} Down and left is better; a colour is a starting point. Crosses end off the front.",
    )  # fmt: skip


def _in_three_dimensions(summary: Summary, problem: Problem, records: list[Record | None], folder: Path) -> Picture:
    from matplotlib.ticker import MaxNLocator

    found = panels(len(records), projection="3d")
    window, units = problem.plot_window, problem.units.numpy()
    assert window is not None
    front = problem.pareto_front(FRONT)
    for axis, record, method in zip(found.axes, records, summary.methods, strict=True):
        axis3: Any = axis
        if front is not None:
            axis3.scatter(*(front.numpy() / units).T, s=3, color=GREY, alpha=0.35, linewidths=0, depthshade=False)
        limits = [np.array(limit) / unit for limit, unit in zip(window.losses, units, strict=True)]
        axis3.set(xlim=limits[0], ylim=limits[1], zlim=limits[2])
        axis3.view_init(elev=26, azim=38)
        axis3.set_box_aspect(None, zoom=1.02)
        for k, side in enumerate((axis3.xaxis, axis3.yaxis, axis3.zaxis)):
            side.set_major_locator(MaxNLocator(4))
            side.set_ticklabels([])
            side.set_pane_color("#fbfbfb")
            side.set_label_text(f"$f_{k + 1}$")
            side.labelpad = -13
            side.set_rotate_label(False)
            side._axinfo["grid"].update(color="#dcdcdc", linewidth=0.5)
        _draw_panel(axis3, record, method, "losses", units, np.array([limit[1] for limit in limits]))
    _legend(found, "Pareto front", "axes from the best to the worst\nlosses, in their units", cloud=True)
    headline(found.figure, problem.name, "the way through objective space, against the front")
    path = folder / f"objectives_{problem.name}.png"
    save(found.figure, path)
    return Picture(
        path, SECTION, f"{problem.name}: objective space",
        f"{_protocol(records)} The cloud is the front; a colour is a starting "
        "point, drawn from where it enters the box. Crosses end off the front.",
    )  # fmt: skip


def _landscape(problem: Problem, window: tuple[Interval, Interval]) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the mean loss on a grid, in [0, 1], and the levels to draw: even steps whatever the shape."""
    x = torch.linspace(*window[0], GRID, dtype=torch.float64)
    y = torch.linspace(*window[1], GRID, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    mean = (problem.losses(problem.project(points)) / problem.units).mean(-1).numpy()
    order = np.sort(mean, axis=None)
    return np.searchsorted(order, mean) / mean.size, np.linspace(0.0, 1.0, LEVELS + 1)


def draw_set(axis: "Axes", points: np.ndarray) -> None:
    """A curve, broken where the set is disconnected; a star where it is one point."""
    if len(np.unique(points, axis=0)) == 1:
        axis.plot(*points[0], marker="*", markersize=11, color=BLACK, markeredgecolor="white", zorder=2, linestyle="")
        return
    ordered = points[np.argsort(points[:, 0], kind="stable")]
    gaps = np.linalg.norm(np.diff(ordered, axis=0) / np.maximum(np.ptp(ordered, axis=0), 1e-12), axis=1)
    pieces = np.split(ordered, np.flatnonzero(gaps > max(0.05, 10 * np.median(gaps))) + 1)
    for piece in pieces:
        axis.plot(piece[:, 0], piece[:, 1], color="white", linewidth=5, zorder=2, solid_capstyle="round")
        axis.plot(piece[:, 0], piece[:, 1], color=BLACK, linewidth=2.6, zorder=2.1, solid_capstyle="round")


def _draw_panel(
    axis: Any,
    record: Record | None,
    method: str,
    what: str,
    units: np.ndarray | None = None,
    most: np.ndarray | None = None,
) -> None:
    """Draws the paths of one method; in three dimensions, in units and cut off where they leave the box."""
    axis.set_title(method, fontsize=9.5 if len(method) < 24 else 7, pad=3)
    if record is None:
        write = axis.text2D if most is not None else axis.text
        write(0.5, 0.5, "failed", transform=axis.transAxes, ha="center", color=GREY)
        return
    paths = np.array(record["trajectory"][what], dtype=float).transpose(1, 2, 0)  # [S, coordinates, T]
    if units is not None and most is not None:
        paths = paths / units[:, None]
        paths = np.where((paths <= most[:, None]).all(1, keepdims=True), paths, np.nan)
    arrived = _arrived(record)
    for start, path in enumerate(paths):
        hue = HUES[start % len(HUES)]
        axis.plot(*path, color=hue, linewidth=1.3, zorder=3, alpha=0.9, clip_on=True)
        axis.plot(*path[:, :1], marker="o", markersize=4.5, markerfacecolor="white", markeredgecolor=hue, zorder=4)
        axis.plot(
            *path[:, -1:], marker="o" if arrived[start] else "X", markersize=6.5 if arrived[start] else 7.5,
            markerfacecolor=hue, markeredgecolor="white", markeredgewidth=0.8, zorder=5,
        )  # fmt: skip


def _arrived(record: Record) -> list[bool]:
    tolerance = make_problem(record["problem"]).settings.tolerance
    return [value <= tolerance for value in record["distance"]] if record["distance"] else [True] * record["starts"]


def _legend(found: Panels, target: str, note: str, *, cloud: bool = False) -> None:
    from matplotlib.lines import Line2D

    look: dict[str, Any] = (
        {"linestyle": "", "marker": ".", "color": GREY} if cloud else {"linewidth": 2.6, "color": BLACK}
    )
    handles = [
        Line2D([], [], label=target, **look),
        Line2D(
            [],
            [],
            linestyle="",
            marker="o",
            markersize=5,
            markerfacecolor="white",
            markeredgecolor=BLACK,
            label="start",
        ),
        Line2D([], [], linestyle="", marker="o", markersize=7, color=GREY, label="end, on the front"),
        Line2D([], [], linestyle="", marker="X", markersize=8, color=GREY, label="end, off the front"),
    ]
    found.legend.legend(handles=handles, loc="center left", frameon=False, handlelength=1.6, title=note or None,
                        alignment="left", title_fontsize=8)  # fmt: skip


def _protocol(records: list[Record | None]) -> str:
    record = next(record for record in records if record is not None)
    name = {"adam": "Adam", "sgd": "SGD"}[record["optimizer"]]
    return f"{name}, learning rate {record['lr']:g}, {record['steps']} steps, published starting points."
