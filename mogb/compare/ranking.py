r"""Ranks of methods, with intervals that say how much they owe to chance.

Methods meet on *units*: the same starting point with the same seed, or the same seed. On each unit they are ranked by
a score (lower is better; equal scores share the mean of their ranks; a failed run comes last). Ranks are averaged over
the units of a problem, then over problems. Intervals are percentile bootstraps, over units for one problem, over
problems and then units for all of them.

Shapes: M = methods, U = units, P = problems.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.stats import rankdata

from mogb.compare.plan import derived_seed

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Ranking:
    """Ranks of M methods on P problems.

    Attributes:
        methods: In the order of the first axis.
        problems: In the order of the second axis.
        ranks: Mean rank ``[M, P]``; 1 is best.
        low: Lower ends of the intervals of ``ranks``.
        high: Upper ends.
        overall: Mean over problems ``[M]``.
        overall_low: Lower ends of the intervals of ``overall``.
        overall_high: Upper ends.
        wins: ``[M, M]``: how often the row's method beats the column's, ties counted half, averaged over problems.
        units: Number of units of each problem.
    """

    methods: tuple[str, ...]
    problems: tuple[str, ...]
    ranks: Float64[np.ndarray, "M P"]
    low: Float64[np.ndarray, "M P"]
    high: Float64[np.ndarray, "M P"]
    overall: Float64[np.ndarray, " M"]
    overall_low: Float64[np.ndarray, " M"]
    overall_high: Float64[np.ndarray, " M"]
    wins: Float64[np.ndarray, "M M"]
    units: tuple[int, ...]

    @property
    def order(self) -> list[int]:
        """Positions of the methods from best to worst; equal ones by name."""
        return sorted(range(len(self.methods)), key=lambda i: (round(float(self.overall[i]), 9), self.methods[i]))


def rank(methods: Sequence[str], scores: Mapping[str, Float64[np.ndarray, "M _"]]) -> Ranking | None:
    """Ranks from scores ``[M, U]`` per problem; infinite where a run failed. None where there is nothing to rank."""
    problems = tuple(scores)
    if not problems:
        return None
    ranks = {problem: rankdata(scores[problem], axis=0) for problem in problems}
    means = np.stack([ranks[problem].mean(1) for problem in problems], axis=1)
    intervals = np.stack([_interval(ranks[problem], problem) for problem in problems], axis=2)
    overall = _overall_interval([ranks[problem] for problem in problems])
    return Ranking(
        tuple(methods), problems, means, intervals[0], intervals[1], means.mean(1), overall[0], overall[1],
        np.mean([_wins(scores[problem]) for problem in problems], axis=0),
        tuple(scores[problem].shape[1] for problem in problems),
    )  # fmt: skip


def _interval(ranks: Float64[np.ndarray, "M U"], label: str) -> Float64[np.ndarray, "2 M"]:
    draws = np.random.default_rng(derived_seed("bootstrap", label)).integers(
        ranks.shape[1], size=(RESAMPLES, ranks.shape[1])
    )
    return _percentiles(ranks[:, draws].mean(2))


def _overall_interval(ranks: Sequence[Float64[np.ndarray, "M _"]]) -> Float64[np.ndarray, "2 M"]:
    generator = np.random.default_rng(derived_seed("bootstrap", "overall"))
    means = np.empty((len(ranks[0]), RESAMPLES))
    for draw in range(RESAMPLES):
        chosen = [ranks[i] for i in generator.integers(len(ranks), size=len(ranks))]
        means[:, draw] = np.mean(
            [table[:, generator.integers(table.shape[1], size=table.shape[1])].mean(1) for table in chosen], axis=0
        )
    return _percentiles(means)


def _percentiles(samples: Float64[np.ndarray, "M R"]) -> Float64[np.ndarray, "2 M"]:
    return np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)


def _wins(scores: Float64[np.ndarray, "M U"]) -> Float64[np.ndarray, "M M"]:
    better = (scores[:, None] < scores[None]).mean(2)
    return better + 0.5 * (scores[:, None] == scores[None]).mean(2)
