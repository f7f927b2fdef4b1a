"""Does the direction agree with every gradient? Cosines and conflict rates, method by method."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mogb.compare.summary import Row, Summary
from mogb.plotting.style import BLUE, GREY, ORANGE, PALE, Picture, headline, new_figure, save, top_margin
from mogb.problems import make_problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SECTION = "Conflict"
# Column of the summary, its heading, and where a direction without conflict would be.
MEASURES = (
    ("conflict_rate", "conflict rate", (-0.04, 1.04)),
    ("cosine_min", "mean of min cos", None),
    ("cosine_mean", "mean cos", None),
    ("cosine_variance", "variance of cos", None),
)


def draw_conflicts(summary: Summary, folder: Path) -> list[Picture]:
    """One picture per problem with more than two objectives, and the conflict rates of all problems in one."""
    names = [name for name in summary.problems if name.startswith(("specialists", "bowls"))]
    return [*_map(summary, folder), *(picture for name in names for picture in _panel(summary, name, folder))]


def _panel(summary: Summary, name: str, folder: Path) -> list[Picture]:
    rows = [row for row in summary.rows if row["problem"] == name and row["conflict_rate"] is not None]
    if not rows:
        return []
    stochastic = make_problem(name).stochastic
    rows.sort(key=lambda row: (row["held_out_conflict_rate"] or 0.0, row["conflict_rate"], row["method"]))
    left, side, gap = 0.2 + 0.085 * max(len(row["method"]) for row in rows), 2.5, 0.22
    width, height = left + 4 * (side + gap) + 0.1, max(1.5 + 0.3 * len(rows), 2.6)
    figure = new_figure(width, height)
    for i, (key, title, limits) in enumerate(MEASURES):
        axis = figure.add_axes((
            (left + i * (side + gap)) / width, 0.42 / height, side / width, 0.3 * len(rows) / height
        ))  # fmt: skip
        _dots(axis, rows, key, stochastic)
        axis.set_title(title, fontsize=9.5, pad=5)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_yticks(range(len(rows)), [row["method"] for row in rows] if i == 0 else [], fontsize=9, color="black")
        if limits:
            axis.set_xlim(*limits)
        if key == "cosine_min":
            axis.axvline(0, color=GREY, linewidth=0.8, zorder=1)
    if stochastic:
        labels = ["against the mini-batch's own gradients", "held out: against the exact gradients"]
        figure.legend(
            figure.axes[0].lines[:2],
            labels,
            loc="upper right",
            bbox_to_anchor=(1, 1 - 0.08 / height),
            ncols=2,
            frameon=False,
        )
    headline(figure, name, "agreement of the direction with every gradient")
    path = folder / f"conflicts_{name}.png"
    save(figure, path)
    text = "Over all steps, starts and seeds, of the cosines between the direction and the K gradients of a step: how "
    text += "often the smallest is negative, the mean of the smallest, the mean, and the mean variance over objectives."
    if stochastic:
        text += " That a min-norm direction never conflicts with the gradients it was made from is algebra; the "
        text += "held-out figures, against exact gradients that no method sees, over the steps until a start arrives "
        text += "at the front, are evidence."
    return [Picture(path, SECTION, f"{name}: cosines and conflicts", text)]


def _dots(axis: "Axes", rows: list[Row], key: str, stochastic: bool) -> None:
    y = np.arange(len(rows))
    own = np.array([row[key] for row in rows], dtype=float)
    for row in range(0, len(rows), 2):
        axis.axhspan(row - 0.5, row + 0.5, color="#f5f5f5", zorder=0)
    axis.plot(own, y, "o", color=BLUE, markersize=6.5, markeredgecolor="white", zorder=3)
    if stochastic and f"held_out_{key}" in rows[0]:
        held = np.array([row[f"held_out_{key}"] for row in rows], dtype=float)
        axis.plot(held, y, "D", color=ORANGE, markersize=6, markeredgecolor="white", zorder=3)
        axis.hlines(y, np.minimum(own, held), np.maximum(own, held), color=PALE, linewidth=1.5, zorder=2)
    axis.grid(axis="x", color=PALE, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    for spine in ("top", "right", "left"):
        axis.spines[spine].set_visible(False)


def _map(summary: Summary, folder: Path) -> list[Picture]:
    """Conflict rates, held out where the problem is stochastic."""
    rates = {(row["method"], row["problem"]): _rate(row) for row in summary.rows}
    values = np.array([[rates[method, name] for name in summary.problems] for method in summary.methods], dtype=float)
    if np.isnan(values).all():
        return []
    order = np.argsort(np.nanmean(np.where(np.isnan(values), 1.0, values), axis=1), kind="stable")
    methods, values = [summary.methods[i] for i in order], 100 * values[order]
    left, cell = 0.2 + 0.085 * max(map(len, methods)), (0.6, 0.34)
    width, height = (
        left + cell[0] * len(summary.problems) + 1.0,
        top_margin(summary.problems) + cell[1] * len(methods) + 0.2,
    )
    figure = new_figure(width, height)
    axis = figure.add_axes((
        left / width, 0.2 / height, cell[0] * len(summary.problems) / width, cell[1] * len(methods) / height
    ))  # fmt: skip
    axis.imshow(values, cmap="YlGnBu", vmin=0, vmax=100, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        text = "-" if np.isnan(value) else f"{value:.0f}"
        axis.text(j, i, text, ha="center", va="center", fontsize=8.5, color="white" if value > 55 else "black")
    axis.xaxis.tick_top()
    labels = [f"{name}*" if make_problem(name).stochastic else name for name in summary.problems]
    axis.set_xticks(
        range(len(labels)), labels, rotation=40, ha="left", rotation_mode="anchor", fontsize=9, color="black"
    )
    axis.set_yticks(range(len(methods)), methods, fontsize=9, color="black")
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    headline(figure, "Conflict rate, %", "steps whose direction points against some gradient; * held out")
    path = folder / "conflicts.png"
    save(figure, path)
    return [Picture(
        path, SECTION, "Conflict rates",
        "Share of the steps whose direction has a negative cosine with some objective's gradient: the same gradients "
        "that it was made from, or (*) the exact ones, until it arrives, where the problem "
        "gives mini-batches. Least conflict on "
        "top. On a front gradients oppose each other: whoever sits there with a direction that is not zero conflicts.",
    )]  # fmt: skip


def _rate(row: Row) -> float:
    value = row["held_out_conflict_rate"] if row["held_out_conflict_rate"] is not None else row["conflict_rate"]
    return float("nan") if value is None else value
