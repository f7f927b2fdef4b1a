r"""Convex quadratic problems with non-negative variables, solved to the last digit by searching for their support.

.. math::  \min_{u \ge 0} \; \tfrac12 u^\top M u - t^\top u
           \quad \Longleftrightarrow \quad  u \ge 0, \; M u \ge t, \; u^\top (M u - t) = 0 .

On the right support the solution is that of a linear system, so that nothing is left to converge.

Shapes: K = variables, P = problems with one matrix M in common.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64
from scipy.linalg.lapack import dposv, dpotrf, dpotrs
from scipy.optimize import nnls

from mogb.solvers.scaling import EPS

Move = tuple[np.ndarray, bool]
Slack = tuple[np.ndarray, float]

# Rounds of block pivoting without progress before single variables are exchanged.
PATIENCE = 3
# Steps of :func:`descend`, which is only ever the second choice, that are worth their time.
DESCENT = 200
# Added to the diagonal of a singular system, relative to it, and taken out again by corrections.
RIDGE = 1e-9
CORRECTIONS = 2


def least_squares(
    system: Float64[np.ndarray, "M K"], target: Float64[np.ndarray, " M"], max_steps: int
) -> Float64[np.ndarray, " K"] | None:
    """Non-negative least squares by the method of Lawson and Hanson; None where it gave up."""
    try:
        return nnls(system, target, maxiter=max_steps)[0]
    except (RuntimeError, np.linalg.LinAlgError):  # maxiter was reached, or (in SciPy 1.12 to 1.14) a singular support
        return None


def search_supports(
    point: Float64[np.ndarray, " K"],
    toward: Callable[[np.ndarray, np.ndarray], Move],
    slack: Callable[[np.ndarray], Slack],
    max_steps: int,
) -> tuple[Float64[np.ndarray, " K"], int]:
    """Minimizes a convex function over non-negative variables, as Lawson and Hanson do; also counts the steps.

    Every step goes to the minimum over the variables that are in the support, or as far as they stay non-negative;
    then the variable enters that promises most. The function falls all the way, so that what there is when the steps
    are used up is the best point so far.

    Args:
        point: A feasible start.
        toward: Gives, for a support and the point on it, the move to the minimum over the support, and whether there
            is one. If not, the function falls along the move for ever.
        slack: Gives the partial derivatives that must not be negative, and what rounding may make of them.
        max_steps: Changes of the support.
    """
    support = point > 0
    for step in range(max_steps):
        index = support.nonzero()[0]
        move, bounded = np.zeros_like(point), True
        if index.size:
            move[index], bounded = toward(index, point[index])
        falling = (move < 0) & (point + move <= 0) if bounded else move < 0
        if falling.any():
            blocking = falling.nonzero()[0]
            ratios = point[blocking] / -move[blocking]
            if ratios.min() == 0:  # what has just entered wants to leave: nothing but rounding is left to gain
                return point, step + 1
            point = np.maximum(point + ratios.min() * move, 0.0)
            point[blocking[ratios.argmin()]] = 0.0
            support = point > 0
            continue
        if not bounded:
            return point, step
        point = point + move
        slopes, rounding = slack(point)
        slopes[index] = 0.0
        entering = int(slopes.argmin())
        if slopes[entering] >= -rounding:
            return point, step + 1
        support[entering] = True
    return point, max_steps


def descend(
    matrix: Float64[np.ndarray, "K K"],
    target: Float64[np.ndarray, " K"],
    start: Float64[np.ndarray, " K"],
    max_steps: int,
) -> tuple[Float64[np.ndarray, " K"], int]:
    """The method of Lawson and Hanson on M itself; returns the point and the number of steps.

    Slower than :func:`least_squares`, but it needs no factor of M, so that it also answers to the digits of a matrix
    that rounding has made slightly indefinite.
    """

    def toward(index: np.ndarray, point: np.ndarray) -> Move:
        block = matrix[index[:, None], index]
        _, goal, info = dposv(block, target[index])
        if info == 0:
            return goal - point, True
        direction = np.linalg.eigh(block)[1][:, 0]  # no curvature: a straight way down
        return (-direction if direction @ (block @ point - target[index]) > 0 else direction), False

    def slack(point: np.ndarray) -> Slack:
        return matrix @ point - target, 4 * EPS * (1 + float(point.sum()))

    return search_supports(start, toward, slack, max_steps)


def block_pivoting(
    matrix: Float64[np.ndarray, "K K"], targets: Float64[np.ndarray, "P K"], max_rounds: int
) -> Float64[np.ndarray, "P K"]:
    """Solves many problems at once by exchanging whole blocks of variables. What is not solved is left at zero.

    The supports of all problems change together, one round after another, and each round costs one matrix product
    besides the linear systems. A problem that makes no progress is given up. (Portugal, Judice and Vicente,
    A comparison of block pivoting and interior-point algorithms, 1994; Kim and Park, SISC 2011, algorithm 2.)
    """
    size = matrix.shape[0]
    points = np.zeros_like(targets)
    rows = np.arange(len(targets))  # the problems that are still open
    support = targets > 0
    fewest = np.full(len(targets), size + 1)
    patience = np.full(len(targets), PATIENCE)
    for _ in range(max_rounds):
        trial = np.zeros((len(rows), size))
        regular = np.ones(len(rows), dtype=bool)
        for row, chosen in enumerate(support):
            index = chosen.nonzero()[0]
            if index.size:
                trial[row, index], regular[row] = _solve(matrix[index[:, None], index], targets[rows[row], index])
        tolerance = 16 * EPS * (1 + np.abs(trial).sum(axis=1, keepdims=True))
        wrong = np.where(support, trial, trial @ matrix - targets[rows]) < -tolerance
        count = wrong.sum(axis=1)
        done = regular & (count == 0)
        points[rows[done]] = np.maximum(trial[done], 0.0)
        keep = regular & ~done & (patience[rows] > -PATIENCE)
        if not keep.any():
            break
        rows, support, wrong, count = rows[keep], support[keep], wrong[keep], count[keep]
        progress = count < fewest[rows]
        fewest[rows] = np.where(progress, count, fewest[rows])
        patience[rows] = np.where(progress, PATIENCE, patience[rows] - 1)
        for row in (patience[rows] < 0).nonzero()[0]:  # Murty's rule, which cannot cycle
            wrong[row, : wrong[row].nonzero()[0][-1]] = False
        support = support ^ wrong
    return points


def _solve(
    matrix: Float64[np.ndarray, "A A"], target: Float64[np.ndarray, " A"]
) -> tuple[Float64[np.ndarray, " A"], bool]:
    """The solution; of a singular system the shortest one, by a small ridge that corrections take out again."""
    _, solution, info = dposv(matrix, target)
    if info == 0:
        return solution, True
    triangle, info = dpotrf(matrix + RIDGE * np.eye(len(target)))
    solution = np.zeros_like(target)
    if info == 0:
        for _ in range(1 + CORRECTIONS):
            solution = solution + dpotrs(triangle, target - matrix @ solution)[0]
    return solution, info == 0
