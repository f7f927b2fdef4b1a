"""Projection onto the dual cone, against Moreau's conditions, brute force, quadprog and hand calculations."""

import sys

import numpy as np
import pytest
from gramians import FAMILIES, SIZES, extended, gramian, jacobian, norms, supports, whole_jacobians
from hypothesis import given, settings

from mogb.solvers.cone import project_on_dual_cone


def each_alone(size):
    return np.eye(size) / size


def mean(size):
    return np.full((1, size), 1 / size)


def check(rows, coefficients, weights, tolerance):
    """Moreau: p is the projection of x if J p >= 0, p - x is in the cone of the gradients, and p . (p - x) = 0."""
    lengths = norms(rows)
    for x, w in zip(coefficients, weights, strict=True):
        assert (w >= x).all()
        _, products = extended(rows, w)
        slopes, raised = products / lengths, (w - x) * lengths
        scale = np.abs(x * lengths).max() + raised.max() * 1e-3
        assert slopes.min() >= -tolerance * scale
        assert np.minimum(slopes, raised).max() <= tolerance * scale


def test_a_conflict_of_two_is_removed_by_hand():
    # a = (1, 0), b = (-1, 1): a without its part along b is (1/2, 1/2); b without its part along a is (0, 1).
    rows = np.array([[1.0, 0.0], [-1.0, 1.0]])
    found = project_on_dual_cone(gramian(rows), np.eye(2))
    np.testing.assert_allclose(found.weights @ rows, [[0.5, 0.5], [0.0, 1.0]], atol=1e-15)
    np.testing.assert_allclose(found.weights, [[1.0, 0.5], [1.0, 1.0]], atol=1e-15)
    assert found.converged


def test_without_conflict_nothing_changes():
    coefficients = np.array([[1.0, 2.0], [0.0, 3.0]])
    found = project_on_dual_cone(np.array([[1.0, 0.5], [0.5, 1.0]]), coefficients)
    np.testing.assert_array_equal(found.weights, coefficients)
    assert found.weights is not coefficients
    assert (found.residual, found.converged) == (0.0, True)


@pytest.mark.parametrize("size", [*SIZES, 30])
@pytest.mark.parametrize("family", FAMILIES)
def test_moreau_s_conditions_hold_on_every_family(family, size):
    for seed in range(2):
        rows = jacobian(family, size, seed)
        for coefficients in (each_alone(size), mean(size), -mean(size)):
            found = project_on_dual_cone(gramian(rows), coefficients)
            assert found.converged
            assert found.residual <= 1e-11
            check(rows, coefficients, found.weights, 1e-10)


@pytest.mark.parametrize("size", [2, 5, 16, 40])
@pytest.mark.parametrize("family", [family for family in FAMILIES if "rank" not in family and "more" not in family])
def test_no_direction_conflicts_beyond_rounding(family, size):
    rows = jacobian(family, size)
    for coefficients in (each_alone(size), mean(size)):
        weights = project_on_dual_cone(gramian(rows), coefficients).weights.sum(axis=0)
        direction, products = extended(rows, weights)
        length = np.sqrt(direction @ direction)
        if length > 1e-6 * norms(rows).min():
            assert (products / norms(rows)).min() / length >= -1e-9


@settings(max_examples=40, deadline=None)
@given(whole_jacobians)
def test_no_support_gives_a_shorter_direction(rows):
    matrix, size = gramian(rows), len(rows)
    x = np.arange(size) - 1.0
    w = project_on_dual_cone(matrix, x[None]).weights[0]
    best = x @ matrix @ x
    for support in supports(size):
        trial = x.copy()
        trial[support] -= np.linalg.lstsq(matrix[np.ix_(support, support)], matrix[support] @ x, rcond=None)[0]
        if (trial >= x - 1e-9).all():
            best = min(best, trial @ matrix @ trial)
    assert (w >= x).all()
    assert w @ matrix @ w == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("size", [3, 8, 30])
