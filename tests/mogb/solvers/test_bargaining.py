"""The bargaining fixed point, against closed forms, its uniqueness and high-precision arithmetic."""

import mpmath
import numpy as np
import pytest
from gramians import FAMILIES, SIZES, extended, gramian, jacobian, norms, whole_jacobians
from hypothesis import given, settings
from hypothesis import strategies as st

from mogb.solvers.bargaining import bargain
from mogb.solvers.min_norm import solve_min_norm

ALPHAS = (0.1, 0.5, 1.0, 2.0, 20.0)
STATIONARY = ("rank one", "one opposite pair", "more rows than columns")
EXISTING = [family for family in FAMILIES if family not in STATIONARY]


def residual_of(rows, weights, alpha):
    _, products = extended(rows, weights)
    return float(np.abs(products * weights.astype(np.longdouble) ** (1 / alpha) - 1).max())


def distance_from_zero(rows):
    """Of the hull of the unit gradients."""
    units = rows / norms(rows)[:, None]
    return np.sqrt(solve_min_norm(gramian(units)).squared_norm)


def precise(matrix, alpha, start):
    """The fixed point with 60 digits, by Newton's method on G w = w^(-1/alpha) from a point close to it."""
    with mpmath.workdps(60):
        size, beta = len(matrix), 1 / mpmath.mpf(alpha)
        exact = mpmath.matrix(matrix.tolist())
        w = mpmath.matrix(start.tolist())
        for _ in range(20):
            value = exact * w - w.apply(lambda x: x**-beta)
            jacobian = exact + mpmath.diag([beta * x ** (-beta - 1) for x in w])
            w -= mpmath.lu_solve(jacobian, value)
        assert mpmath.norm(exact * w - w.apply(lambda x: x**-beta)) < mpmath.mpf(10) ** -30
        return np.array([float(w[i]) for i in range(size)])


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("length", [1e-30, 1e-3, 1.0, 1e30])
def test_one_gradient_has_a_closed_form(alpha, length):
    # s^2 w = w^(-1/alpha).
    found = bargain(np.array([[length**2]]), alpha)
    np.testing.assert_allclose(found.weights, [length ** (-2 * alpha / (1 + alpha))], rtol=1e-12)
    assert found.converged


@pytest.mark.parametrize("alpha", ALPHAS)
def test_orthogonal_gradients_have_the_same_closed_form(alpha):
    lengths = np.array([1e-2, 1.0, 50.0])
    np.testing.assert_allclose(bargain(np.diag(lengths**2), alpha).weights, lengths ** (-2 * alpha / (1 + alpha)))


def test_two_gradients_are_improved_along_the_bisector():
    # For alpha = 1 and K = 2, d is parallel to a / |a| + b / |b|, and |d|^2 = K always.
    rows = np.array([[3.0, 1.0], [-1.0, 5.0]])
    direction = bargain(gramian(rows)).weights @ rows
    bisector = (rows / norms(rows)[:, None]).sum(axis=0)
    np.testing.assert_allclose(direction / np.linalg.norm(direction), bisector / np.linalg.norm(bisector))
    assert direction @ direction == pytest.approx(2)


@pytest.mark.parametrize("size", [*SIZES, 40])
@pytest.mark.parametrize("family", EXISTING)
def test_nash_bargains_hold_on_every_family(family, size):
    for seed in range(2):
        rows = jacobian(family, size, seed)
        found = bargain(gramian(rows))
        assert not found.stationary
        assert found.converged
        assert found.weights.min() > 0
        limit = 1e-11 if distance_from_zero(rows) > 1e-2 else 1e-6  # the products cancel close to stationarity
        assert residual_of(rows, found.weights, 1.0) <= limit
        assert found.residual <= limit
        direction, _ = extended(rows, found.weights)
        assert float(direction @ direction) == pytest.approx(size, rel=10 * limit)  # w . G w = w . (1 / w)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("size", [2, 5, 16])
