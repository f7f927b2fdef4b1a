"""Does rescaling one loss move the end point? A line from where a method ended to where it ends now."""

from pathlib import Path

import numpy as np

from mogb.compare.findings import scaled_pairs, shifts
from mogb.compare.summary import Summary
from mogb.plotting.style import GREY, HUES, PALE, Picture, headline, new_figure, save
from mogb.problems import make_problem

SECTION = "Scale invariance"


def draw_invariance(summary: Summary, folder: Path) -> list[Picture]:
    """One picture per problem that was run with and without rescaling."""
    return [picture for plain, scaled in scaled_pairs(summary) for picture in _draw(summary, plain, scaled, folder)]


def _draw(summary: Summary, plain: str, scaled: str, folder: Path) -> list[Picture]:
    moved = {method: shifts(summary, plain, scaled, method) for method in summary.methods}
    median = {method: float(np.median(values)) for method, values in moved.items() if values is not None}
    methods = sorted(median, key=lambda method: (median[method], method))
    if not methods:
        return []
    left, right = 0.2 + 0.085 * max(map(len, methods)), 1.2
    width, height = left + 7.6 + right, 1.3 + 0.44 * len(methods)
    figure = new_figure(width, height)
    axis = figure.add_axes((left / width, 0.5 / height, 7.6 / width, 0.44 * len(methods) / height))
    for row, method in enumerate(methods):
        if row % 2 == 0:
            axis.axhspan(row - 0.5, row + 0.5, color="#f5f5f5", zorder=0)
        ends = [np.array(summary.records[f"{name}/0/{method}"]["ends"])[:, 0] for name in (plain, scaled)]
        for start, (before, after) in enumerate(zip(*ends, strict=True)):
            y = row + 0.15 * (start - (len(ends[0]) - 1) / 2)
            hue = HUES[start % len(HUES)]
            axis.plot([before, after], [y, y], color=hue, linewidth=1.8, alpha=0.55, zorder=2)
            axis.plot(before, y, "o", markerfacecolor="white", markeredgecolor=hue, markersize=5.5, zorder=3)
            axis.plot(after, y, "o", color=hue, markersize=5.5, zorder=4)
        axis.text(1.02, row, f"{100 * median[method]:.1f} %", transform=axis.get_yaxis_transform(),
                  va="center", fontsize=9)  # fmt: skip
    axis.text(1.02, -0.85, "median shift", transform=axis.get_yaxis_transform(), va="center", fontsize=8.5, color=GREY)
    axis.set(ylim=(len(methods) - 0.5, -0.5), xlabel="$x_1$ at the end")
    axis.set_yticks(range(len(methods)), methods, fontsize=9, color="black")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=PALE, linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    headline(figure, f"{plain} against {scaled}", "hollow: before, filled: after one loss was rescaled")
    path = folder / f"invariance_{plain}.png"
    save(figure, path)
    scales = getattr(make_problem(scaled), "scales", None)
    return [Picture(
        path, SECTION, f"{plain} against {scaled}",
        f"End points from the published starts (a colour each), first coordinate, when the losses are multiplied by "
        f"{scales}. The Pareto set stays where it is. Shifts are distances in lengths of the Pareto set; methods that "
        "do not depend on scales are on top.",
    )]  # fmt: skip
