"""What a :class:`mogb.Monitor` saw, on one page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64

from mogb.plotting.style import (
    BLACK,
    BLUE,
    DASHES,
    GREEN,
    GREY,
    HUES,
    PALE,
    VERMILLION,
    headline,
    new_figure,
    save,
    styled,
)  # fmt: skip

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = 7  # more objectives than this are drawn as a band with a median
POINTS = 400  # more steps than this are averaged in as many groups
WRITTEN_UP_TO = 8  # objectives up to which the cosines are written into the matrix


def draw_monitor(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Eight panels: losses, weights, norms, angles to the direction, conflicts, stationarity, solver, all angles."""
    names = list(dict.fromkeys(name for record in records for name in record["names"]))
    steps = np.array([record["step"] for record in records], dtype=float)
    with styled():
        figure = new_figure(13.6, 6.6)
        grid = figure.add_gridspec(2, 4, left=0.052, right=0.988, bottom=0.085, top=0.815, wspace=0.3, hspace=0.36)
        axes = [figure.add_subplot(grid[row, column]) for row in range(2) for column in range(4)]
        for axis, key, title in zip(
            axes, ("losses", "weights", "norms"), ("losses", "weights on the gradients", "gradient norms"), strict=False
        ):
            _draw_objectives(axis, steps, _per_objective(records, key, names), title, logarithmic=key != "weights")
        _draw_angles(axes[3], steps, records)
        _draw_share(axes[4], steps, records, "conflict_rate", "share of pairs that conflict", VERMILLION)
        _draw_share(axes[5], steps, records, "stationarity", "distance from Pareto stationary", GREEN)
        _draw_solver(axes[6], steps, records, names)
        _draw_matrix(figure, axes[7], records, names)
        for axis in axes[:7]:
            _finish(axis, steps)
        _legend(figure, names)
        balanced = sum(bool(record["balanced"]) for record in records)
        headline(figure, "Balancing, step by step", f"{len(records)} steps, {balanced} of them balanced in full")
        save(figure, path)


def _draw_objectives(
    axis: "Axes", steps: Float64[np.ndarray, " T"], values: Float64[np.ndarray, "T K"], title: str, *, logarithmic: bool
) -> None:
    axis.set_title(title)
    known = ~np.isnan(values).all(axis=1)
    if not known.any():
        _empty(axis)
        return
    times, values = _averaged(steps[known], values[known])
    some = values[values > 0]
    if logarithmic and not (values < 0).any() and some.size and some.max() > 20 * some.min():
        axis.set_yscale("log")
        values = np.where(values > 0, values, np.nan)  # a loss of exactly 0 has no place there
    elif not logarithmic:
        axis.axhline(0, color=PALE, linewidth=1, zorder=1)
    if values.shape[1] > LINES:
        low, middle, high = (np.array([_at(row, q) for row in values]) for q in (0, 50, 100))
        axis.fill_between(times, low, high, color=BLUE, alpha=0.25, linewidth=0)
        axis.plot(times, middle, color=BLUE, linewidth=1.5, marker=_dot(times))
    else:
        for k in range(values.shape[1]):
            axis.plot(times, values[:, k], color=HUES[k], linestyle=DASHES[k], linewidth=1.5, marker=_dot(times))


def _draw_angles(axis: "Axes", steps: Float64[np.ndarray, " T"], records: Sequence[Mapping[str, Any]]) -> None:
    axis.set_title("cos(direction, gradient)")
    values = np.stack([_column(records, key) for key in ("min_cosine", "mean_cosine", "var_cosine")], axis=1)
    known = ~np.isnan(values).any(axis=1)
    if not known.any():
        _empty(axis)
        return
    times, values = _averaged(steps[known], values[known])
    low, mean, spread = values[:, 0], values[:, 1], np.sqrt(np.maximum(values[:, 2], 0))
    top, bottom = np.minimum(mean + spread, 1), np.maximum(mean - spread, -1)
    axis.fill_between(times, bottom, top, color=BLUE, alpha=0.22, linewidth=0, label="± one deviation")
    axis.plot(times, mean, color=BLUE, linewidth=1.5, marker=_dot(times), label="mean")
    axis.plot(times, low, color=VERMILLION, linestyle="--", linewidth=1.5, marker=_dot(times), label="smallest")
    axis.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    floor = min(-0.08, float(min(low.min(), bottom.min())) - 0.06)
    axis.set_ylim(floor - 0.34 * (1.05 - floor), 1.05)  # room for the legend
    axis.legend(loc="lower center", ncols=3, frameon=False, fontsize=7, columnspacing=0.8, handlelength=1.4)


def _draw_share(
    axis: "Axes", steps: Float64[np.ndarray, " T"], records: Sequence[Mapping[str, Any]], key: str, title: str, hue: str
) -> None:
    axis.set_title(title)
    values = _column(records, key)
    known = ~np.isnan(values)
    if not known.any():
        _empty(axis)
        return
    times, shown = _averaged(steps[known], values[known][:, None])
    axis.plot(times, shown[:, 0], color=hue, linewidth=1.5, marker=_dot(times))
    axis.set_ylim(-0.04, 1.04)


