"""Several runs on one page: curves of all of them in one figure per reward, and the final table with z-scores."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mogb_diffusion.comparison import Comparison, as_csv, as_markdown, as_text, cells, compare, note
from mogb_diffusion.config import from_yaml
from mogb_diffusion.errors import InputError
from mogb_diffusion.evaluation import own_record
from mogb_diffusion.report import COLORS, STYLE, Row, embedded, number, saved
from mogb_diffusion.results import EVALUATION, Record, read_record, rows_of
from mogb_diffusion.tracking import METRICS, read_metrics
from mogb_diffusion.trained import CONFIG

_LINES = ("-", "--", ":", "-.")
_SETTINGS = ("prompts", "pictures", "seed", "sampling")  # what scores depend on besides the weights


@dataclass(frozen=True)
class Entry:
    """What is known of a model.

    Attributes:
        name: For the legend and the table.
        rows: Of its ``metrics.jsonl``; empty where there is only an evaluation.
        record: Its evaluation; None where it has none.
        mode: How it was balanced, if known.
        remark: What is wrong with the evaluation; empty if nothing is.
    """

    name: str
    rows: tuple[Row, ...]
    record: Record | None
    mode: str = ""
    remark: str = ""


def write_comparison(targets: Sequence[Path], out: Path) -> tuple[Path, str]:
    """Writes ``comparison.html``, ``.csv``, ``.md`` and a figure per reward; the page, and its table as text.

    Args:
        targets: Folders of runs, other folders with an ``evaluation.json``, or such files. The evaluation of a run is
            that of ``evaluate``, where there is one that is not older than the last one that it made itself.
        out: Where to write.

    Raises:
        InputError: A target is none of these, or there is nothing to compare, or matplotlib is missing.
    """
    entries = _entries(targets)
    table = _table(entries)
    out.mkdir(parents=True, exist_ok=True)
    figures = []
    for reward in dict.fromkeys(name for entry in entries for name in _curves(entry)):
        path = out / f"compare-{re.sub(r'[^A-Za-z0-9_.-]', '_', reward)}.png"
        if saved(_reward_figure, (entries, reward), path):
            figures.append((path, reward))
    if table is None and not figures:
        raise InputError("There is nothing to compare: no run has an epoch or an evaluation yet.")
    if table is not None:
        (out / "comparison.csv").write_text(as_csv(table), encoding="utf-8")
        (out / "comparison.md").write_text(as_markdown(table), encoding="utf-8")
    page = out / "comparison.html"
    page.write_text(_page(entries, table, figures), encoding="utf-8")
    told = [] if table is None else [as_text(table), _warning(entries)]
    return page, "\n".join(part for part in told if part)


def _entries(targets: Sequence[Path]) -> list[Entry]:
    return [_entry(path, name) for path, name in zip(targets, _names(targets), strict=True)]


def _table(entries: Sequence[Entry]) -> Comparison | None:
    records = [entry.record for entry in entries if entry.record is not None]
    return compare(rows_of(records)) if records else None


def _names(targets: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().with_suffix("").parts if path.is_file() else path.resolve().parts for path in targets]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"{targets[0]} is named twice.")


def _entry(path: Path, name: str) -> Entry:
    record: Record | None
    if path.is_file():
        record = read_record(path)
        return Entry(str(record["name"]), (), record)
    evaluation = path / f"{EVALUATION}.json"
    record = read_record(evaluation) | {"name": name} if evaluation.is_file() else None
    remark = ""
    if not (path / METRICS).is_file():
        if record is None:
            raise InputError(f"{path} is no folder of a run: it has neither {METRICS} nor {EVALUATION}.json.")
        return Entry(name, (), record)
    rows = tuple(read_metrics(path))
    run = own = None
    if (path / CONFIG).is_file():
        run = from_yaml((path / CONFIG).read_text(encoding="utf-8"), str(path / CONFIG))
        own = own_record(rows, run, name)
    at = None if record is None else record.get("step")
    last = max((row["step"] for row in rows), default=0)
    if record is not None and at is not None and at < last:
        remark = f"{name}: {EVALUATION}.json is of step {at}, but the run is at step {last}"
        if own is not None and own["step"] > at:
            record, remark = own, f"{remark}: left out for the run's own evaluation of step {own['step']}"
    record = own if record is None else record
    return Entry(name, rows, record, "" if run is None else run.balancing.mode, f"{remark}." if remark else "")


def _curves(entry: Entry) -> list[str]:
    """Names of the rewards that it has a curve of."""
    found: dict[str, None] = {}
    for row in entry.rows:
        if row["kind"] in ("epoch", "evaluation"):
            found |= dict.fromkeys(row["rewards"] if row["kind"] == "epoch" else row["scores"])
    return list(found)


def _reward_figure(figure: Any, what: tuple[Sequence[Entry], str]) -> bool:
    entries, reward = what
    figure.set_size_inches(8, 4)
    axis = figure.subplots()
    drawn = False
    for n, entry in enumerate(entries):
        color, line = COLORS[n % len(COLORS)], _LINES[n // len(COLORS) % len(_LINES)]
        epochs = [row for row in entry.rows if row["kind"] == "epoch" and reward in row["rewards"]]
        tests = [row for row in entry.rows if row["kind"] == "evaluation"
                 and row["scores"].get(reward, {}).get("mean") is not None]  # fmt: skip
        label: str | None = entry.name
        if epochs:
            values = [number(row["rewards"][reward]) for row in epochs]
            axis.plot([row["epoch"] for row in epochs], values, color=color, ls=line, lw=1.4, label=label)
            label = None
        if tests:
            axis.errorbar(
                [row["epoch"] for row in tests], [row["scores"][reward]["mean"] for row in tests],
                [row["scores"][reward]["error"] or 0.0 for row in tests], fmt="o", color=color, ms=5, capsize=2, lw=1,
                label=label,
            )  # fmt: skip
        drawn = drawn or bool(epochs or tests)
    axis.set_title(reward, fontsize=11)
    axis.set_xlabel("epoch")
    axis.grid(alpha=0.25)
    if drawn:
        axis.legend(fontsize=8)
    return drawn


def _page(entries: Sequence[Entry], table: Comparison | None, figures: Sequence[tuple[Path, str]]) -> str:
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Comparison</title><style>{STYLE}</style>",
        f"<h1>{len(entries)} models</h1>",
        "<table><tr><th>model<th>balancing<th>epochs<th>optimizer steps</tr>",
    ]
    for entry in entries:
        record = entry.record or {}
        epoch = max((row["epoch"] for row in entry.rows), default=record.get("epoch"))
        step = max((row["step"] for row in entry.rows), default=record.get("step"))
        shown = "".join(f"<td>{'-' if value is None else value}" for value in (epoch, step))
        parts.append(f"<tr><td>{html.escape(entry.name)}<td>{html.escape(entry.mode or '-')}{shown}</tr>")
    parts.append("</table>")
    if table is not None:
        header, rows = cells(table)
        parts += ["<h2>Final scores</h2><table><tr>", *(f"<th>{html.escape(cell)}" for cell in header), "</tr>"]
        parts += ["<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) + "</tr>" for row in rows]
        parts.append(f"</table><p>{html.escape(note(table))} {html.escape(_warning(entries))}</p>")
    if figures:
        parts.append("<h2>Curves</h2><p>Lines: rollouts. Dots: held-out prompts, with standard errors.</p>")
    parts += [f"<figure>{embedded(path, reward)}</figure>" for path, reward in figures]
    return "\n".join(parts) + "</html>\n"


def _warning(entries: Sequence[Entry]) -> str:
    """What scores that stand side by side were not measured alike in, and evaluations of other steps."""
    records = [entry.record for entry in entries if entry.record is not None]
    differing = [key for key in _SETTINGS if len({repr(record.get(key)) for record in records}) > 1]
    if metrics := _differing_metrics(records):
        differing.append(f"what they measure ({'; '.join(metrics)})")
    told = [entry.remark for entry in entries if entry.remark]
    if differing:
        told.append(f"These scores were not measured alike: they differ in {', '.join(differing)}.")
    return " ".join(told)


def _differing_metrics(records: Sequence[Record]) -> list[str]:
    """Rewards whose score is not the same thing everywhere, such as GenEval by the benchmark's rule and in part."""
    meanings: dict[str, set[str]] = {}
    for record in records:
        for reward in {**record.get("base", {}), **record.get("trained", {})}:
            meanings.setdefault(reward, set()).add(record.get("metrics", {}).get(reward, "not said"))
    return [f"{reward}: {' | '.join(sorted(found))}" for reward, found in meanings.items() if len(found) > 1]
