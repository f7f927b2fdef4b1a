"""A run on one page: ``report.html`` with its pictures inside, and the same figures as PNG files beside it."""

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mogb_diffusion.errors import InputError
from mogb_diffusion.tracking import read_metrics

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#b8a800")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; }
img { max-width: 100%; } figure { margin: 0 0 1rem; display: inline-block; vertical-align: top; }
figcaption { color: #666; } pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 12px; }
.grids figure { width: 48%; }
"""
Row = dict[str, Any]


def write_report(folder: Path) -> Path:
    """Makes the figures of a run and its page, from ``metrics.jsonl`` and ``samples/``.

    Raises:
        InputError: The folder holds no run, or matplotlib is missing.
    """
    rows = read_metrics(folder)
    if not rows:
        raise InputError(f"{folder} has no metrics yet: train for an epoch first.")
    figures = [
        ("rewards.png", "Rewards: rollouts (lines) and held-out prompts (dots, with standard errors)", _rewards),
        ("alpha.png", "Shares of the rewards in the direction, over optimizer steps", _alpha),
        (
            "cosines.png",
            "Cosines between the direction and each reward's gradient, where gradients were taken",
            _cosines,
        ),
        ("time.png", "Where the time went", _time),
    ]
    made = [(name, caption) for name, caption, draw in figures if saved(draw, rows, folder / name)]
    page = folder / "report.html"
    page.write_text(_page(folder, rows, made), encoding="utf-8")
    return page


def held_out_table(rows: Sequence[Row]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Reward, first score and last score, from the evaluations of a run."""
    found = [row for row in rows if row["kind"] == "evaluation"]
    if not found:
        return []
    first, last = found[0]["scores"], found[-1]["scores"]
    return [(name, first[name], last[name]) for name in last if name in first]


def _page(folder: Path, rows: Sequence[Row], figures: Sequence[tuple[str, str]]) -> str:
    epochs = [row for row in rows if row["kind"] == "epoch"]
    seconds = sum(sum(v for k, v in row["seconds"].items() if k != "scoring") for row in epochs)
    config = (folder / "config.yaml").read_text() if (folder / "config.yaml").exists() else ""
    title = config.partition("\n")[0].removeprefix("name: ") or folder.name
    steps = max((row["step"] for row in rows), default=0)
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{len(epochs)} epochs, {steps} optimizer steps, {seconds / 60:.1f} minutes.</p>",
        _table(rows),
        _pictures(folder),
    ]
    for name, caption in figures:
        parts.append(f"<h2>{html.escape(caption)}</h2>{embedded(folder / name, caption)}")
    parts.append(_failures(epochs))
    parts.append(f"<h2>Configuration</h2><pre>{html.escape(config)}</pre></html>\n")
    return "\n".join(part for part in parts if part)


def _table(rows: Sequence[Row]) -> str:
    table = held_out_table(rows)
    if not table:
        return ""
    lines = ["<h2>Held-out prompts</h2><table><tr><th>reward<th>before<th>after<th>change<th>pictures</tr>"]
    for name, before, after in table:
        change = _difference(before["mean"], after["mean"])
        lines.append(
            f"<tr><td>{html.escape(name)}<td>{_score(before)}<td>{_score(after)}<td>{change}<td>{after['count']}</tr>"
        )
    return "".join(lines) + "</table>"


def _score(score: dict[str, Any]) -> str:
    if score["mean"] is None:
        return "-"
    return f"{score['mean']:.3f}" + ("" if score["error"] is None else f" ± {score['error']:.3f}")


