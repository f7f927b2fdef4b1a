"""Jacobians [K, N] in float64 on which solvers go wrong, by family, and checks in exact or extended arithmetic."""

import itertools
from fractions import Fraction

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

SIZES = (2, 3, 5, 16)


def _in_conflict(rows, share):
    return rows - share * rows.mean(axis=0)


def _spread(rows, decades, rng):
    return rows * 10 ** rng.uniform(-decades / 2, decades / 2, (len(rows), 1))


def _opposite_pairs(rows, rng):
    rows = rows.copy()
    for i in range(0, len(rows) - 1, 2):
        rows[i + 1] = -rows[i] + 0.1 * rng.normal(size=rows.shape[1])
    return rows


FAMILIES = {
    "independent": lambda rows, rng: rows,
    "correlated": lambda rows, rng: rows + 3 * rng.normal(size=(1, rows.shape[1])),
    "conflict .5": lambda rows, rng: _in_conflict(rows, 0.5),
    "conflict .9": lambda rows, rng: _in_conflict(rows, 0.9),
    "conflict .999": lambda rows, rng: _in_conflict(rows, 0.999),
    "conflicting pairs": _opposite_pairs,
    "norms over 3 decades": lambda rows, rng: _spread(rows, 3, rng),
    "norms over 6 decades": lambda rows, rng: _spread(rows, 6, rng),
    "conflict, norms over 6 decades": lambda rows, rng: _spread(_in_conflict(rows, 0.9), 6, rng),
    "conflicting pairs, norms over 6 decades": lambda rows, rng: _spread(_opposite_pairs(rows, rng), 6, rng),
    "duplicates": lambda rows, rng: np.concatenate([rows[: len(rows) // 2]] * 3)[: len(rows)],
    "one opposite pair": lambda rows, rng: np.concatenate([rows[:-1], -2 * rows[:1]]),
    "rank one": lambda rows, rng: rng.normal(size=(len(rows), 1)) * rows[:1],
    "parallel": lambda rows, rng: rng.uniform(0.1, 5, size=(len(rows), 1)) * rows[:1],
    "more rows than columns": lambda rows, rng: rows[:, : max(len(rows) // 3, 1)],
    "more rows than columns, one side": lambda rows, rng: np.abs(rows[:, : max(len(rows) // 3, 1)]) + 0.1,
}


def jacobian(family, size, seed=0):
    rng = np.random.default_rng([seed, size, sorted(FAMILIES).index(family)])
    return FAMILIES[family](rng.normal(size=(size, 3 * size + 4)), rng)


def gramian(rows):
    return rows @ rows.T


def norms(rows):
    return np.sqrt((rows * rows).sum(axis=1))


def extended(rows, weights):
    """The direction J^T w and its inner products with the rows, in extended precision."""
    rows = rows.astype(np.longdouble)
    direction = rows.T @ weights.astype(np.longdouble)
    return direction, rows @ direction


def supports(size):
    return [list(s) for n in range(1, size + 1) for s in itertools.combinations(range(size), n)]


def exactly(values):
    """A float array as nested lists of fractions."""
    return [exactly(value) for value in values] if np.ndim(values) else Fraction(float(values))


# Whole numbers: Gramians of such rows are exact, and full of ties, zeros, duplicates and opposites.
whole_jacobians = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.integers(-3, 3).map(float)
)
# Exponents of two, so that scaling rows by them is exact, too.
exponents = st.lists(st.integers(-10, 10), min_size=6, max_size=6)
