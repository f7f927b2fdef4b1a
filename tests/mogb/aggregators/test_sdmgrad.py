"""SDMGrad: optimality by its conditions, limits, the official steps by hand, and what they get wrong."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mogb.aggregators.sdmgrad import SDMGrad, cross_gramian
from mogb.base import Promise
from mogb.solvers.simplex import project_on_simplex


def random_rows(size, columns, seed=0):
    return torch.randn(size, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [2, 3, 5, 12])
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.6, 5.0])
@pytest.mark.parametrize("spread", [1.0, 1e4])
@pytest.mark.parametrize("preferred", [False, True])
def test_no_other_simplex_weights_are_shorter(size, lam, spread, preferred):
    rows = random_rows(size, 7) * torch.logspace(0, np.log10(spread), size, dtype=torch.float64)[:, None]
    preference = np.arange(1.0, size + 1) if preferred else np.ones(size)
    method = SDMGrad(lam=lam, preference=preference.tolist() if preferred else None)
    solution = method.solve(rows @ rows.mT)
    target = preference / preference.sum()
    simplex = solution.details["simplex"]
    assert simplex.min() >= 0
    assert simplex.sum() == pytest.approx(1)
    np.testing.assert_allclose(solution.weights, (simplex + lam * target) / (1 + lam), rtol=1e-14)
    # Convex: w is optimal if and only if the slope (rows @ d)_k is smallest where w_k > 0.
    slopes = rows.numpy() @ (rows.numpy().T @ (simplex + lam * target))
    norms = rows.norm(dim=1).numpy()
    assert (simplex @ slopes - slopes <= 1e-9 * norms * norms.max()).all()
    assert solution.converged


def test_limits_of_the_pull():
    gramian = torch.tensor([[4.0, 0.0], [0.0, 1.0]]).double()
    assert_close(SDMGrad(lam=0.0).weights(gramian), torch.tensor([0.2, 0.8]).double())
    far = SDMGrad(lam=1e9, preference=[3.0, 1.0]).weights(gramian)
    assert_close(far, torch.tensor([0.75, 0.25]).double(), rtol=1e-8, atol=1e-8)


def test_the_official_steps_by_hand():
    # Scale: mean norm (2 + 1) / 2 = 1.5, so A = diag(4, 1) / 2.25. First step from (1/2, 1/2), lam 0.2:
    # slope A (0.6, 0.6) = (2.4, 0.6) / 2.25, times lr 0.1, then the projection takes the excess off equally.
    gramian = torch.tensor([[4.0, 0.0], [0.0, 1.0]]).double()
    method = SDMGrad(lam=0.2, solver="official", steps=1, lr=0.1)
    step = 0.1 * (2.4 - 0.6) / 2.25 / 2
    simplex = np.array([0.5 - step, 0.5 + step])
    np.testing.assert_allclose(method.solve(gramian).details["simplex"], simplex, rtol=1e-7)
    # The second call goes on from there; momentum starts afresh.
    slope = np.array([4.0, 1.0]) * (simplex + 0.1) / 2.25
    np.testing.assert_allclose(
        method.solve(gramian).details["simplex"], project_on_simplex(simplex - 0.1 * slope), rtol=1e-7
    )
    # Two steps in one call: the second velocity holds half of the first.
    first = np.array([2.4, 0.6]) / 2.25
    once = project_on_simplex(np.array([0.5, 0.5]) - 0.1 * first)
    second = 0.5 * first + np.array([4.0, 1.0]) * (once + 0.1) / 2.25
    twice = SDMGrad(lam=0.2, solver="official", steps=2, lr=0.1).solve(gramian).details["simplex"]
    np.testing.assert_allclose(twice, project_on_simplex(once - 0.1 * second), rtol=1e-7)


def test_the_official_steps_conflict_where_the_exact_solution_does_not():
    rows = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]).double()
    exact, official = SDMGrad()(rows), SDMGrad(solver="official")(rows)
    assert (rows @ exact).min() > 0
    assert (rows @ official).min() < -10
    assert exact.norm() < official.norm()


def test_two_batches_need_the_official_steps():
    cross = cross_gramian(random_rows(3, 5), random_rows(3, 5, seed=1))
    with pytest.raises(ValueError, match="solver='official' for the cross Gramian"):
        SDMGrad().weights(cross)
    weights = SDMGrad(solver="official").weights(cross)
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1)


def test_float32_products_are_not_taken_for_two_batches():
    rows = random_rows(4, 1000).float() * torch.logspace(-3, 3, 4)[:, None]
    gramian = torch.stack([rows @ row for row in rows])  # symmetric up to rounding only
    SDMGrad().weights(gramian)


def test_state_resumes_to_the_bit():
    gramians = [(rows := random_rows(3, 5, seed)) @ rows.mT for seed in range(6)]
    whole, first, second = (SDMGrad(solver="official", lr=0.3) for _ in range(3))
    expected = [whole.weights(gramian) for gramian in gramians]
    for gramian in gramians[:3]:
        first.weights(gramian)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(second.weights(g), e) for g, e in zip(gramians[3:], expected[3:], strict=True))
    assert not torch.equal(SDMGrad(solver="official", lr=0.3).weights(gramians[3]), expected[3])
    assert SDMGrad().state_dict() == {}


@pytest.mark.parametrize("solver", ["exact", "official"])
def test_an_objective_that_sits_out_changes_nothing_for_the_others(solver):
    rows = random_rows(3, 5).numpy()
    live = np.array([True, False, True])
    method = SDMGrad(solver=solver, preference=[1.0, 2.0, 3.0])
    alone = SDMGrad(solver=solver, preference=[1.0, 3.0])
    solution = method._solve_live(rows @ rows.T, None, live)
    np.testing.assert_allclose(solution.weights[live], alone._weights((rows @ rows.T)[live][:, live]).weights)
    assert solution.weights[1] == 0
    method.weights(torch.from_numpy(rows @ rows.T))  # all three are back


def test_options_give_promises_up():
    assert Promise.PERMUTATION_EQUIVARIANT in SDMGrad().keeps
    assert Promise.PERMUTATION_EQUIVARIANT not in SDMGrad(preference=[1.0, 2.0]).keeps
    assert SDMGrad(solver="official").keeps == {Promise.SIMPLEX_WEIGHTS}


def test_refusals():
    for options in (
        {"lam": -0.1}, {"steps": 0}, {"lr": 0.0}, {"momentum": 1.0}, {"preference": [1.0, -1.0]},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            SDMGrad(**options)
    method = SDMGrad()
    method.solver = "newton"
    with pytest.raises(ValueError, match="solver must be 'exact' or 'official', but got 'newton'"):
        method._check()
    with pytest.raises(ValueError, match="preference"):
        SDMGrad(preference=[1.0, 2.0]).weights(torch.eye(3))
