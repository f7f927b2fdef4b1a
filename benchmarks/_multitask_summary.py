r"""Records of the multi-task benchmark -> figures with intervals, and what may be said about them.

.. math::  \Delta m = \frac{100}{K} \sum_k \frac{s_k (M_k - B_k)}{B_k}

M are the metrics of a run, B those of runs on each task alone with the same seed, and s is 1 where higher is better and
-1 elsewhere: positive means better than training the tasks apart. (The code of Nash-MTL reports the opposite sign.)

Intervals are 95 % t-intervals over seeds. Methods are compared with the weighted sum seed by seed, by paired t-tests
whose p-values are corrected for the number of methods (Holm).

Shapes: M = methods, S = seeds, K = tasks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from _multitask_runs import ALONE
from scipy import stats

from mogb.compare.ranking import Ranking, rank

LEVEL = 0.95
BASELINE = "weighted_sum"


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half the width of its interval; NaN where there is one seed."""

    mean: float
    half: float

    def text(self, digits: int = 1, sign: bool = False) -> str:
        """Such as ``12.3 ± 0.4``."""
        half = "" if np.isnan(self.half) else f" ± {self.half:.{digits}f}"
        return f"{self.mean:{'+' if sign else ''}.{digits}f}{half}"


@dataclass(frozen=True, eq=False)
class Row:
    """A method on a problem.

    Attributes:
        method: Its specification.
        metrics: Of every task.
        delta: Its mean, over seeds; None if a run failed.
        deltas: Of every seed.
        worst: The task that lost most against training it alone, and its mean change in percent.
        gain: Over the weighted sum, paired by seed; None for itself and where one of them failed.
        p: Of that gain, Holm-corrected; NaN where there is none.
        failure: Why a run failed, and how many did; empty if none.
        passes: Backward passes a step.
        seconds: Of CPU, a run.
        uphill: Share of the steps whose direction points uphill for a task; None where no Gramian was formed.
    """

    method: str
    metrics: dict[str, Interval]
    delta: Interval | None
    deltas: tuple[float, ...]
    worst: tuple[str, float] | None
    gain: Interval | None
    p: float
    failure: str
    passes: float
    seconds: float
    uphill: float | None

    @property
    def verdict(self) -> str:
        """Whether it can be told from the weighted sum."""
        if self.failure:
            return "failed"
        if self.gain is None or not self.p < 1 - LEVEL:
            return "" if self.method == BASELINE else "cannot be told apart"
        return "better" if self.gain.mean > 0 else "worse"


def interval(values: Sequence[float]) -> Interval:
    """The mean and half the width of its 95 % t-interval."""
    count = len(values)
    if count < 2:
        return Interval(float(np.mean(values)), float("nan"))
    factor = stats.t.ppf((1 + LEVEL) / 2, count - 1) / np.sqrt(count)
    return Interval(float(np.mean(values)), float(factor * np.std(values, ddof=1)))


def changes(metrics: Mapping[str, float], alone: Mapping[str, float], higher: Mapping[str, bool]) -> dict[str, float]:
    """Of every task against training it alone, in percent; positive is better."""
    return {
        task: (1 if higher[task] else -1) * 100 * (value - alone[task]) / abs(alone[task])
        for task, value in metrics.items()
    }


def holm(values: Sequence[float]) -> list[float]:
    """P-values corrected for their number; NaN stays out."""
    array = np.asarray(values, dtype=float)
    order = [int(i) for i in np.argsort(array) if not np.isnan(array[i])]
    corrected, largest = np.full(len(array), np.nan), 0.0
    for position, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - position) * array[index]))
        corrected[index] = largest
    return corrected.tolist()


