"""FERERO: its problem by hand, by conditions and against a general solver; where a run ends; the official steps."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.testing import assert_close

from mogb.aggregators.ferero import FERERO
from mogb.base import Promise


def complement(ray):
    return np.linalg.svd(np.atleast_2d(ray))[2][1:]


def by_slsqp(rows, losses, ray, cone, pull):
    """The dual problem, its free part eliminated by least squares, minimized from many starts."""
    basis = complement(ray)
    goal = pull * basis @ losses

    def parts(simplex):
        ordered = rows.T @ (cone.T @ simplex)
        moves = basis @ rows
        free = np.linalg.solve(moves @ moves.T, goal - moves @ ordered)
        return ordered + moves.T @ free, free

    def height(simplex):
        direction, free = parts(simplex)
        return direction @ direction / 2 - free @ goal

    best = None
    for start in np.vstack([np.eye(len(cone)), np.full((1, len(cone)), 1 / len(cone))]):
        found = minimize(
            height,
            start,
            bounds=[(0, 1)] * len(cone),
            constraints=[{"type": "eq", "fun": lambda simplex: simplex.sum() - 1}],
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        best = found if best is None or found.fun < best.fun else best
    return parts(best.x)[0]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("seed", range(8))
def test_it_agrees_with_a_general_solver(size, seed):
    draw = np.random.default_rng(seed)
    rows, losses = draw.normal(size=(size, 7)), draw.uniform(0.2, 2, size)
    ray, cone = draw.uniform(0.5, 2, size), draw.uniform(0, 1, (size + 1, size))
    method = FERERO(preference=ray.tolist(), cone=cone.tolist(), pull=0.7, normalize=False)
    ours = method(torch.from_numpy(rows), torch.from_numpy(losses)).numpy()
    exact = by_slsqp(rows, losses, ray, cone / 1.0, 0.7)
    np.testing.assert_allclose(ours, exact, atol=2e-4 * np.linalg.norm(exact))


@pytest.mark.parametrize("spread", [0.0, 3.0, 6.0])
@pytest.mark.parametrize("seed", range(5))
def test_every_step_takes_the_same_share_of_the_distance_to_the_ray(spread, seed):
    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(4, 9)) * np.logspace(-spread / 2, spread / 2, 4)[draw.permutation(4), None]
    losses, ray = draw.uniform(0.2, 2, 4), draw.uniform(0.5, 2, 4)
    solution = FERERO(preference=ray.tolist(), pull=0.3, normalize=False).solve(
        torch.from_numpy(rows @ rows.T), torch.from_numpy(losses)
    )
    assert solution.note == ""
    # d moves L_k / p_k - L_j / p_j by 0.3 of itself, for every pair
    reached = rows @ (rows.T @ solution.weights) / ray
    wanted = 0.3 * losses / ray
    np.testing.assert_allclose(reached - reached.mean(), wanted - wanted.mean(), atol=1e-7 * np.abs(reached).max())


def test_on_the_ray_it_is_the_shortest_direction_that_stays_there():
    # G = I, L on the ray (1, 1): d must be along (1, 1), and the hull of the gradients has (1/2, 1/2) there.
    weights = FERERO(preference=[1.0, 1.0]).weights(torch.eye(2).double(), torch.tensor([3.0, 3.0]).double())
    assert_close(weights, torch.tensor([0.5, 0.5]).double())


def test_units_of_the_shortest_gradient_and_of_the_losses():
    rows = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]]).double()
    losses = torch.tensor([1.0, 0.2]).double()
    assert_close(FERERO()(rows, losses), 2 * FERERO(normalize=False)(rows / 2, losses / losses.norm()))
    assert_close(FERERO()(1e-9 * rows, 1e5 * losses), 1e-9 * FERERO()(rows, losses), rtol=1e-7, atol=0)
    assert Promise.HOMOGENEOUS in FERERO().keeps
    assert FERERO(normalize=False, preference=[1.0, 2.0]).keeps == frozenset()
    assert FERERO(solver="official").keeps == frozenset()


@pytest.mark.parametrize("ray", [(1.0, 1.0), (1.0, 4.0), (3.0, 1.0)])
def test_a_run_ends_on_the_front_on_the_ray(ray):
    centres = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).double()  # losses |x - a|^2; front sqrt(f1) + sqrt(f2) = 2
    x = torch.tensor([0.6, 1.2]).double()
    method = FERERO(preference=list(ray))
    for _ in range(600):
        differences = x - centres
        x = x - 0.02 * method(2 * differences, differences.square().sum(dim=1))
    losses = (x - centres).square().sum(dim=1)
    assert losses.sqrt().sum() == pytest.approx(2, abs=1e-3)
    assert losses[0] / losses[1] == pytest.approx(ray[0] / ray[1], rel=1e-2)


def test_what_the_gradients_cannot_do_is_noted():
    parallel = torch.tensor([[1.0, 1.0], [1.0, 1.0]]).double()
    solution = FERERO().solve(parallel @ parallel.mT, torch.tensor([1.0, 2.0]).double())
    assert "cannot move" in solution.note
    assert_close(torch.from_numpy(solution.weights) @ parallel, parallel[0])  # what is left is the descent
    contradicting = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]]).double()
    rows = contradicting @ contradicting.mT
    assert "cannot move" in FERERO().solve(rows, torch.tensor([1.0, 2.0, 9.0, 1.0]).double()).note
    consistent = FERERO().solve(rows, torch.ones(4).double())  # nothing to be done but descend
    assert consistent.note == ""
    assert not FERERO()(torch.zeros(3, 4), torch.ones(3)).any()
    assert FERERO().weights(torch.eye(1), torch.ones(1)).tolist() == [1.0]


def test_the_official_steps_come_close_and_survive_long_gradients():
    rows = 0.1 * torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]).double()
    losses = torch.tensor([2.0, 0.5]).double()
    exact = FERERO(normalize=False)(rows, losses)
    official = FERERO(normalize=False, solver="official")
    assert_close(official(rows, losses), exact, rtol=0, atol=0.01 * float(exact.norm()))
    assert not torch.allclose(official(rows, losses), exact, rtol=0, atol=1e-3 * float(exact.norm()))
    solution = official.solve(1e6 * rows @ rows.mT, losses)
    assert np.isfinite(solution.weights).all()
    assert np.abs(solution.weights).max() < 10
    weak = official.solve(1e-6 * rows @ rows.mT, losses)
    assert weak.note == "the official steps did not settle"


def test_an_objective_that_sits_out_takes_its_options_along():
    rows, losses = np.random.default_rng(0).normal(size=(3, 5)), np.array([1.0, 2.0, 0.5])
    live = np.array([True, False, True])
    method = FERERO(preference=[1.0, 5.0, 2.0], cone=[[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    alone = FERERO(preference=[1.0, 2.0], cone=[[1.0, 0.0], [0.0, 3.0]])
    solution = method._solve_live(rows @ rows.T, losses, live)
    np.testing.assert_allclose(
        solution.weights[live], alone._weights((rows @ rows.T)[live][:, live], losses[live]).weights
    )
    assert solution.weights[1] == 0


def test_refusals():
    for options in ({"preference": [1.0, 0.0]}, {"cone": [[1.0], [1.0, 2.0]]}, {"cone": []}, {"pull": -1.0}):
        with pytest.raises(ValueError, match=r"preference|cone|pull"):
            FERERO(**options)
    method = FERERO()
    object.__setattr__(method, "solver", "newton")
    with pytest.raises(ValueError, match="solver must be 'exact' or 'official', but got 'newton'"):
        method._check()
    with pytest.raises(ValueError, match="cone must have one number per objective in a row, 3, but got 2"):
        FERERO(cone=[[1.0, 2.0]]).weights(torch.eye(3), torch.ones(3))
    with pytest.raises(ValueError, match="preference must have one number per objective, 3"):
        FERERO(preference=[1.0, 2.0]).weights(torch.eye(3), torch.ones(3))
