"""Who did best: heat maps of ranks, the overall ranking with intervals, who beats whom."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mogb.compare.ranking import Ranking
from mogb.compare.summary import Summary
from mogb.plotting.style import BLUE, GREY, ORANGE, PALE, Picture, headline, new_figure, save, top_margin

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SECTION = "Ranking"
BOOTSTRAP = "95 % bootstrap intervals over problems and starting points"


def draw_ranks(summary: Summary, folder: Path) -> list[Picture]:
    """Two heat maps and the overall ranking; none where nothing was ranked."""
    distance, coverage = summary.distance_ranking, summary.coverage_ranking
    if distance is None or coverage is None:
        return []
    return [
        _overall(distance, coverage, folder),
        _heat_map(distance, "distance to the front", "ranks_distance", folder,
                  "Points within a problem's tolerance of the front tie."),
        _heat_map(coverage, "coverage of the front", "ranks_coverage", folder,
                  "Coverage is the IGD+ of the points reached from all starts together: it rewards both arriving and "
                  "not ending up all in one place."),
    ]  # fmt: skip


def _heat_map(ranking: Ranking, what: str, name: str, folder: Path, note: str) -> Picture:
    order = ranking.order
    rows, columns = len(order), len(ranking.problems)
    cell, left, top = (0.66, 0.44), 0.2 + 0.085 * max(map(len, ranking.methods)), top_margin(ranking.problems)
    width, height = left + cell[0] * (columns + 1.6) + 0.9, top + cell[1] * rows + 0.2
    width = max(width, 7.5)
    figure = new_figure(width, height)
    table = figure.add_axes((
        left / width, 0.2 / height, cell[0] * columns / width, cell[1] * rows / height
    ))  # fmt: skip
    overall = figure.add_axes((
        (left + cell[0] * (columns + 0.25)) / width, 0.2 / height, cell[0] / width, cell[1] * rows / height
    ))  # fmt: skip
    half = (ranking.high - ranking.low) / 2
    image = _cells(table, ranking.ranks[order], half[order], rows, [ranking.methods[i] for i in order])
    spread = (ranking.overall_high - ranking.overall_low)[order, None] / 2
    _cells(overall, ranking.overall[order, None], spread, rows, [])
    _name_columns(table, list(ranking.problems))
    _name_columns(overall, ["mean"])
    bar = figure.add_axes(((width - 0.62) / width, 0.2 / height, 0.14 / width, cell[1] * rows / height))
    figure.colorbar(image, cax=bar).outline.set_visible(False)
    bar.invert_yaxis()
    headline(figure, f"Mean rank by {what}", "1 is best; ± half the 95 % bootstrap interval over starts and seeds")
    path = folder / f"{name}.png"
    save(figure, path)
    return Picture(
        path, SECTION, f"Ranks by {what}", f"Mean rank of every method on every problem, best method on top. {note}"
    )


def _cells(axis: "Axes", values: np.ndarray, half: np.ndarray, worst: int, names: list[str]):  # type: ignore[no-untyped-def]
    image = axis.imshow(values, cmap="YlGnBu", vmin=1, vmax=max(worst, 2), aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        dark = (value - 1) / max(worst - 1, 1) > 0.55
        axis.text(j, i - 0.13, f"{value:.1f}", ha="center", va="center", fontsize=9, color="white" if dark else "black")
        axis.text(j, i + 0.25, f"±{half[i, j]:.1f}", ha="center", va="center", fontsize=6.5,
                  color="#e8e8e8" if dark else "#333333")  # fmt: skip
    axis.set_yticks(range(len(names)), names, fontsize=9, color="black")
    axis.set_xticks(np.arange(-0.5, values.shape[1]), minor=True)
    axis.set_yticks(np.arange(-0.5, values.shape[0]), minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="both", length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    return image


def _name_columns(axis: "Axes", names: list[str]) -> None:
    axis.xaxis.tick_top()
    axis.set_xticks(range(len(names)), names, rotation=40, ha="left", rotation_mode="anchor", fontsize=9, color="black")


def _overall(distance: Ranking, coverage: Ranking, folder: Path) -> Picture:
    order = distance.order
    rows = len(order)
    left, gap = 0.2 + 0.085 * max(map(len, distance.methods)), 0.9
    dots, wins, height = 4.6, 0.5 * rows, top_margin(distance.methods) + 0.4 * rows + 0.55
    width = left + dots + gap + wins + left * 0.9 + 0.1
    figure = new_figure(width, height)
    bottom, tall = 0.55 / height, 0.4 * rows / height
    axis = figure.add_axes((left / width, bottom, dots / width, tall))
    for ranking, shift, hue, marker, label in (
        (distance, -0.14, BLUE, "o", "by distance to the front"), (coverage, 0.14, ORANGE, "s", "by coverage"),
    ):  # fmt: skip
        at = [ranking.methods.index(distance.methods[i]) for i in order]
        y = np.arange(rows) + shift
        axis.hlines(y, ranking.overall_low[at], ranking.overall_high[at], color=hue, linewidth=2.2, alpha=0.75)
        axis.plot(ranking.overall[at], y, marker, color=hue, markersize=6, markeredgecolor="white", label=label)
    for row in range(0, rows, 2):
        axis.axhspan(row - 0.5, row + 0.5, color="#f5f5f5", zorder=0)
    axis.set(ylim=(rows - 0.5, -0.5), xlim=(0.5, max(rows, 2) + 0.5), xlabel="mean rank over problems (1 is best)")
    axis.set_yticks(range(rows), [distance.methods[i] for i in order], fontsize=9, color="black")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=PALE, linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False, handletextpad=0.3, columnspacing=1.2
    )
    table = figure.add_axes(((left + dots + gap) / width, bottom, wins / width, tall))
    _win_matrix(table, distance, order)
    headline(figure, "Overall ranking", BOOTSTRAP)
    path = folder / "ranking.png"
    save(figure, path)
    return Picture(
        path, SECTION, "Overall ranking",
        f"Left: mean ranks over {len(distance.problems)} problems with {BOOTSTRAP}; methods whose intervals overlap "
        "cannot be told apart. Right: how often, in percent, the method of the row ends closer to the front than that "
        "of the column; ties count half.",
    )  # fmt: skip


def _win_matrix(axis: "Axes", ranking: Ranking, order: list[int]) -> None:
    wins = 100 * ranking.wins[np.ix_(order, order)]
    np.fill_diagonal(wins, np.nan)
    axis.imshow(wins, cmap="PuOr", vmin=0, vmax=100, aspect="auto")
    for (i, j), value in np.ndenumerate(wins):
        if i != j:
            strong = abs(value - 50) > 32
            axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white" if strong else "black")
    names = [ranking.methods[i] for i in order]
    axis.set_xticks(
        range(len(names)), names, rotation=40, ha="left", rotation_mode="anchor", fontsize=8.5, color="black"
    )
    axis.xaxis.tick_top()
    axis.set_yticks([])
    axis.tick_params(length=0)
    axis.set_xlabel("the row ends closer to the front than the column, %", fontsize=9, color=GREY)
    for side in axis.spines.values():
        side.set_visible(False)
