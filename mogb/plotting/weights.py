"""How the weights move over a run, method by method."""

from pathlib import Path

import numpy as np

from mogb.compare.store import Record
from mogb.compare.summary import Summary
from mogb.plotting.style import DASHES, GREY, HUES, PALE, Picture, few_ticks, headline, label_outer, panels, save
from mogb.problems import make_problem

SECTION = "Weights over time"
LINES = 7  # more objectives than this are drawn as an image
PREFERRED = ("valley_scaled", "bowls_noisy", "multitask", "specialists")


def draw_weights(summary: Summary, folder: Path) -> list[Picture]:
    """Some telling problems, or the first ones if these were not run."""
    names = [name for name in PREFERRED if name in summary.problems] or summary.problems[:3]
    return [picture for name in names for picture in _draw(summary, name, folder)]


def _draw(summary: Summary, name: str, folder: Path) -> list[Picture]:
    records = [summary.records.get(f"{name}/0/{method}") for method in summary.methods]
    if not any(record and record.get("weights_over_time") for record in records):
        return []
    problem = make_problem(name)
    found = panels(len(records), aspect=0.72)
    for axis, record, method in zip(found.axes, records, summary.methods, strict=True):
        axis.set_title(method, fontsize=9.5 if len(method) < 24 else 7, pad=3)
        shares = None if record is None else record.get("weights_over_time")
        if record is None or not shares:
            axis.text(0.5, 0.5, _why(record), transform=axis.transAxes, ha="center", va="center", color=GREY)
            continue
        values = np.array(shares)
        times = (np.arange(len(values)) + 0.5) * record["steps"] / len(values)
        axis.axhline(1 / values.shape[1], color=PALE, linewidth=1, zorder=1)
        if values.shape[1] > LINES:
            order = np.argsort(-values.mean(0))
            axis.plot(times, values[:, order], color=HUES[0], linewidth=0.7, alpha=0.5)
            continue
        for k in range(values.shape[1]):
            axis.plot(times, values[:, k], color=HUES[k], linestyle=DASHES[k], linewidth=1.6, zorder=3)
    found.axes[0].set(ylim=_limits(records), xlim=(0, next(record["steps"] for record in records if record)))
    few_ticks(found.axes[0])
    _legend(found, problem.num_objectives)
    label_outer(found, "step", "share of the weight")
    headline(found.figure, name, "weights on the raw gradients, as shares of their sum of absolute values")
    path = folder / f"weights_{name}.png"
    save(found.figure, path)
    units = ", ".join(f"{unit:.3g}" for unit in problem.units.tolist()[:LINES])
    return [Picture(
        path, SECTION, name,
        "Averages over starting points and sixtieths of the run, seed 0; the pale line is 1/K. A method that balances "
        f"gives a large weight to an objective with a small gradient: the objectives' units here are {units}.",
    )]  # fmt: skip


def _why(record: Record | None) -> str:
    if record is None:
        return "not run"
    return "failed" if record["status"] != "ok" else "reads single coordinates:\nhas no weights"


def _limits(records: list[Record | None]) -> tuple[float, float]:
    values = [np.array(record["weights_over_time"]) for record in records if record and record.get("weights_over_time")]
    low, high = min(value.min() for value in values), max(value.max() for value in values)
    return min(-0.04, low - 0.04), max(1.04, high + 0.04)


def _legend(found, objectives: int) -> None:  # type: ignore[no-untyped-def]
    from matplotlib.lines import Line2D

    if objectives > LINES:
        found.legend.text(0.05, 0.5, f"one line for each of\n{objectives} objectives", va="center", color=GREY)
        return
    handles = [
        Line2D([], [], color=HUES[k], linestyle=DASHES[k], linewidth=1.6, label=f"$f_{{{k + 1}}}$")
        for k in range(objectives)
    ]
    found.legend.legend(handles=handles, loc="center left", frameon=False, handlelength=2.6)
