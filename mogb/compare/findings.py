"""Sentences that are computed from the numbers: what a reader should not have to look for."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mogb.compare.ranking import Ranking
from mogb.compare.summary import Summary
from mogb.compare.tables import percent
from mogb.metrics.invariance import end_point_shift
from mogb.problems import make_problem

SAME_PLACE = 0.05  # of the extent of the Pareto set: end points closer than this are the same
STANDS_STILL = 1e-6  # relative min-norm residual of a point that no method can leave
UPHILL = -0.01  # mean cosine
MANY = 5  # more names than this are counted instead
SOMETIMES = 0.01  # share of steps


def findings(summary: Summary) -> list[str]:
    """The findings of a comparison, most general first."""
    found: list[str] = []
    for part in (_ranks, _scaling, _stuck, _standing_still, _uphill, _conflicts, _solvers, _failures, _missing):
        found += part(summary)
    return found


def scaled_pairs(summary: Summary) -> Iterator[tuple[str, str]]:
    """Problems of the summary that are there twice, plain and with one loss rescaled."""
    for name in summary.problems:
        if f"{name}_scaled" in summary.problems:
            yield name, f"{name}_scaled"


def shifts(summary: Summary, plain: str, scaled: str, method: str) -> list[float] | None:
    """How far rescaling one loss moves each end point, in extents of the Pareto set; None where a run is missing.

    The published starting points alone are compared: the random ones are drawn for each problem.
    """
    records = [summary.records.get(f"{name}/0/{method}") for name in (plain, scaled)]
    if any(record is None or record.get("ends") is None for record in records):
        return None
    first, second = (np.array(record["ends"]) for record in records if record is not None)
    points = make_problem(plain).pareto_set(101)
    extent = 1.0 if points is None else float((points.amax(0) - points.amin(0)).norm()) or 1.0
    return end_point_shift(first, second, extent=extent).each.tolist()


def _ranks(summary: Summary) -> list[str]:
    found = []
    for ranking, what in (
        (summary.distance_ranking, "distance to the front"),
        (summary.coverage_ranking, "coverage of the front (IGD+ of the points reached)"),
    ):
        if ranking is not None and len(ranking.methods) > 1:
            found.append(_rank_sentence(ranking, what))
    return found


def _rank_sentence(ranking: Ranking, what: str) -> str:
    first, last = ranking.order[0], ranking.order[-1]
    level = [ranking.methods[i] for i in ranking.order[1:] if ranking.overall_low[i] <= ranking.overall_high[first]]
    others = f"{len(level)} of the others" if len(level) > MANY else _names(level) if level else ""
    rest = f"{others} cannot be told from it: their intervals overlap" if level else "its interval is its own"
    count = len(ranking.problems)
    return (
        f"By {what}, {ranking.methods[first]} has the best mean rank, {ranking.overall[first]:.1f} of "
        f"{len(ranking.methods)} over {count} problem{'s' * (count > 1)}; {rest}. "
        f"{ranking.methods[last]} has the worst, {ranking.overall[last]:.1f}."
    )


def _scaling(summary: Summary) -> list[str]:
    found = []
    for plain, scaled in scaled_pairs(summary):
        moved = {method: shifts(summary, plain, scaled, method) for method in summary.methods}
        median = {method: float(np.median(values)) for method, values in moved.items() if values is not None}
        same = [method for method in median if max(moved[method] or [0.0]) <= SAME_PLACE]
        nearly = [method for method in median if method not in same and median[method] <= SAME_PLACE]
        drift = sorted((method for method in median if median[method] > SAME_PLACE), key=lambda m: -median[m])
        text = f"Rescaling one loss ({plain} against {scaled}): "
        if same:
            text += f"{_names(same)} end{'s' * (len(same) == 1)} at the same points from every start; "
        if nearly:
            text += f"{_names(nearly)} from most starts; "
        if drift:
            text += f"{_names([f'{m} ({percent(median[m])})' for m in drift])} drift (median shift of the end points, "
            text += "in lengths of the Pareto set); "
        if median:
            found.append(text[:-2] + ".")
    return found


def _stuck(summary: Summary) -> list[str]:
    easy = _easy(summary)
    counts = {}
    for method in summary.methods:
        good = [(name, record) for name in easy for record in summary.good(name, method)]
        away = [
            value > make_problem(name).settings.tolerance for name, record in good for value in record["distance"] or ()
        ]
        if away:
            counts[method] = (sum(away), len(away))
    if len(counts) < 2:
        return []
    order = sorted(counts, key=lambda method: counts[method][0] / counts[method][1])
    best, worst = order[0], order[-1]
    text = (
        f"Off the front at the end, from all starts of the {len(easy)} problems that are not hard for gradients: "
        f"{best} least often ({counts[best][0]} of {counts[best][1]} starts), "
        f"{worst} most often ({counts[worst][0]} of {counts[worst][1]})."
    )
    return [text, *_stuck_in_valley(summary)]


def _stuck_in_valley(summary: Summary) -> list[str]:
    found = []
    for name in ("valley", "valley_scaled"):
        if name not in summary.problems:
            continue
        tolerance = make_problem(name).settings.tolerance
        away, free = [], []
        for method in summary.methods:
            record = summary.records.get(f"{name}/0/{method}")
            if record is None or record["status"] != "ok":
                continue
            count = sum(value > tolerance for value in record["distance"])
            if count:
                away.append(f"{method} ({count})")
            else:
                free.append(method)
        if away:
            text = f"On {name}, from its {len(make_problem(name).starts())} published starts, these are still off the "
            text += f"front at the end (number of starts): {_names(away)}."
            found.append(text + (f" {_names(free)} always arrive{'s' * (len(free) == 1)}." if free else ""))
    return found


def _standing_still(summary: Summary) -> list[str]:
    """Points off the front where the gradients cancel: descent for all is over, although something better exists."""
    places: dict[str, list[str]] = {}
    for name in _easy(summary):
        tolerance = make_problem(name).settings.tolerance
        for method in summary.methods:
            good = summary.good(name, method)
            pairs = [p for r in good for p in zip(r["distance"] or (), r["stationarity"], strict=False)]
            count = sum(away > tolerance and residual <= STANDS_STILL for away, residual in pairs)
            if count:
                places.setdefault(name, []).append(f"{method} ({count} of {len(pairs)})")
    return [
        f"On {name}, these stand still off the front, at Pareto stationary points where nothing improves all "
        f"objectives: {_names(methods)}."
        for name, methods in places.items()
    ]


def _uphill(summary: Summary) -> list[str]:
    found = []
    for name in summary.problems:
        rows = [row for row in summary.rows if row["problem"] == name and (row["cosine_mean"] or 0.0) < UPHILL]
        if rows:
            methods = [f"{row['method']} ({row['cosine_mean']:+.2f})" for row in rows]
            found.append(f"On {name}, the directions of {_names(methods)} point uphill on average (mean cosine).")
    return found


def _conflicts(summary: Summary) -> list[str]:
    found = []
    for name in [name for name in summary.problems if make_problem(name).stochastic]:
        rows = {
            row["method"]: row for row in summary.rows if row["problem"] == name and row["conflict_rate"] is not None
        }
        if not rows:
            continue
        never = [method for method, row in rows.items() if row["conflict_rate"] <= 0]
        often = _sorted(rows, lambda row: -row["conflict_rate"], lambda row: row["conflict_rate"] > SOMETIMES)
        text = f"On {name}, within a mini-batch: "
        if often:
            text += "directions conflict with some objective's own gradient for "
            text += _names([f"{method} ({percent(rows[method]['conflict_rate'])} of the steps)" for method in often])
        if never:
            text += f"{'; ' * bool(often)}never for {_names(never)}"
        found.append(text + ".")
        held = {method: row for method, row in rows.items() if row["held_out_conflict_rate"] is not None}
        if len(held) > 1:
            order = _sorted(held, lambda row: row["held_out_conflict_rate"])
            first, last = order[0], order[-1]
            found.append(
                f"Against the exact gradients, which no method sees, and until it arrives, {first} conflicts least on "
                f"{name} ({percent(held[first]['held_out_conflict_rate'])} of the steps, mean of the smallest cosine "
                f"{held[first]['held_out_cosine_min']:+.2f}), {last} most "
                f"({percent(held[last]['held_out_conflict_rate'])}, {held[last]['held_out_cosine_min']:+.2f})."
            )
    return found


def _solvers(summary: Summary) -> list[str]:
    gave_up = {
        method: sum(r["unconverged"] for name in summary.problems for r in summary.good(name, method))
        for method in summary.methods
    }
    failing = [f"{method} ({count})" for method, count in gave_up.items() if count]
    if failing:
        return [f"Steps at which a solver gave up and its best point was used: {_names(failing)}."]
    return ["No solver gave up on any step."]


def _failures(summary: Summary) -> list[str]:
    places: dict[str, set[str]] = {}
    for record in summary.failures:
        places.setdefault(record["method"], set()).add(record["problem"])
    failed = [f"{method} on {_names(sorted(names))}" for method, names in places.items()]
    return [f"Failed runs: {'; '.join(failed)}. The table of failed runs says why."] if failed else []


def _missing(summary: Summary) -> list[str]:
    count = len(summary.missing)
    return [f"Not finished: {count} of the planned runs have no result yet."] if count else []


def _easy(summary: Summary) -> list[str]:
    return [name for name in summary.problems if not make_problem(name).settings.hard]


def _sorted(rows: dict[str, dict], key: Callable, keep: Callable = lambda row: True) -> list[str]:
    return sorted((method for method in rows if keep(rows[method])), key=lambda method: (key(rows[method]), method))


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
