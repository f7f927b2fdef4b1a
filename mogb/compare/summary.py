"""Records -> one table: how every method did on every problem, over all seeds and starting points.

Wall times stay in the records, so that the same runs give the same summary to the byte, whatever they ran on.
"""

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float64

from mogb.compare.ranking import Ranking, rank
from mogb.compare.store import Record
from mogb.problems import make_problem

Row = dict[str, Any]

COLUMNS = (
    "problem", "method", "runs", "failed", "arrived", "distance_median", "distance_mean", "distance_max",
    "steps_to_tolerance", "stationarity_max", "hypervolume_ratio", "igd_plus",
    "conflict_rate", "cosine_min", "cosine_mean", "cosine_variance", "cosine_worst",
    "held_out_conflict_rate", "held_out_cosine_min", "held_out_cosine_mean", "held_out_cosine_variance",
    "rank", "rank_low", "rank_high", "coverage_rank", "coverage_rank_low", "coverage_rank_high",
    "unconverged", "max_residual", "left_out", "error",
)  # fmt: skip
HARMONY = ("conflict_rate", "cosine_min", "cosine_mean", "cosine_variance")
DIGITS = 6  # scores that agree to this many digits are equal


@dataclass(frozen=True)
class Summary:
    """A finished (or interrupted) comparison.

    Attributes:
        settings: As recorded in ``settings.json``.
        records: By key.
    """

    settings: Mapping[str, Any]
    records: Mapping[str, Record]

    @property
    def methods(self) -> list[str]:
        """In the order in which they were asked for."""
        return list(self.settings["methods"])

    @property
    def problems(self) -> list[str]:
        """In the order in which they were asked for."""
        return list(self.settings["problems"])

    @property
    def seeds(self) -> range:
        """0 stands for the published starting points, the others for random ones."""
        return range(self.settings["seeds"])

    @property
    def missing(self) -> list[str]:
        """Keys of the runs that were planned but have no record."""
        planned = (f"{p}/{s}/{m}" for p in self.problems for s in self.seeds for m in self.methods)
        return [key for key in planned if key not in self.records]

    @property
    def failures(self) -> list[Record]:
        """Records of failed runs, in the order of the plan."""
        return [r for p in self.problems for m in self.methods for r in self.of(p, m) if r["status"] != "ok"]

    def of(self, problem: str, method: str) -> list[Record]:
        """The records of a method on a problem, seed by seed."""
        found = (self.records.get(f"{problem}/{seed}/{method}") for seed in self.seeds)
        return [record for record in found if record is not None]

    def good(self, problem: str, method: str) -> list[Record]:
        """Those that did not fail."""
        return [record for record in self.of(problem, method) if record["status"] == "ok"]

    @cached_property
    def distance_ranking(self) -> Ranking | None:
        """By the distance to the front, one unit per starting point; arriving counts, how closely does not."""
        return rank(self.methods, self._scores(_distances))

    @cached_property
    def coverage_ranking(self) -> Ranking | None:
        """By the IGD+ of the points reached from all starts together, one unit per seed."""
        return rank(self.methods, self._scores(_coverage))

    @cached_property
    def rows(self) -> list[Row]:
        """A row per problem and method, with the keys :data:`COLUMNS`."""
        return [self._row(problem, method) for problem in self.problems for method in self.methods]

    def _scores(self, score: Callable[[Record, float, int], list[float]]) -> dict[str, Float64[np.ndarray, "M _"]]:
        """Per problem ``[M, U]``, over the seeds that every method has finished."""
        scores = {}
        for problem in self.problems:
            seeds = [seed for seed in self.seeds if all(f"{problem}/{seed}/{m}" in self.records for m in self.methods)]
            tolerance = make_problem(problem).settings.tolerance
            table = []
            for method in self.methods:
                records = [self.records[f"{problem}/{seed}/{method}"] for seed in seeds]
                table.append([value for record in records for value in score(record, tolerance, record["starts"])])
            if seeds and np.isfinite(table).any():
                scores[problem] = np.array(table)
        return scores

    def _row(self, problem: str, method: str) -> Row:
        records, good = self.of(problem, method), self.good(problem, method)
        tolerance = make_problem(problem).settings.tolerance
        row: Row = dict.fromkeys(COLUMNS)
        row |= {"problem": problem, "method": method, "runs": len(records), "failed": len(records) - len(good)}
        for name, ranking in (("rank", self.distance_ranking), ("coverage_rank", self.coverage_ranking)):
            row |= _ranks(name, ranking, problem, method)
        if errors := sorted({record["error"] for record in records if record["error"]}):
            row["error"] = " | ".join(errors)
        if not good:
            return row
        distances = _flat(good, "distance")
        return row | {
            "arrived": _mean([float(value <= tolerance) for value in distances]),
            "distance_median": float(np.median(distances)) if distances else None,
            "distance_mean": _mean(distances), "distance_max": max(distances, default=None),
            "steps_to_tolerance": _median(_flat(good, "steps_to_tolerance")),
            "stationarity_max": max(_flat(good, "stationarity"), default=None),
            "hypervolume_ratio": _mean(_single(good, "hypervolume_ratio")),
            "igd_plus": _mean(_single(good, "igd_plus")),
            **{name: _mean(_flat(good, name)) for name in HARMONY},
            "cosine_worst": min(_flat(good, "cosine_worst"), default=None),
            **{f"held_out_{name}": _mean(_flat(good, f"held_out_{name}")) for name in HARMONY},
            "unconverged": sum(record["unconverged"] for record in good),
            "max_residual": max(record["max_residual"] for record in good),
            "left_out": sum(sum(record["left_out"].values()) for record in good),
        }  # fmt: skip


def to_csv(summary: Summary) -> str:
    """``summary.csv``: a line per problem and method."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([[_cell(row[name]) for name in COLUMNS] for row in summary.rows])
    return buffer.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _distances(record: Record, tolerance: float, starts: int) -> list[float]:
    if record["status"] != "ok" or record["distance"] is None:
        return [math.inf] * starts
    return [_rounded(max(value, tolerance)) for value in record["distance"]]


def _coverage(record: Record, tolerance: float, starts: int) -> list[float]:
    value = record["igd_plus"] if record["status"] == "ok" else None
    return [math.inf if value is None else _rounded(value)]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _ranks(name: str, ranking: Ranking | None, problem: str, method: str) -> Row:
    if ranking is None or problem not in ranking.problems:
        return {}
    at = ranking.methods.index(method), ranking.problems.index(problem)
    return {
        name: float(ranking.ranks[at]), f"{name}_low": float(ranking.low[at]), f"{name}_high": float(ranking.high[at]),
    }  # fmt: skip


def _flat(records: Iterable[Record], name: str) -> list[float]:
    return [float(value) for record in records for value in record.get(name) or () if value is not None]


def _single(records: Iterable[Record], name: str) -> list[float]:
    return [record[name] for record in records if record[name] is not None]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if len(values) else None
