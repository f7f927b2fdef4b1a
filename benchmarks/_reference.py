r"""Independent solutions of the small problems in extended precision, to measure errors against.

Nothing here shares code with mogb. Every problem is solved by its own optimality conditions: a support is proposed by
SciPy's NNLS, the linear system of the support is solved with iterative refinement in 80-bit arithmetic, and the support
is changed, one index at a time, until the conditions of the whole problem hold in 80-bit arithmetic. A point that
satisfies the conditions of a convex problem is its solution, whatever proposed it.

Shapes: K = objectives, N = columns.
"""

import numpy as np
from scipy.linalg import lu_factor, lu_solve
from scipy.optimize import nnls

WIDE = np.longdouble
TOLERANCE = WIDE(1e-16)


def unit_gramian(jacobian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The unit-diagonal Gramian and the norms of the rows, in 80 bits."""
    rows = jacobian.astype(WIDE)
    norms = np.sqrt((rows * rows).sum(axis=1))
    units = rows / norms[:, None]
    return units @ units.T, norms


def mgda(jacobian: np.ndarray) -> np.ndarray:
    """Weights of the shortest vector in the hull of the rows."""
    cosines, norms = unit_gramian(jacobian)
    tilt = norms.min() / norms
    scaled = _complementary(cosines + np.outer(tilt, tilt), -tilt)
    weights = scaled * tilt
    return weights / weights.sum()


def upgrad(jacobian: np.ndarray) -> np.ndarray:
    """Mean of the projections of the single rows on the dual cone."""
    cosines, norms = unit_gramian(jacobian)
    size = len(norms)
    total = np.zeros(size, WIDE)
    for index in range(size):
        start = np.zeros(size, WIDE)
        start[index] = norms[index] / size
        total += start + _complementary(cosines, cosines @ start)
    return total / norms


def dualproj(jacobian: np.ndarray) -> np.ndarray:
    """Projection of the mean row on the dual cone."""
    cosines, norms = unit_gramian(jacobian)
    start = norms / len(norms)
    return (start + _complementary(cosines, cosines @ start)) / norms


def fairgrad(jacobian: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    r"""The fixed point :math:`G w = w^{-1/\alpha}`: the minimum of a convex barrier, by damped Newton steps."""
    cosines, norms = unit_gramian(jacobian)
    power = WIDE(1) / WIDE(alpha)
    pull = norms ** (power - 1)

    def barrier(u: np.ndarray) -> np.longdouble:
        gain = np.log(u) if power == 1 else u ** (1 - power) / (1 - power)
        return u @ cosines @ u / 2 - pull @ gain

    u = (pull / WIDE(len(norms))) ** (1 / (1 + power))
    for _ in range(2000):
        target = pull * u**-power
        slope = cosines @ u - target
        if np.abs(slope / target).max() < 1e-16:
            break
        step = -_solve(cosines + np.diag(power * target / u), slope)
        length = min(WIDE(1), WIDE(0.9) / max(-(step / u).min(), WIDE(1e-9)))
        before = barrier(u)
        while length > 1e-12 and barrier(u + length * step) > before and np.abs(slope / target).max() > 1e-8:
            length /= 2
        u = u + length * step
    if np.abs(slope / target).max() > 1e-9:
        raise ArithmeticError("The reference solver found no fixed point.")
    return u / norms


def nash_mtl(jacobian: np.ndarray) -> np.ndarray:
    """The bargaining solution, without the clip of the direction's norm."""
    return fairgrad(jacobian, 1.0)


def imtl_g(jacobian: np.ndarray) -> np.ndarray:
    """Equal projections on the unit rows, weights that sum to 1."""
    cosines, norms = unit_gramian(jacobian)
    weights = _solve(cosines, np.ones(len(norms), WIDE)) / norms
    return weights / weights.sum()


def config(jacobian: np.ndarray) -> np.ndarray:
    """ConFIG: equal cosines with all rows, the length being the sum of the projections."""
    cosines, norms = unit_gramian(jacobian)
    scaled = _solve(cosines, np.ones(len(norms), WIDE))
    scaled /= np.sqrt(scaled @ cosines @ scaled)
    return scaled * (norms * (cosines @ scaled)).sum() / norms


def cagrad(jacobian: np.ndarray, c: float = 0.5) -> np.ndarray:
    """The paper's direction, without a final rescaling, as weights on the rows.

    For every tau, min over the simplex of the norm of ``g_w + tau g_0`` is the min-norm problem of shifted rows;
    the solution has ``c |g_0| tau = |g_w|``, found by bisection.
    """
    rows = jacobian.astype(WIDE)
    mean = rows.mean(axis=0)
    reach = WIDE(c) * np.sqrt(mean @ mean)
    norms = np.sqrt((rows * rows).sum(axis=1))
    low, high = WIDE(0), norms.max() / reach

    def inner(tau: np.longdouble) -> tuple[np.ndarray, np.longdouble]:
        simplex = mgda(rows + tau * mean)
        combined = simplex @ rows
        return simplex, np.sqrt(combined @ combined)

    for _ in range(75):
        middle = (low + high) / 2
        _, length = inner(middle)
        low, high = (middle, high) if length > reach * middle else (low, middle)
    simplex, length = inner((low + high) / 2)
    return np.full(len(rows), 1 / WIDE(len(rows))) + reach / length * simplex


def _complementary(matrix: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """The z >= 0 with ``matrix z + offset >= 0`` and ``z . (matrix z + offset) = 0``."""
    size = len(offset)
    values, vectors = np.linalg.eigh(matrix.astype(float))
    factor = (vectors * np.sqrt(np.maximum(values, 0))).T
    target = np.linalg.lstsq(factor.T, -offset.astype(float), rcond=None)[0]
    support = nnls(factor, target, maxiter=50 * size)[0] > 0
    scale = np.abs(offset).max()
    if scale == 0:
        return np.zeros(size, WIDE)
    for _ in range(20 * size + 50):
        z = np.zeros(size, WIDE)
        if support.any():
            z[support] = _solve(matrix[np.ix_(support, support)], -offset[support])
        slack = matrix @ z + offset
        slack[support] = 0
        if support.any() and z[support].min() < -TOLERANCE * scale:
            support[np.where(support, z, np.inf).argmin()] = False
        elif slack.min() < -TOLERANCE * scale:
            support[slack.argmin()] = True
        else:
            return np.maximum(z, 0)
    raise ArithmeticError("The reference solver found no support that satisfies the optimality conditions.")


def _solve(matrix: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """A linear solve in float64, refined with 80-bit residuals until it stops improving."""
    factors = lu_factor(matrix.astype(float))
    solution = lu_solve(factors, rhs.astype(float)).astype(WIDE)
    for _ in range(12):
        solution = solution + lu_solve(factors, (rhs - matrix @ solution).astype(float))
    return solution
