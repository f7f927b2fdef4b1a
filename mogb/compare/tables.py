"""The tables of a report, as strings: once for Markdown, once for HTML."""

from dataclasses import dataclass

import numpy as np

from mogb.compare.ranking import Ranking
from mogb.compare.summary import Row, Summary
from mogb.problems import make_problem


@dataclass(frozen=True)
class Table:
    """Cells that are ready to print.

    Attributes:
        title: A heading.
        note: A sentence that says how to read it.
        header: Column names.
        rows: As many cells as the header each.
    """

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"## {self.title}\n\n{self.note}\n\n{text}\n"


def overall_table(summary: Summary) -> Table | None:
    """One row per method, best first; None where nothing was ranked."""
    distance, coverage = summary.distance_ranking, summary.coverage_ranking
    if distance is None or coverage is None:
        return None
    rows = []
    for i in distance.order:
        method = distance.methods[i]
        mine = [row for row in summary.rows if row["method"] == method]
        others = np.delete(distance.wins[i], i)
        wins = float(others.mean()) if others.size else None
        rows.append((
            method, _interval(distance, i), _interval(coverage, i), percent(wins),
            percent(_average(mine, "arrived")), percent(_average(mine, "conflict_rate")),
            percent(_average(mine, "held_out_conflict_rate")), number(_average(mine, "cosine_min")),
            str(sum(row["failed"] for row in mine)),
        ))  # fmt: skip
    return Table(
        "Methods over all problems",
        "Mean ranks over problems with 95 % bootstrap intervals, 1 is best: by distance to the front (points within a "
        "problem's tolerance tie), and by coverage, the IGD+ of the points reached from all starts. Wins are against a "
        "random other method. Conflicts: share of steps whose direction points against some gradient; held out: "
        "against an exact gradient, on stochastic problems, until a start arrives.",
        ("method", "rank, distance", "rank, coverage", "wins", "arrived", "conflicts", "held out", "mean of min cos",
         "failed runs"),
        tuple(rows),
    )  # fmt: skip


def problem_table(summary: Summary, name: str) -> Table:
    """One row per method on one problem, in the order of the plan."""
    problem = make_problem(name)
    rows = [row for row in summary.rows if row["problem"] == name]
    stochastic = problem.stochastic
    hard = f" Hard for gradients: {problem.settings.hard}." if problem.settings.hard else ""
    header = (
        "method", "rank", "arrived", "distance, median", "distance, worst", "steps", "hypervolume", "IGD+",
        "residual", "conflicts", "min cos", "mean cos", "var cos",
    )  # fmt: skip
    return Table(
        f"Problem {name}",
        f"K = {problem.num_objectives}, N = {problem.dim}. {problem.reference}.{hard} Arrived: within "
        f"{problem.settings.tolerance:g} of the front, in units of the objectives' ranges. Steps: median until then. "
        "Hypervolume: share of the front's. Residual: largest min-norm residual at the end, relative."
        + (" Held out: against exact gradients, until it arrives." if stochastic else ""),
        (*header, "held out, conflicts", "held out, min cos") if stochastic else header,
        tuple(_problem_row(row, stochastic) for row in rows),
    )


def _problem_row(row: Row, stochastic: bool) -> tuple[str, ...]:
    name = row["method"] if row["failed"] == 0 else f"{row['method']} ({row['failed']} of {row['runs']} failed)"
    cells = [
        name, _spread(row), percent(row["arrived"]), number(row["distance_median"]), number(row["distance_max"]),
        number(row["steps_to_tolerance"]), percent(row["hypervolume_ratio"], 1), number(row["igd_plus"]),
        number(row["stationarity_max"]), percent(row["conflict_rate"]), number(row["cosine_min"]),
        number(row["cosine_mean"]), number(row["cosine_variance"]),
    ]  # fmt: skip
    if stochastic:
        cells += [percent(row["held_out_conflict_rate"]), number(row["held_out_cosine_min"])]
    return tuple(cells)


def failure_table(summary: Summary) -> Table | None:
    """Runs that failed, with the reason; None where all went well."""
    rows = tuple((r["method"], r["problem"], str(r["seed"]), r["error"]) for r in summary.failures)
    if not rows:
        return None
    return Table("Failed runs", "They rank last.", ("method", "problem", "seed", "why"), rows)


def solver_table(summary: Summary) -> Table:
    """What the solvers of the methods said, summed over all problems."""
    rows = []
    for method in summary.methods:
        good = [record for problem in summary.problems for record in summary.good(problem, method)]
        steps = sum(record["steps"] * record["starts"] for record in good)
        notes: dict[str, int] = {}
        for record in good:
            for note, count in record["notes"].items():
                notes[note] = notes.get(note, 0) + count
        said = "; ".join(f"{note}: {count}" for note, count in sorted(notes.items()))
        rows.append((
            method, str(steps), str(sum(record["unconverged"] for record in good)),
            number(max((record["max_residual"] for record in good), default=None)),
            str(sum(sum(record["left_out"].values()) for record in good)), said or "none",
        ))  # fmt: skip
    return Table(
        "Solvers",
        "Solved: small problems, one per step and starting point. Gave up: not converged, the best point was used. "
        "Left out: gradients that took no part, such as zeros.",
        ("method", "solved", "gave up", "largest residual", "left out", "notes"),
        tuple(rows),
    )


def number(value: float | None) -> str:
    """Three significant digits, or a dash."""
    return "-" if value is None else f"{value:.3g}"


def percent(value: float | None, digits: int = 0) -> str:
    """A share, or a dash."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def _interval(ranking: Ranking, i: int) -> str:
    return f"{ranking.overall[i]:.1f} [{ranking.overall_low[i]:.1f}, {ranking.overall_high[i]:.1f}]"


def _spread(row: Row) -> str:
    return "-" if row["rank"] is None else f"{row['rank']:.1f} [{row['rank_low']:.1f}, {row['rank_high']:.1f}]"


def _average(rows: list[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return float(np.mean(values)) if values else None
