"""CAGrad's dual problem, against its own primal problem, brute force, a general optimizer and closed forms."""

import numpy as np
import pytest
from gramians import FAMILIES, SIZES, extended, gramian, jacobian, norms, whole_jacobians
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar

from mogb.solvers.cone import project_on_dual_cone
from mogb.solvers.conflict_averse import conflict_averse
from mogb.solvers.min_norm import solve_min_norm

CS = (0.05, 0.4, 0.9, 2.0)


def objective(rows, weights, c):
    mean, combined = rows.mean(axis=0), weights @ rows
    return combined @ mean + c * np.linalg.norm(mean) * np.linalg.norm(combined)


def duality_gap(rows, found, c):
    """The primal problem is max_d min_i g_i . d within |d - g_0| <= c |g_0|; both optima are equal."""
    size = len(rows)
    direction, products = extended(rows, 1 / size + found.multiplier * found.simplex)
    mean = rows.astype(np.longdouble).mean(axis=0)
    radius = c * np.sqrt(mean @ mean)
    away = np.sqrt(((direction - mean) ** 2).sum())
    assert float(away) == pytest.approx(float(radius), rel=1e-7)
    primal = float(products.min())
    return (objective(rows, found.simplex, c) - primal) / (norms(rows).min() * float(radius) * (1 + 1 / c))


