"""The shortest vector in the hull, against exact arithmetic, brute force, closed forms and a general optimizer."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from gramians import (
    FAMILIES,
    SIZES,
    exactly,
    exponents,
    extended,
    gramian,
    jacobian,
    norms,
    supports,
    whole_jacobians,
)
from hypothesis import given, settings
from scipy.optimize import minimize

import mogb
from mogb.solvers.min_norm import solve_min_norm


def gap_of(rows, weights):
    direction, products = extended(rows, weights)
    return float(((direction @ direction - products) / norms(rows)).max() / norms(rows).min())


def brute_force(rows):
    """The squared norm of the shortest vector: the best minimum over the affine hull of a face that lies in it."""
    best = np.inf
    for support in supports(len(rows)):
        base, edges = rows[support[0]], rows[support[1:]] - rows[support[0]]
        shares = np.linalg.lstsq(edges.T, -base, rcond=None)[0] if len(edges) else np.zeros(0)
        if shares.min(initial=0.0) >= -1e-9 and shares.sum() <= 1 + 1e-9:
            point = base + shares @ edges
            best = min(best, point @ point)
    return best


def test_two_gradients_match_the_closed_form():
    # min over t of |t a + (1 - t) b|^2 with a = (2, 0), b = (0, 1): t = |b|^2 / (|a|^2 + |b|^2).
    found = solve_min_norm(np.diag([4.0, 1.0]))
    np.testing.assert_allclose(found.weights, [0.2, 0.8], rtol=1e-15)
    assert found.squared_norm == pytest.approx(0.8)
    assert found.converged


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_orthogonal_gradients_are_weighted_by_their_inverse_squares(size):
    squares = 10 ** np.linspace(-6, 6, size)
    found = solve_min_norm(np.diag(squares))
    np.testing.assert_allclose(found.weights, (1 / squares) / (1 / squares).sum(), rtol=1e-12)
    assert found.squared_norm == pytest.approx(1 / (1 / squares).sum(), rel=1e-12)


@pytest.mark.parametrize("size", [*SIZES, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gap_is_closed_on_every_family(family, size):
    for seed in range(2):
        rows = jacobian(family, size, seed)
        found = solve_min_norm(gramian(rows))
        assert found.weights.min() >= 0
        assert found.weights.sum() == pytest.approx(1, abs=1e-15)
        assert found.converged
        assert 0 <= found.gap <= 1e-12
        assert gap_of(rows, found.weights) <= 1e-12
        direction, _ = extended(rows, found.weights)
        assert found.squared_norm == pytest.approx(
            float(direction @ direction), rel=1e-9, abs=1e-14 * norms(rows).min() ** 2
        )


@pytest.mark.parametrize("family", ["independent", "conflict .9", "duplicates", "more rows than columns"])
def test_many_objectives_are_solved_alike(family):
    rows = jacobian(family, 120)
    found = solve_min_norm(gramian(rows))
    assert found.converged
    assert gap_of(rows, found.weights) <= 1e-12


@settings(max_examples=40, deadline=None)
@given(whole_jacobians, exponents)
def test_the_gap_is_closed_in_exact_arithmetic(rows, powers):
    rows = rows * 2.0 ** np.array(powers[: len(rows)])[:, None]
    found = solve_min_norm(gramian(rows))
    weights, exact = exactly(found.weights), exactly(rows)
    columns = zip(*exact, strict=True)
    direction = [sum((w * x for w, x in zip(weights, column, strict=True)), Fraction()) for column in columns]
    square = sum(x * x for x in direction)
    if not norms(rows).all():
        assert square == 0
        assert (found.weights[norms(rows) > 0] == 0).all()
        assert found.gap == 0
    else:
        short = [square - sum(x * y for x, y in zip(row, direction, strict=True)) for row in exact]
        scales = norms(rows) * norms(rows).min()
        assert max(float(s) / scale for s, scale in zip(short, scales, strict=True)) <= 1e-12


@settings(max_examples=40, deadline=None)
@given(whole_jacobians)
def test_no_face_holds_a_shorter_vector(rows):
    found = solve_min_norm(gramian(rows))
    assert found.squared_norm <= brute_force(rows) + 1e-12
    assert found.squared_norm >= brute_force(rows) - 1e-7


@pytest.mark.parametrize("family", ["independent", "conflict .9", "norms over 3 decades", "conflicting pairs"])
def test_a_general_optimizer_agrees(family):
    rows = jacobian(family, 6)
    matrix = gramian(rows) / norms(rows).min() ** 2
    sum_to_one = {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like}
    general = minimize(
        lambda w: w @ matrix @ w,
        np.full(6, 1 / 6),
        jac=lambda w: 2 * matrix @ w,
        bounds=[(0, 1)] * 6,
        constraints=[sum_to_one],
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    np.testing.assert_allclose(solve_min_norm(gramian(rows)).weights, general.x, atol=1e-5)


def test_a_zero_gradient_is_the_shortest_vector():
    found = solve_min_norm(np.diag([0.0, 1.0, 0.0]))
    np.testing.assert_array_equal(found.weights, [0.5, 0.0, 0.5])
    assert (found.squared_norm, found.gap, found.converged) == (0.0, 0.0, True)


@pytest.mark.parametrize("rows", [[[1.0, 2.0], [-3.0, -6.0]], [[1.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]]])
def test_zero_in_the_hull_gives_zero(rows):
    found = solve_min_norm(gramian(np.array(rows)))
    assert np.linalg.norm(np.array(rows).T @ found.weights) <= 1e-15
    assert found.squared_norm <= 1e-15
    assert found.converged


def test_nearly_equal_gradients_do_not_cancel():
    # With a = (1, 0) and b = (1, 1e-6), the foot of the perpendicular from 0 is a itself; from (0, 5e-7) below, midway.
    rows = np.array([[1.0, -5e-7], [1.0, 5e-7]])
    np.testing.assert_allclose(solve_min_norm(gramian(rows)).weights, [0.5, 0.5], rtol=1e-12)
    np.testing.assert_array_equal(solve_min_norm(np.full((2, 2), 3.0)).weights, [0.5, 0.5])


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scaling_all_gradients_changes_no_weight(size, scale):
    rows = jacobian("conflict .9", size)
    there, here = solve_min_norm(gramian(scale * rows)), solve_min_norm(gramian(rows))
    np.testing.assert_allclose(there.weights, here.weights, rtol=1e-11, atol=1e-15)
    assert there.gap <= 1e-12
    assert there.squared_norm == pytest.approx(scale**2 * here.squared_norm, rel=1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_reordering_the_gradients_reorders_the_weights(size):
    rows = jacobian("conflict, norms over 6 decades", size)
    order = np.random.default_rng(size).permutation(size)
    here, there = solve_min_norm(gramian(rows)).weights, solve_min_norm(gramian(rows[order])).weights
    np.testing.assert_allclose(there, here[order], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("size", [3, 6, 16, 40])
def test_a_gramian_that_rounding_made_indefinite_and_asymmetric_is_taken_at_its_word(size):
    matrix = gramian(np.random.default_rng(size).normal(size=(size, size // 2 + 1)))
    null = np.linalg.eigh(matrix)[1][:, 0]
    matrix -= 1e-7 * np.outer(null, null)
    matrix[0, 1] *= 1 + 1e-7
    assert np.linalg.eigvalsh((matrix + matrix.T) / 2)[0] < -1e-8
    found = solve_min_norm(matrix)
    assert found.gap <= 1e-12
    assert found.converged
    symmetric = (matrix + matrix.T) / 2
    slopes, lengths = symmetric @ found.weights, np.sqrt(symmetric.diagonal())
    assert ((found.weights @ slopes - slopes) / lengths).max() / lengths.min() <= 1e-12


@pytest.mark.parametrize("steps", [1, 3])
def test_too_few_steps_are_reported_and_the_best_point_is_returned(steps):
    rows = jacobian("conflict .5", 16)
    short, full = solve_min_norm(gramian(rows), max_steps=steps), solve_min_norm(gramian(rows))
    assert not short.converged
    assert short.gap > 1e-3
    assert short.gap == pytest.approx(gap_of(rows, short.weights), rel=1e-9)
    assert full.squared_norm < short.squared_norm <= norms(rows).min() ** 2
    assert short.weights.sum() == pytest.approx(1)


def test_the_public_function_keeps_dtype_and_device():
    rows = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.bfloat16)
    found = mogb.min_norm(rows @ rows.mT)
    assert found.weights.dtype == torch.bfloat16
    torch.testing.assert_close(found.weights, torch.tensor([0.2, 0.8], dtype=torch.bfloat16))
    assert found.squared_norm == pytest.approx(0.8)
    assert found.gap <= 1e-12
    assert found.converged


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (torch.eye(2, dtype=torch.int64), TypeError, "floating-point"),
        ([[1.0]], TypeError, "floating-point"),
        (torch.ones(2, 3), ValueError, r"\[2, 3\]"),
        (torch.ones(3), ValueError, r"\[3\]"),
        (torch.ones(0, 0), ValueError, "K >= 1"),
        (torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]]), ValueError, "NaN"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_the_public_function_says_what_is_wrong(bad, error, words):
    with pytest.raises(error, match=words):
        mogb.min_norm(bad)
