"""``report.html``: figures, tables, settings, findings and how to cite, in one file that loads nothing from outside."""

import base64
import re
from html import escape
from itertools import groupby
from pathlib import Path

from mogb.aggregators import get
from mogb.compare.findings import findings
from mogb.compare.markdown import describe, to_markdown
from mogb.compare.store import write_text
from mogb.compare.summary import Summary, to_csv
from mogb.compare.tables import Table, failure_table, overall_table, problem_table, solver_table
from mogb.plotting import Picture, draw_all, require_matplotlib
from mogb.specs import parse_spec

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1240px; margin: 0 auto; padding: 1.5rem; }
h1 { margin-bottom: .2rem; } h2 { margin-top: 2.6rem; border-bottom: 1px solid #ccc; padding-bottom: .2rem; }
h3 { margin: 1.8rem 0 .3rem; } nav a { margin-right: 1rem; white-space: nowrap; } a { color: #0072b2; }
.lead, .note, figcaption { color: #555; } figure { margin: 1.2rem 0 2rem; }
figure img { max-width: 100%; height: auto; }
figcaption { max-width: 900px; font-size: 14px; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; margin: .6rem 0 1.4rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th { border-bottom: 2px solid #999; } th:first-child, td:first-child { text-align: left; }
tbody tr:hover { background: #f4f8fb; } td.text { text-align: left; white-space: normal; max-width: 40rem; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px; }
li { margin: .3rem 0; max-width: 1000px; }
"""


def check_figures(wanted: bool) -> None:
    """Says early that figures cannot be drawn.

    Raises:
        InputError: They are wanted, but matplotlib is missing.
    """
    if wanted:
        require_matplotlib()


def write_report(summary: Summary, folder: Path, *, figures: bool = True, workers: int = 0) -> list[Path]:
    """Writes ``summary.csv``, ``summary.md``, the figures and ``report.html``; returns what was written.

    Args:
        summary: Of the results in the folder.
        folder: Where to.
        figures: Whether to draw; without them, matplotlib is not needed.
        workers: Processes that draw; 0 means this one.
    """
    write_text(folder / "summary.csv", to_csv(summary))
    write_text(folder / "summary.md", to_markdown(summary))
    pictures = draw_all(summary, folder, workers) if figures else []
    write_text(folder / "report.html", to_html(summary, pictures))
    written = [folder / name for name in ("summary.csv", "summary.md", "report.html")]
    return written + [picture.path for picture in pictures]


def to_html(summary: Summary, pictures: list[Picture]) -> str:
    """The whole report."""
    sections = [("Findings", _findings(summary))]
    if (table := overall_table(summary)) is not None:
        sections.append((table.title, _table(table)))
    sections += [
        (name, "".join(map(_figure, group))) for name, group in groupby(pictures, key=lambda item: item.section)
    ]
    if (table := failure_table(summary)) is not None:
        sections.append((table.title, _table(table)))
    sections.append(("Problems", "".join(_titled(problem_table(summary, name)) for name in summary.problems)))
    sections += [
        ("Solvers", _table(solver_table(summary))),
        ("Settings", _settings(summary)),
        ("How to cite", _cite(summary)),
    ]
    links = "".join(f'<a href="#{_anchor(title)}">{escape(title)}</a> ' for title, _ in sections)
    body = "".join(f'<h2 id="{_anchor(title)}">{escape(title)}</h2>\n{text}\n' for title, text in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Comparison of balancing methods</title><style>{STYLE}</style></head><body>\n"
        f"<h1>Comparison of balancing methods</h1>\n<p class=lead>{escape(describe(summary))}</p>\n"
        f"<nav>{links}</nav>\n{body}</body></html>\n"
    )


def _findings(summary: Summary) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(summary)) + "</ul>"


def _figure(picture: Picture) -> str:
    data, title = base64.b64encode(picture.path.read_bytes()).decode(), escape(picture.title)
    return (
        f'<figure><h3>{title}</h3><img alt="{title}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>\n"
    )


def _titled(table: Table) -> str:
    return f"<h3>{escape(table.title)}</h3>{_table(table)}"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>'
    return f'{note}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(text: str) -> str:
    kind = ' class="text"' if len(text) > 40 else ""
    return f"<td{kind}>{escape(text)}</td>"


def _settings(summary: Summary) -> str:
    shown = {name: value for name, value in summary.settings.items() if name != "shard"}
    rows = tuple(
        (name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)) for name, value in shown.items()
    )
    wall = sum(record["wall_seconds"] or 0.0 for record in summary.records.values())
    versions = sorted(
        {", ".join(f"{k} {v}" for k, v in record["versions"].items()) for record in summary.records.values()}
    )
    facts = (*rows, ("run with", "; ".join(versions)), ("computing time", f"{wall:.0f} s, summed over runs"))
    return _table(Table("Settings", "As recorded in settings.json.", ("setting", "value"), facts))


def _cite(summary: Summary) -> str:
    names = sorted({parse_spec(method).methods[-1] for method in summary.methods})
    entries = "\n\n".join(get(name).reference.bibtex(name) for name in names)
    return (
        "<p>Cite the papers of the methods that you use; the problems name theirs in their tables.</p>"
        f"<pre>{escape(entries)}</pre>"
    )


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower())