@pytest.mark.parametrize("family", EXISTING)
def test_every_exponent_converges_on_every_family(family, size, alpha):
    rows = jacobian(family, size)
    found = bargain(gramian(rows), alpha)
    assert found.converged
    assert found.weights.min() > 0
    if alpha >= 1 and distance_from_zero(rows) > 1e-2:
        assert residual_of(rows, found.weights, alpha) <= 1e-7


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    "family", ["independent", "conflict .9", "conflicting pairs", "norms over 3 decades", "norms over 6 decades"]
)
def test_the_weights_are_those_of_high_precision_arithmetic(family, alpha):
    # Also where the residual in float64 is all cancellation: small alpha, large spread.
    matrix = gramian(jacobian(family, 4, seed=1))
    found = bargain(matrix, alpha)
    np.testing.assert_allclose(found.weights, precise(matrix, alpha, found.weights), rtol=1e-10)


@settings(max_examples=40, deadline=None)
@given(whole_jacobians.filter(lambda rows: norms(rows).all()), st.sampled_from([0.5, 1.0, 3.0]))
def test_either_the_bargain_holds_or_zero_is_in_the_hull(rows, alpha):
    found = bargain(gramian(rows), alpha)
    assert found.converged
    if found.stationary:
        assert (found.weights == 0).all()
        assert distance_from_zero(rows) <= 1e-7
    else:
        assert residual_of(rows, found.weights, alpha) <= 1e-9  # all slopes are positive: zero is not in the hull


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize(
    "rows",
    [
        [[1.0, 1.0], [-1.0, -1.0]],
        [[1.0, 2.0], [-3.0, -6.0]],
        [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]],
        [[1.0, 0.0], [-0.5, 0.7], [-0.5, -0.9]],
        [[1e-3, 0.0], [-5e2, 7e2], [-5e2, -9e2]],
    ],
)
def test_where_zero_is_in_the_hull_there_is_no_bargain(rows, scale, alpha):
    found = bargain(scale**2 * gramian(np.array(rows)), alpha)
    assert found.stationary
    assert found.converged
    assert found.residual == 0
    assert (found.weights == 0).all()


@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-5, 1e-6])
def test_close_to_stationarity_there_still_is_one(distance):
    # Unit rows (+-sqrt(1 - e^2), e): by symmetry w = (t, t) with 2 e^2 t^2 = 1.
    across = np.sqrt(1 - distance**2)
    rows = np.array([[across, distance], [-across, distance]])
    found = bargain(gramian(rows))
    assert not found.stationary
    assert found.converged
    cancellation = 1e-16 / distance**2
    np.testing.assert_allclose(found.weights, 1 / (np.sqrt(2) * distance), rtol=1e-12 + 10 * cancellation)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_scaling_all_gradients_scales_the_weights(scale, alpha):
    rows = jacobian("conflict .9", 5)
    here, there = bargain(gramian(rows), alpha).weights, bargain(gramian(scale * rows), alpha).weights
    np.testing.assert_allclose(there, scale ** (-2 * alpha / (1 + alpha)) * here, rtol=1e-9)


def test_for_nash_scaling_one_gradient_scales_its_weight_back():
    rows, scales = jacobian("conflict .9", 5), 10.0 ** np.arange(-3, 2)
    here, there = bargain(gramian(rows)).weights, bargain(gramian(scales[:, None] * rows)).weights
    np.testing.assert_allclose(there * scales, here, rtol=1e-9)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_reordering_the_gradients_reorders_the_weights(alpha):
    rows = jacobian("conflicting pairs, norms over 6 decades", 8)
    order = np.random.default_rng(3).permutation(8)
    here, there = bargain(gramian(rows), alpha).weights, bargain(gramian(rows[order]), alpha).weights
    np.testing.assert_allclose(there, here[order], rtol=1e-6)


def test_towards_infinity_the_smallest_improvement_grows():
    rows = jacobian("conflict .9", 6)
    shares = []
    for alpha in (0.5, 1.0, 2.0, 20.0):
        direction = bargain(gramian(rows), alpha).weights @ rows
        shares.append((rows @ direction).min() / np.linalg.norm(direction))
    assert shares == sorted(shares)


