"""Summaries of the multi-task benchmark as Markdown, and as one figure."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from _common import table
from _multitask_runs import example
from _multitask_summary import BASELINE, Interval, Row, ranking

import mogb
from mogb.plotting.style import BLUE, GREEN, GREY, PALE, VERMILLION, headline, new_figure, save, styled

HUES = {"better": GREEN, "worse": VERMILLION, "cannot be told apart": BLUE, "": "#111111"}
LEFTMOST = -60.0  # percent: a mean further left is an arrow with a number


def verdict(rows: Mapping[str, Sequence[Row]]) -> str:
    """What the tables say, counted."""
    lines = []
    for problem, found in rows.items():
        others = [row for row in found if row.method != BASELINE]
        names = {
            kind: [row.method for row in others if row.verdict == kind]
            for kind in ("better", "worse", "cannot be told apart", "failed")
        }
        best = next((row for row in found if row.delta is not None), None)
        base = next((row for row in found if row.method == BASELINE), None)
        if best is None or best.delta is None:
            lines.append(f"- **{problem}**: every method failed.")
            continue
        against = f"; {BASELINE} {base.delta.text(sign=True)}" if base is not None and base.delta is not None else ""
        lines.append(
            f"- **{problem}**: the best mean is {best.method}'s, {best.delta.text(sign=True)} %{against}. Against "
            f"{BASELINE}, {_named(names['better'], 'better')}; {_named(names['worse'], 'worse')}; "
            f"{len(names['cannot be told apart'])} cannot be told apart; {_named(names['failed'], 'failed')}. One by "
            f"one, without the correction, {_named([row.method for row in others if _ahead(row)], 'ahead')}."
        )
    return "\n".join(lines)


def _ahead(row: Row) -> bool:
    """Whether the interval of the gain lies above 0, as if this were the only method."""
    return row.gain is not None and row.gain.mean - row.gain.half > 0


def _named(methods: Sequence[str], kind: str) -> str:
    """Such as ``2 are better (a, b)``."""
    verb = "" if kind == "failed" else "is " if len(methods) == 1 else "are "
    return f"{len(methods)} {verb}{kind}" + (f" ({', '.join(methods)})" if methods else "")


def overall_table(rows: Mapping[str, Sequence[Row]]) -> str:
    """Every method by its mean rank over the problems, with its Δm on each."""
    found = ranking(rows)
    if found is None:
        return "No method finished."
    by_name = {problem: {row.method: row for row in mine} for problem, mine in rows.items()}
    lines = []
    for i in found.order:
        method = found.methods[i]
        rank = f"{found.overall[i]:.1f} [{found.overall_low[i]:.0f}, {found.overall_high[i]:.0f}]"
        name = method.split("(")[0]
        reads = mogb.make(name).reads if name in mogb.registered() else ""
        lines.append([method, reads, rank, *(_delta(by_name[problem][method]) for problem in rows)])
    return table(["method", "reads", "mean rank", *(f"Δm {problem}, %" for problem in rows)], lines)


def _delta(row: Row) -> str:
    if row.delta is None:
        return "failed"
    mark = {"better": " ▲", "worse": " ▼"}.get(row.verdict, "")
    return row.delta.text(sign=True) + mark


def problem_table(problem: str, rows: Sequence[Row], alone: Mapping[str, Interval]) -> str:
    """Every metric of one problem."""
    module = example(problem)
    header = [
        "method", *(f"{task}, {module.METRICS[task]}" for task in module.TASKS), "Δm, %", f"Δm - {BASELINE}'s",
        "p (Holm)", "loses most", "uphill steps", "passes", "CPU s",
    ]  # fmt: skip
    lines = [["each task alone", *(_metric(alone[task]) for task in module.TASKS), "0", "", "", "", "", "", ""]]
    for row in rows:
        if not row.metrics:
            lines.append([row.method, *("" for _ in module.TASKS), "failed", *("" for _ in range(6))])
            continue
        lines.append([
            row.method,
            *(_metric(row.metrics[task]) for task in module.TASKS),
            "failed" if row.delta is None else row.delta.text(sign=True),
            "" if row.gain is None else row.gain.text(sign=True),
            "" if np.isnan(row.p) else f"{row.p:.2g}",
            "" if row.worst is None else f"{row.worst[0]} {row.worst[1]:+.1f} %",
            "" if row.uphill is None else f"{100 * row.uphill:.0f} %",
            f"{row.passes:.1f}",
            f"{row.seconds:.1f}",
        ])  # fmt: skip
    return table(header, lines)


def _metric(found: Interval) -> str:
    digits = max(0, 2 - int(np.floor(np.log10(max(abs(found.mean), 1e-12))))) if found.mean else 2
    return found.text(digits)


def failures(rows: Mapping[str, Sequence[Row]]) -> str:
    """Why what failed, failed."""
    lines = [
        f"- {problem}, {row.method}, {row.failure}" for problem, found in rows.items() for row in found if row.failure
    ]
    return "\n".join(lines) or "No run failed."


def draw(rows: Mapping[str, Sequence[Row]], path: pathlib.Path) -> None:
    """One panel a problem: Δm of every method with its interval, the best mean rank on top."""
    found = ranking(rows)
    if found is None:
        return
    methods = [found.methods[i] for i in found.order]
    with styled():
        left, panel, height = 0.3 + 0.075 * max(map(len, methods)), 3.3, 1.7 + 0.205 * len(methods)
        width = left + len(rows) * (panel + 0.15) + 0.1
        figure = new_figure(width, height)
        for column, (problem, mine) in enumerate(rows.items()):
            place = (left + column * (panel + 0.15)) / width
            axis = figure.add_axes((place, 0.97 / height, panel / width, 0.205 * len(methods) / height))
            _panel(axis, methods, {row.method: row for row in mine}, problem)
            axis.tick_params(labelleft=column == 0)
        _legend(figure)
        headline(
            figure,
            "Δm against training each task alone",
            "mean over seeds, 95 % t-intervals; right is better; methods by mean rank",
        )
        save(figure, path)


def _panel(axis, methods, rows, problem):  # type: ignore[no-untyped-def]
    drawn = [row for row in rows.values() if row.delta is not None]
    low = max(LEFTMOST, min((row.delta.mean - _half(row) for row in drawn), default=0.0))
    high = max(0.0, max((row.delta.mean + _half(row) for row in drawn), default=0.0))
    margin = 0.06 * (high - low or 1.0)
    for i, method in enumerate(methods):
        row = rows[method]
        if i % 2 == 0:
            axis.axhspan(i - 0.5, i + 0.5, color="#f5f5f5", zorder=0)
        if row.delta is None:
            axis.text(low - margin / 2, i, " failed", va="center", fontsize=7.5, color=GREY, style="italic")
        elif row.delta.mean < low:
            axis.plot(low - margin / 2, i, "<", color=HUES[row.verdict], markersize=5)
            axis.text(low + margin / 2, i, f"{row.delta.text(0, sign=True)}", va="center", fontsize=7.5, color=GREY)
        else:
            ends = max(low - margin, row.delta.mean - _half(row)), row.delta.mean + _half(row)
            axis.hlines(i, *ends, color=HUES[row.verdict], linewidth=2, alpha=0.75)
            axis.plot(row.delta.mean, i, "o", color=HUES[row.verdict], markersize=5, markeredgecolor="white")
    axis.axvline(0, color=GREY, linewidth=0.8, zorder=1)
    if BASELINE in rows and rows[BASELINE].delta is not None:
        axis.axvline(rows[BASELINE].delta.mean, color="#111111", linewidth=0.8, linestyle=":", zorder=1)
    axis.set(ylim=(len(methods) - 0.5, -0.5), xlim=(low - margin, high + margin), xlabel="Δm, %", title=problem)
    axis.set_yticks(range(len(methods)), methods, fontsize=8.5, color="black")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=PALE, linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _legend(figure):  # type: ignore[no-untyped-def]
    from matplotlib.lines import Line2D

    names = {
        "better": f"better than {BASELINE}", "worse": "worse", "cannot be told apart": "cannot be told apart",
        "": f"{BASELINE} (dotted)",
    }  # fmt: skip
    handles = [
        Line2D([], [], color=HUES[kind], marker="o", linewidth=2, markeredgecolor="white", label=label)
        for kind, label in names.items()
    ]
    figure.legend(
        handles=handles, loc="lower center", ncols=4, frameon=False, bbox_to_anchor=(0.5, 0.0), fontsize=8.5,
        title="paired t-test over seeds, Holm-corrected at 5 %", title_fontsize=8,
    )  # fmt: skip


def _half(row: Row) -> float:
    assert row.delta is not None
    return 0.0 if np.isnan(row.delta.half) else row.delta.half