def _difference(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{after - before:+.3f}"


def _pictures(folder: Path) -> str:
    found = [(name, folder / "samples" / f"{name}.png") for name in ("before", "after")]
    shown = [
        f"<figure>{embedded(path, name)}<figcaption>{name}</figcaption></figure>"
        for name, path in found
        if path.exists()
    ]
    return (
        f"<h2>The same prompts and noise, before and after</h2><div class=grids>{''.join(shown)}</div>" if shown else ""
    )


def _failures(epochs: Sequence[Row]) -> str:
    total: dict[str, dict[str, int]] = {}
    for row in epochs:
        for name, counts in row.get("failures", {}).items():
            for kind, count in counts.items():
                total.setdefault(name, {})[kind] = total.get(name, {}).get(kind, 0) + count
    skipped = sum(row.get("skipped", 0) for row in epochs)
    if not total and not skipped:
        return ""
    lines = [
        f"<li>{html.escape(name)}: " + ", ".join(f"{n} {k}" for k, n in counts.items())
        for name, counts in total.items()
    ]
    lines += [f"<li>{skipped} optimizer steps were skipped: a gradient was not finite"] if skipped else []
    return f"<h2>What went wrong</h2><ul>{''.join(lines)}</ul>"


def embedded(path: Path, text: str) -> str:
    """A picture within a page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


def saved(draw: Any, what: Any, path: Path) -> bool:
    """Makes a figure with ``draw(figure, what)``, which says whether there is anything to see; whether it was saved.

    Raises:
        InputError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("A report needs matplotlib. Install it with: pip install 'mogb[plot]'") from None
    figure = Figure(layout="constrained", dpi=110)
    if not draw(figure, what):
        return False
    figure.savefig(path)
    return True


def _rewards(figure: Any, rows: Sequence[Row]) -> bool:
    epochs = [row for row in rows if row["kind"] == "epoch"]
    if not epochs:
        return False
    names = list(epochs[0]["rewards"])
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure.set_size_inches(3.2 * columns, 2.4 * lines)
    axes = figure.subplots(lines, columns, squeeze=False)
    for n, axis in enumerate(axes.flat):
        if n >= len(names):
            axis.set_axis_off()
            continue
        name, color = names[n], COLORS[n % len(COLORS)]
        axis.plot([r["epoch"] for r in epochs], [number(r["rewards"][name]) for r in epochs], color=color, lw=1.2)
        tests = [r for r in rows if r["kind"] == "evaluation" and r["scores"].get(name, {}).get("mean") is not None]
        axis.errorbar(
            [r["epoch"] for r in tests], [r["scores"][name]["mean"] for r in tests],
            [r["scores"][name]["error"] or 0.0 for r in tests], fmt="o", color="#222222", ms=4, capsize=2, lw=1,
        )  # fmt: skip
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.25)
        if n + columns >= len(names):
            axis.set_xlabel("epoch")
    return True


def _alpha(figure: Any, rows: Sequence[Row]) -> bool:
    steps = [row for row in rows if row["kind"] == "step" and row.get("alpha")]
    steps = [row for row in steps if all(value is not None for value in row["alpha"].values())]
    if not steps:
        return False
    figure.set_size_inches(8, 3)
    axis = figure.subplots()
    names = list(steps[0]["alpha"])
    for name, color in zip(names, COLORS * 9, strict=False):
        series = [row["alpha"][name] for row in steps]
        axis.plot([row["step"] for row in steps], series, color=color, lw=0.7, alpha=0.35)
        axis.plot([row["step"] for row in steps], _smooth(series), color=color, lw=1.8, label=name)
    axis.axhline(1 / len(names), color="#999999", lw=0.8, ls=":")
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel("optimizer step")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, ncols=min(5, len(names)), loc="upper right")
    return True


def _cosines(figure: Any, rows: Sequence[Row]) -> bool:
    steps = [row for row in rows if row["kind"] == "step" and row.get("cosines")]
    if not steps:
        return False
    figure.set_size_inches(8, 3)
    axis = figure.subplots()
    for name, color in zip(steps[0]["cosines"], COLORS * 9, strict=False):
        heard = [row for row in steps if name not in row["left_out"]]
        axis.plot(
            [r["step"] for r in heard], _smooth([r["cosines"][name] for r in heard]), color=color, lw=1.6, label=name
        )
    worst = [(row["step"], row["min_cosine"]) for row in steps if row["min_cosine"] is not None]
    axis.plot([step for step, _ in worst], [value for _, value in worst], ".", color="#222222", ms=3, label="worst")
    axis.axhline(0, color="#999999", lw=0.8)
    axis.set_ylim(-1.02, 1.02)
    axis.set_xlabel("optimizer step")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, ncols=3, loc="lower right")
    return True


def _time(figure: Any, rows: Sequence[Row]) -> bool:
    total: dict[str, float] = {}
    for row in rows:
        for phase, seconds in row.get("seconds", {}).items():
            if phase != "scoring":
                total[phase] = total.get(phase, 0.0) + seconds
    if not total:
        return False
    figure.set_size_inches(8, 0.5 + 0.28 * len(total))
    axis = figure.subplots()
    ordered = sorted(total.items(), key=lambda item: item[1])
    axis.barh([phase for phase, _ in ordered], [seconds for _, seconds in ordered], color=COLORS[0], height=0.65)
    axis.set_xlabel("seconds")
    axis.grid(alpha=0.25, axis="x")
    return True


def _smooth(series: Sequence[float], width: int = 9) -> list[float]:
    half = width // 2
    windows = (series[max(0, n - half) : n + half + 1] for n in range(len(series)))
    return [sum(window) / len(window) for window in windows]


def number(value: float | None) -> float:
    """NaN where there is none, which a figure leaves out."""
    return math.nan if value is None else value