@pytest.mark.parametrize("alpha", [0.0, -1.0, np.inf, np.nan])
def test_a_bad_exponent_is_named(alpha):
    with pytest.raises(ValueError, match="alpha must be positive"):
        bargain(np.eye(2), alpha)


def test_zero_rows_are_named():
    with pytest.raises(ValueError, match=r"objectives \[0, 2\] are zero.*leave them out"):
        bargain(np.diag([0.0, 1.0, 0.0]))


def test_too_few_steps_are_reported_and_the_best_point_is_returned():
    rows = jacobian("conflict .9", 8)
    short = [bargain(gramian(rows), max_steps=steps) for steps in (2, 4, 6)]
    assert not any(found.converged or found.stationary for found in short)
    residuals = [found.residual for found in short]
    assert residuals == sorted(residuals, reverse=True)
    np.testing.assert_allclose([residual_of(rows, found.weights, 1.0) for found in short], residuals, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.5])
def test_orthogonal_gradients_with_preferences_have_a_closed_form(alpha):
    # s^2 w = (p / w)^(1/alpha)
    lengths, preference = np.array([1e-3, 1.0, 40.0]), np.array([0.2, 1.0, 3.0])
    expected = (preference ** (1 / alpha) / lengths**2) ** (alpha / (1 + alpha))
    found = bargain(np.diag(lengths**2), alpha, preference=preference)
    np.testing.assert_allclose(found.weights, expected, rtol=1e-12)
    assert found.converged
    assert found.residual <= 1e-12


@pytest.mark.parametrize("alpha", [0.25, 1.0, 4.0])
def test_a_preference_of_two_counts_like_two_equal_objectives(alpha):
    # Two copies with w each obey z = w^(-1/alpha); together they are one weight v = 2 w with z = (2 / v)^(1/alpha).
    rows = jacobian("conflict .9", 3, seed=4)
    copies = bargain(gramian(rows[[0, 1, 2, 2]]), alpha).weights
    merged = np.array([copies[0], copies[1], copies[2] + copies[3]])
    found = bargain(gramian(rows), alpha, preference=np.array([1.0, 1.0, 2.0]))
    np.testing.assert_allclose(found.weights, merged, rtol=1e-9)


@pytest.mark.parametrize("alpha", ALPHAS[1:])  # the slopes of the first are lost in rounding
@pytest.mark.parametrize("family", ["independent", "conflict .9", "norms over 3 decades"])
@pytest.mark.parametrize("size", [2, 3, 16])
def test_bargains_with_preferences_hold(family, size, alpha):
    rows = jacobian(family, size, seed=2)
    preference = np.geomspace(0.05, 5.0, size) ** min(1.0, alpha)
    found = bargain(gramian(rows), alpha, preference=preference)
    assert found.converged
    slopes = (rows.astype(np.longdouble) @ (found.weights @ rows.astype(np.longdouble))).astype(float)
    np.testing.assert_allclose(found.weights, preference * slopes**-alpha, rtol=1e-7)


def test_preferences_maximize_the_weighted_product_of_gains():
    rows, preference = jacobian("conflict .9", 3, seed=1), np.array([0.3, 0.7, 2.0])
    direction = bargain(gramian(rows), preference=preference).weights @ rows
    direction /= np.linalg.norm(direction)
    others = np.random.default_rng(0).normal(size=(50_000, rows.shape[1]))
    others = direction + 0.3 * others / np.sqrt(rows.shape[1])
    gains = others / np.linalg.norm(others, axis=1, keepdims=True) @ rows.T
    gains = gains[(gains > 0).all(axis=1)]
    assert len(gains) > 1000
    assert preference @ np.log(rows @ direction) >= (np.log(gains) @ preference).max()


def test_preferences_that_are_not_positive_are_refused():
    with pytest.raises(ValueError, match="preference must be positive"):
        bargain(np.eye(2), preference=np.array([1.0, 0.0]))