@pytest.mark.parametrize("c", CS)
@pytest.mark.parametrize("size", [*SIZES, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_is_no_duality_gap_on_any_family(family, size, c):
    rows = jacobian(family, size)
    found = conflict_averse(gramian(rows), c)
    assert found.converged
    assert found.simplex.min() >= 0
    assert found.simplex.sum() == pytest.approx(1, abs=1e-15)
    assert found.residual <= 1e-9
    if found.stationary:
        # Zero is in the hull, and what the cone of the gradients can cancel of g_0 is at most c |g_0|.
        assert solve_min_norm(gramian(rows)).squared_norm <= 1e-13 * norms(rows).max() ** 2
        mean = rows.mean(axis=0)
        rest = project_on_dual_cone(gramian(rows), np.full((1, size), 1 / size)).weights[0] @ rows
        assert np.linalg.norm(mean - rest) <= c * np.linalg.norm(mean) * (1 + 1e-6) + 1e-7 * norms(rows).max()
    else:
        assert -1e-9 <= duality_gap(rows, found, c) <= 1e-8


@settings(max_examples=40, deadline=None)
@given(whole_jacobians, st.sampled_from(CS))
def test_no_other_point_of_the_simplex_is_worse_for_the_mean(rows, c):
    found = conflict_averse(gramian(rows), c)
    others = np.random.default_rng(0).dirichlet(np.full(len(rows), 0.3), size=60)
    others = np.concatenate([others, np.eye(len(rows)), np.full((1, len(rows)), 1 / len(rows))])
    least = min(objective(rows, other, c) for other in others)
    assert found.converged
    if found.stationary:
        assert least >= -1e-9
    else:
        assert objective(rows, found.simplex, c) <= least + 1e-9


@pytest.mark.parametrize("c", [0.1, 0.4, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_two_objectives_match_a_line_search(seed, c):
    rows = jacobian("conflict .9", 2, seed)
    found = conflict_averse(gramian(rows), c)
    line = minimize_scalar(
        lambda t: objective(rows, np.array([t, 1 - t]), c), bounds=(0, 1), method="bounded", options={"xatol": 1e-12}
    )
    assert found.simplex[0] == pytest.approx(line.x, abs=1e-6)


@pytest.mark.parametrize("family", ["independent", "conflict .5", "conflict .9", "norms over 3 decades", "correlated"])
@pytest.mark.parametrize("c", [0.2, 0.6])
def test_a_general_optimizer_agrees(family, c):
    rows = jacobian(family, 6)
    rows = rows / np.linalg.norm(rows.mean(axis=0))
    general = min(
        (
            minimize(
                objective_of_rows(rows, c),
                start,
                bounds=[(0, 1)] * 6,
                constraints=[{"type": "eq", "fun": lambda w: w.sum() - 1}],
                options={"ftol": 1e-14, "maxiter": 500},
            )
            for start in (np.full(6, 1 / 6), *np.eye(6))
        ),
        key=lambda result: result.fun,
    )
    found = conflict_averse(gramian(rows), c)
    assert objective(rows, found.simplex, c) <= general.fun + 1e-9
    assert objective(rows, found.simplex, c) == pytest.approx(general.fun, abs=1e-6)


def objective_of_rows(rows, c):
    return lambda weights: objective(rows, weights, c)


@pytest.mark.parametrize("c", CS)
def test_one_gradient_is_lengthened(c):
    found = conflict_averse(np.array([[4.0]]), c)
    np.testing.assert_array_equal(found.simplex, [1.0])
    assert found.multiplier == pytest.approx(c)
    assert found.converged


def test_orthogonal_unit_gradients_are_treated_alike():
    # By symmetry g_w = g_0, so that the multiplier is c.
    found = conflict_averse(np.eye(4), 0.5)
    np.testing.assert_allclose(found.simplex, np.full(4, 0.25), rtol=1e-12)
    assert found.multiplier == pytest.approx(0.5)


def test_with_c_zero_it_is_the_mean():
    found = conflict_averse(gramian(jacobian("conflict .9", 5)), 0.0)
    assert (found.multiplier, found.residual, found.converged, found.stationary) == (0.0, 0.0, True, False)
    assert found.simplex.sum() == 1


@pytest.mark.parametrize("c", CS)
@pytest.mark.parametrize("size", [2, 5, 16])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-3, 1e12, 1e30])
def test_scaling_all_gradients_changes_nothing(scale, size, c):
    rows = jacobian("conflict .9", size)
    here, there = conflict_averse(gramian(rows), c), conflict_averse(gramian(scale * rows), c)
    np.testing.assert_allclose(there.simplex, here.simplex, rtol=1e-9, atol=1e-13)
    assert there.multiplier == pytest.approx(here.multiplier, rel=1e-10)


@pytest.mark.parametrize("c", CS)
@pytest.mark.parametrize("size", [2, 5, 16])
def test_reordering_the_gradients_reorders_the_weights(size, c):
    rows = jacobian("conflict, norms over 6 decades", size)
    order = np.random.default_rng(size).permutation(size)
    here, there = conflict_averse(gramian(rows), c), conflict_averse(gramian(rows[order]), c)
    np.testing.assert_allclose(there.simplex, here.simplex[order], rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("c", CS)
def test_where_the_mean_is_zero_nothing_can_be_gained(c):
    found = conflict_averse(gramian(np.array([[1.0, 0.0], [-1.0, 0.0]])), c)
    assert found.stationary
    assert (found.multiplier, found.converged) == (0.0, True)
    assert conflict_averse(np.zeros((3, 3)), c).stationary


@pytest.mark.parametrize(("c", "stationary"), [(0.3, False), (0.9, False), (1.1, True), (3.0, True)])
def test_zero_inside_of_the_hull_is_optimal_only_for_c_above_one(c, stationary):
    # Then g_w = - e g_0 is possible, and changes the dual by (c - 1) e |g_0|^2.
    rows = np.array([[2.0, 0.0], [-1.0, 1.5], [-0.5, -1.0]])
    found = conflict_averse(gramian(rows), c)
    assert found.stationary is stationary
    assert found.converged
    assert (found.multiplier == 0) == stationary


@pytest.mark.parametrize("c", CS)
def test_a_zero_gradient_is_a_point_of_the_hull(c):
    # Of (0, a), with g_0 = a / 2, the zero row is the worst for the mean: g_w . g_0 + c |g_0| |g_w| >= 0.
    found = conflict_averse(np.diag([0.0, 4.0]), c)
    assert found.stationary
    rows = np.array([[1.0, 0.0], [0.0, 0.0], [-3.0, 0.5]])
    found = conflict_averse(gramian(rows), c)
    grid = [objective(rows, np.array([t, 0.0, 1 - t]), c) for t in np.linspace(0, 1, 2001)]
    assert found.stationary == (min(grid) >= 0)
    if not found.stationary:
        assert found.simplex[1] == 0
        assert objective(rows, found.simplex, c) == pytest.approx(min(grid), rel=1e-3)


@pytest.mark.parametrize("c", [-0.1, np.nan, np.inf])
def test_a_bad_c_is_named(c):
    with pytest.raises(ValueError, match="c must be a finite number"):
        conflict_averse(np.eye(2), c)


def test_too_few_steps_are_reported_and_the_best_point_is_returned():
    rows = jacobian("norms over 6 decades", 16)
    short, full = conflict_averse(gramian(rows), 0.9, max_steps=1), conflict_averse(gramian(rows), 0.9)
    assert not short.converged
    assert full.converged
    assert short.residual > 1e-9
    assert objective(rows, full.simplex, 0.9) < objective(rows, short.simplex, 0.9)


@pytest.mark.parametrize("c", CS)
@pytest.mark.parametrize("family", ["independent", "conflict .9", "norms over 3 decades"])
@pytest.mark.parametrize("size", [2, 3, 5, 16])
def test_another_mean_closes_the_duality_gap_too(family, size, c):
    rows = jacobian(family, size, seed=3)
    shares = np.geomspace(1, 30, size) / np.geomspace(1, 30, size).sum()
    shares[0], shares[-1] = 0.0, shares[-1] + shares[0]
    found = conflict_averse(gramian(rows), c, shares)
    assert found.converged
    exact = rows.astype(np.longdouble)
    mean, combined = shares @ exact, found.simplex @ exact
    radius = c * np.sqrt(mean @ mean)
    direction = mean + found.multiplier * combined
    assert float(np.sqrt(((direction - mean) ** 2).sum())) == pytest.approx(float(radius), rel=1e-7)
    gap = combined @ mean + radius * np.sqrt(combined @ combined) - (exact @ direction).min()
    assert -1e-9 <= float(gap / (norms(rows).min() * radius * (1 + 1 / c))) <= 1e-8


def test_a_zero_gradient_keeps_its_share_of_the_mean():
    rows = np.array([[2.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    found = conflict_averse(gramian(rows), 0.0, np.array([0.25, 0.5, 0.25]))
    assert not found.stationary
    assert conflict_averse(gramian(rows), 0.5, np.array([0.25, 0.5, 0.25])).stationary