def summarize(records: Sequence[Mapping[str, Any]], higher: Mapping[str, bool]) -> list[Row]:
    """The rows of one problem, best first, failed ones last."""
    alone: dict[int, dict[str, float]] = {}
    by_method: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in records:
        if record["method"].startswith(ALONE):
            alone.setdefault(record["seed"], {}).update(record["metrics"])
        else:
            by_method.setdefault(record["method"], {})[record["seed"]] = record
    seeds = sorted({seed for runs in by_method.values() for seed in runs})
    for seed in seeds:
        if set(alone.get(seed, ())) != set(higher):
            raise ValueError(f"seed {seed} lacks runs on single tasks: has {sorted(alone.get(seed, ()))}.")
    gained = {
        method: {
            seed: changes(record["metrics"], alone[seed], higher)
            for seed, record in runs.items()
            if record["status"] == "ok"
        }
        for method, runs in by_method.items()
    }
    deltas = {m: {s: float(np.mean(list(c.values()))) for s, c in found.items()} for m, found in gained.items()}
    whole = {method: found for method, found in deltas.items() if len(found) == len(by_method[method])}
    base = whole.get(BASELINE, {})
    pairs = {
        method: [found[seed] - base[seed] for seed in found if seed in base]
        for method, found in whole.items()
        if method != BASELINE and base
    }
    tested = [method for method, found in pairs.items() if len(found) > 1]
    p_values = dict(zip(tested, holm([_p_value(pairs[method]) for method in tested]), strict=True))
    rows = [
        _row(method, runs, gained[method], whole.get(method), pairs.get(method), p_values.get(method, float("nan")))
        for method, runs in by_method.items()
    ]
    return sorted(rows, key=lambda row: (row.delta is None, -row.delta.mean if row.delta else 0.0, row.method))


def ranking(rows: Mapping[str, Sequence[Row]]) -> Ranking | None:
    """Ranks by Δm: on every problem over the seeds, then over the problems; a method that failed is last."""
    methods = sorted({row.method for found in rows.values() for row in found})
    scores = {}
    for problem, found in rows.items():
        mine = {row.method: row for row in found}
        count = max((len(row.deltas) for row in found if row.delta is not None), default=0)
        missing = (float("-inf"),) * count
        kept = [m for m in methods if m in mine]
        if count and kept == methods:
            table = [mine[m].deltas if mine[m].delta is not None else missing for m in methods]
            scores[problem] = -np.array(table, dtype=float)
    return rank(methods, scores)


def _p_value(differences: Sequence[float]) -> float:
    array = np.asarray(differences, dtype=float)
    spread = array.std(ddof=1)
    if spread == 0:
        return 1.0 if array.mean() == 0 else 0.0
    statistic = array.mean() / (spread / np.sqrt(len(array)))
    return float(2 * stats.t.sf(abs(statistic), len(array) - 1))


def _row(
    method: str,
    runs: Mapping[int, Mapping[str, Any]],
    gained: Mapping[int, Mapping[str, float]],
    deltas: Mapping[int, float] | None,
    gains: Sequence[float] | None,
    p: float,
) -> Row:
    good = [record for record in runs.values() if record["status"] == "ok"]
    bad = [record for record in runs.values() if record["status"] != "ok"]
    tasks = list(good[0]["metrics"]) if good else []
    means = {task: float(np.mean([found[task] for found in gained.values()])) for task in tasks}
    worst = min(means, key=lambda task: means[task]) if means else None
    uphill = [record["uphill"] for record in good if record["uphill"] is not None]
    return Row(
        method=method,
        metrics={task: interval([record["metrics"][task] for record in good]) for task in tasks},
        delta=None if deltas is None else interval(list(deltas.values())),
        deltas=() if deltas is None else tuple(deltas[seed] for seed in sorted(deltas)),
        worst=None if worst is None else (worst, means[worst]),
        gain=interval(gains) if gains else None,
        p=p,
        failure=f"{len(bad)} of {len(runs)} runs: {bad[0]['reason']}" if bad else "",
        passes=float(np.mean([record["passes"] for record in good])) if good else float("nan"),
        seconds=float(np.mean([record["seconds"] for record in runs.values()])),
        uphill=float(np.mean(uphill)) if uphill else None,
    )