def _draw_solver(
    axis: "Axes", steps: Float64[np.ndarray, " T"], records: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> None:
    """The residual, and above it when something was out of the ordinary."""
    axis.set_title("solver residual, events")
    residual = _column(records, "residual")
    fine = np.nan_to_num(residual, nan=1.0) > 0
    floor = 1e-17
    axis.set_yscale("log")
    axis.set_ylim(floor, 1e9)
    axis.plot(
        steps, np.maximum(np.nan_to_num(residual, nan=1.0), 10 * floor), color=GREY, linewidth=0.9,
        marker="." if fine.any() else None, markersize=2.5,
    )  # fmt: skip
    axis.set_yticks([1e-16, 1e-12, 1e-8, 1e-4, 1], labels=["0", "$10^{-12}$", "$10^{-8}$", "$10^{-4}$", "1"])
    rows = (
        ("left out", "|", VERMILLION, [bool(record["left_out"]) for record in records]),
        ("not converged", "x", BLACK, [not record["converged"] for record in records]),
        ("skipped", "v", BLUE, [bool(record["skipped"]) for record in records]),
    )
    for row, (label, marker, hue, flags) in enumerate(rows):
        height = 10.0 ** (7.6 - 2.6 * row)
        where = steps[np.array(flags, dtype=bool)]
        axis.plot(where, np.full(len(where), height), linestyle="", marker=marker, color=hue, markersize=5)
        axis.text(
            -0.02, height, label, transform=axis.get_yaxis_transform(), ha="right", va="center", fontsize=6.5,
            color=hue if len(where) else GREY,
        )  # fmt: skip
    axis.axhline(1e1, color=PALE, linewidth=1)


def _draw_matrix(figure: "Figure", axis: "Axes", records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    last = next((record for record in reversed(records) if record.get("cosines") is not None), None)
    if last is None or len(last["names"]) < 2:
        axis.set_title("cosines between gradients")
        _empty(axis)
        axis.set_xticks([])
        axis.set_yticks([])
        return
    size = len(last["names"])
    matrix = np.eye(size)
    matrix[np.triu_indices(size, 1)] = [np.nan if value is None else value for value in last["cosines"]]
    matrix = np.where(np.tri(size, k=-1, dtype=bool), matrix.T, matrix)
    axis.set_title(f"cosines between gradients, step {last['step']}")
    image = axis.imshow(matrix, cmap="PuOr_r", vmin=-1, vmax=1, aspect="auto")
    short = [name if len(name) <= 9 else name[:8] + "…" for name in last["names"]]
    size_of_text = 8 if size <= 6 else 6
    axis.set_xticks(range(size), labels=short, fontsize=size_of_text, rotation=30 if size > 3 else 0)
    axis.set_yticks(range(size), labels=short, fontsize=size_of_text)
    if size <= WRITTEN_UP_TO:
        for i in range(size):
            for j in range(size):
                dark = abs(matrix[i, j]) > 0.6
                axis.text(
                    j, i, f"{matrix[i, j]:+.2f}" if i != j else "1", ha="center", va="center",
                    fontsize=size_of_text, color="white" if dark else BLACK,
                )  # fmt: skip
    else:
        figure.colorbar(image, ax=axis, fraction=0.1, pad=0.03, ticks=[-1, 0, 1])


def _finish(axis: "Axes", steps: Float64[np.ndarray, " T"]) -> None:
    from matplotlib.ticker import MaxNLocator

    margin = max(0.02 * float(steps[-1] - steps[0]), 0.5)
    axis.set_xlim(float(steps[0]) - margin, float(steps[-1]) + margin)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_xlabel("step", labelpad=1)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure: "Figure", names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any]
    if len(names) > LINES:
        handles = [
            Line2D([], [], color=BLUE, linewidth=1.5, label=f"median of {len(names)} objectives"),
            Patch(facecolor=BLUE, alpha=0.25, label="smallest to largest"),
        ]
    else:
        handles = [
            Line2D(
                [],
                [],
                color=HUES[k],
                linestyle=DASHES[k],
                linewidth=1.6,
                label=name if len(name) < 24 else name[:22] + "…",
            )
            for k, name in enumerate(names)
        ]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.045, 0.935), ncols=len(handles), frameon=False,
        handlelength=2.6, columnspacing=1.6,
    )  # fmt: skip


def _empty(axis: "Axes") -> None:
    axis.text(
        0.5, 0.5, "not known: no step\nformed gradients", transform=axis.transAxes, ha="center", va="center", color=GREY
    )


def _at(row: Float64[np.ndarray, " K"], percent: int) -> float:
    known = row[~np.isnan(row)]
    return float(np.percentile(known, percent)) if len(known) else float("nan")


def _dot(times: Float64[np.ndarray, " T"]) -> str | None:
    return "o" if len(times) == 1 else None


def _column(records: Sequence[Mapping[str, Any]], key: str) -> Float64[np.ndarray, " T"]:
    values = (record.get(key) for record in records)
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _per_objective(records: Sequence[Mapping[str, Any]], key: str, names: Sequence[str]) -> Float64[np.ndarray, "T K"]:
    values = np.full((len(records), len(names)), np.nan)
    positions = {name: index for index, name in enumerate(names)}
    for row, record in enumerate(records):
        for name, value in zip(record["names"], record.get(key) or (), strict=False):
            values[row, positions[name]] = np.nan if value is None else value
    return values


def _averaged(
    steps: Float64[np.ndarray, " T"], values: Float64[np.ndarray, "T K"]
) -> tuple[Float64[np.ndarray, " G"], Float64[np.ndarray, "G K"]]:
    """Means over groups of consecutive steps, where there are too many to draw."""
    if len(steps) <= POINTS:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), POINTS)
    means = []
    for part in parts:
        known = ~np.isnan(values[part])
        sums = np.where(known, values[part], 0.0).sum(axis=0)
        counts = known.sum(axis=0)
        means.append(np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0))
    return np.array([steps[part].mean() for part in parts]), np.array(means)