@pytest.mark.parametrize("family", ["independent", "conflict .9", "conflict, norms over 6 decades", "duplicates"])
def test_quadprog_agrees(family, size):
    pytest.importorskip("quadprog")
    rows = jacobian(family, size)
    ours = project_on_dual_cone(gramian(rows), each_alone(size))
    theirs = project_on_dual_cone(gramian(rows), each_alone(size), solver="quadprog")
    assert theirs.residual <= 1e-9
    scale = norms(rows).max() / size
    np.testing.assert_allclose(ours.weights @ rows, theirs.weights @ rows, atol=1e-7 * scale)


def test_a_missing_quadprog_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "quadprog", None)
    with pytest.raises(ImportError, match=r"mogb\[quadprog\]"):
        project_on_dual_cone(np.array([[1.0, -0.5], [-0.5, 1.0]]), np.eye(2), solver="quadprog")


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_solver_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'simplex'.*active-set, quadprog"):
        project_on_dual_cone(np.eye(2), np.eye(2), solver="simplex")


def test_a_zero_row_constrains_nothing_and_keeps_its_weight():
    rows = np.array([[1.0, 0.0], [0.0, 0.0], [-1.0, 1.0]])
    found = project_on_dual_cone(gramian(rows), np.array([[1.0, 7.0, 0.0]]))
    np.testing.assert_allclose(found.weights, [[1.0, 7.0, 0.5]], atol=1e-15)
    assert found.converged
    nothing = project_on_dual_cone(np.zeros((2, 2)), np.eye(2))
    np.testing.assert_array_equal(nothing.weights, np.eye(2))


def test_opposite_gradients_leave_what_is_across_them():
    # {d : d . (1, 0) >= 0, d . (-1, 0) >= 0} is the line d_1 = 0.
    rows = np.array([[1.0, 0.0], [-2.0, 0.0], [3.0, 4.0]])
    found = project_on_dual_cone(gramian(rows), np.array([[0.0, 0.0, 1.0]]))
    np.testing.assert_allclose(found.weights @ rows, [[0.0, 4.0]], atol=1e-14)


@pytest.mark.parametrize("size", [5, 30])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scaling_all_gradients_changes_no_weight(size, scale):
    rows = jacobian("conflict .9", size)
    here = project_on_dual_cone(gramian(rows), each_alone(size)).weights
    there = project_on_dual_cone(gramian(scale * rows), each_alone(size)).weights
    np.testing.assert_allclose(there, here, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("size", [5, 30])
def test_scaling_a_vector_scales_its_projection(size):
    matrix = gramian(jacobian("conflict .9", size))
    here = project_on_dual_cone(matrix, mean(size)).weights
    np.testing.assert_allclose(project_on_dual_cone(matrix, 1e20 * mean(size)).weights, 1e20 * here, rtol=1e-12)


@pytest.mark.parametrize("size", [5, 30])
def test_reordering_the_gradients_reorders_the_weights(size):
    rows = jacobian("conflict, norms over 6 decades", size)
    order = np.random.default_rng(size).permutation(size)
    here = project_on_dual_cone(gramian(rows), mean(size)).weights
    there = project_on_dual_cone(gramian(rows[order]), mean(size)).weights
    np.testing.assert_allclose(there, here[:, order], rtol=1e-9, atol=1e-14)


def test_vectors_are_projected_independently_of_each_other():
    rows = jacobian("conflicting pairs", 30)
    together = project_on_dual_cone(gramian(rows), each_alone(30)).weights
    alone = [project_on_dual_cone(gramian(rows), x[None]).weights[0] for x in each_alone(30)]
    np.testing.assert_allclose(together, alone, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("size", [8, 30])
def test_too_few_steps_are_reported_and_the_best_point_is_returned(size):
    rows = jacobian("conflict .9", size)
    short = project_on_dual_cone(gramian(rows), mean(size), max_steps=2)
    full = project_on_dual_cone(gramian(rows), mean(size))
    before, between, after = (np.linalg.norm(w @ rows) for w in (mean(size)[0], short.weights[0], full.weights[0]))
    assert not short.converged
    assert short.residual > 1e-3
    assert (short.weights >= mean(size)).all()
    assert after < between < before
