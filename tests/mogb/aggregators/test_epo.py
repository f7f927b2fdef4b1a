"""EPO: its linear programs against all their vertices, its guarantees, and where a run with it ends."""

from itertools import combinations

import numpy as np
import pytest
import torch

from mogb.aggregators.epo import EPO

RNG = np.random.default_rng


def uniformity(losses, preference):
    shares = preference * losses / (preference * losses).sum()
    logs = np.log(len(losses) * shares)
    return float(shares @ logs), preference * (logs - shares @ logs)


def best_vertex(gains, rows, bounds):
    """The largest gain over the simplex and ``rows @ w >= bounds``, by trying all bases."""
    size = len(gains)
    rows = np.vstack([np.eye(size), rows])
    bounds = np.concatenate([np.zeros(size), bounds])
    best, scale = -np.inf, np.abs(rows[size:]).max()
    for active in combinations(range(len(rows)), size - 1):
        system = np.vstack([np.ones(size), rows[list(active)]])
        if np.linalg.cond(system) > 1e12:
            continue
        point = np.linalg.solve(system, np.concatenate([[1.0], bounds[list(active)]]))
        if (rows @ point >= bounds - 1e-9 * scale).all():
            best = max(best, float(gains @ point))
    return best


def balance_bounds(pull, weighted):
    if not (pull > 0).any():
        return np.zeros(len(pull))
    bounds = np.where(pull > 0, -1e9, pull)
    bounds[weighted.argmax()] = 0.0
    return bounds


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("seed", range(15))
def test_balance_finds_the_best_vertex(size, seed):
    draw = RNG(seed)
    rows, losses, preference = draw.normal(size=(size, 5)), draw.uniform(0.1, 3, size), draw.uniform(0.5, 2, size)
    gramian = rows @ rows.T
    mu, anchor = uniformity(losses, preference)
    assert mu > 1e-4
    solution = EPO(preference=preference.tolist()).solve(torch.from_numpy(gramian), torch.from_numpy(losses))
    assert solution.note == "balance"
    assert solution.details["non_uniformity"] == pytest.approx(mu)
    pull = gramian @ anchor
    bounds = balance_bounds(pull, preference * losses)
    assert (gramian @ solution.weights >= bounds - 1e-7).all()
    assert pull @ solution.weights == pytest.approx(best_vertex(pull, gramian, bounds), rel=1e-7, abs=1e-9)
    assert solution.weights.min() >= 0
    assert solution.weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("restricted", [True, False])
@pytest.mark.parametrize("seed", range(15))
def test_dominance_finds_the_best_vertex(restricted, seed):
    draw = RNG(seed)
    rows, preference = draw.normal(size=(3, 5)), draw.uniform(0.5, 2, 3)
    losses = draw.uniform(0.995, 1.005, 3) / preference
    gramian = rows @ rows.T
    mu, anchor = uniformity(losses, preference)
    assert mu < 1e-4
    method = EPO(preference=preference.tolist(), restricted=restricted)
    solution = method.solve(torch.from_numpy(gramian), torch.from_numpy(losses))
    assert solution.note == "dominance"
    system, bounds = gramian, np.zeros(3)
    if restricted:
        system, bounds = np.vstack([gramian, gramian @ anchor]), np.append(bounds, min((gramian @ anchor).max(), 0.0))
    gains = gramian.sum(axis=0)
    assert gains @ solution.weights == pytest.approx(best_vertex(gains, system, bounds), rel=1e-7)
    assert (gramian @ solution.weights >= -1e-8).all()  # every loss falls


def test_a_restriction_that_cannot_be_met_is_dropped_and_noted():
    rows = np.array([[-1.28, -0.71], [0.62, -2.25], [0.39, -0.58]])
    preference = np.array([0.24477684, 2.32226281, 1.63572443])
    losses = torch.tensor([4.09953347, 0.42898166, 0.61569351]).double()
    gramian = torch.from_numpy(rows @ rows.T)
    solution = EPO(preference=preference.tolist()).solve(gramian, losses)
    assert solution.note == "dominance, relaxed: the restriction has no solution"
    assert solution.converged
    relaxed = EPO(preference=preference.tolist(), restricted=False).solve(gramian, losses)
    np.testing.assert_allclose(solution.weights, relaxed.weights)
    _, anchor = uniformity(losses.numpy(), preference)
    pull = gramian.numpy() @ anchor
    restricted = np.vstack([gramian.numpy(), pull])
    assert best_vertex(gramian.numpy().sum(axis=0), restricted, np.array([0, 0, 0, pull.max()])) == -np.inf


@pytest.mark.parametrize("preference", [(1.0, 1.0), (1.0, 4.0), (3.0, 1.0)])
def test_a_run_ends_on_the_front_where_the_weighted_losses_are_equal(preference):
    # Two bowls: losses |x - a|^2 and |x - b|^2, front sqrt(f1) + sqrt(f2) = |a - b| = 2.
    centres = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).double()
    x = torch.tensor([0.3, 1.5]).double()
    method = EPO(preference=list(preference), eps=1e-3)
    for step in range(400):
        differences = x - centres
        losses = differences.square().sum(dim=1)
        direction = method(2 * differences, losses)
        x = x - 0.05 / (1 + step / 40) * direction
    losses = (x - centres).square().sum(dim=1)
    assert losses.sqrt().sum() == pytest.approx(2, abs=1e-3)
    ratio = losses * torch.tensor(preference).double()
    assert ratio[0] == pytest.approx(float(ratio[1]), rel=0.1)


def test_losses_of_zero_and_no_gradients_are_no_trouble():
    gramian = torch.tensor([[2.0, -1.0], [-1.0, 3.0]]).double()
    for losses in ([0.0, 1.0], [0.0, 0.0], [1e-300, 1.0]):
        weights = EPO().weights(gramian, torch.tensor(losses).double())
        assert weights.isfinite().all()
    assert EPO().weights(gramian, torch.tensor([0.0, 1.0]).double())[1] > 0.99  # all for the one that is left
    solution = EPO().solve(torch.zeros(2, 2), torch.ones(2))
    assert solution.note == "all gradients are zero"
    assert EPO().weights(torch.eye(1), torch.ones(1)).tolist() == [1.0]


def test_an_objective_that_sits_out_takes_its_preference_along():
    rows, losses = RNG(0).normal(size=(3, 5)), np.array([1.0, 2.0, 0.5])
    live = np.array([True, False, True])
    solution = EPO(preference=[1.0, 5.0, 2.0])._solve_live(rows @ rows.T, losses, live)
    alone = EPO(preference=[1.0, 2.0])._weights((rows @ rows.T)[live][:, live], losses[live])
    np.testing.assert_allclose(solution.weights[live], alone.weights)
    assert solution.weights[1] == 0


def test_refusals():
    with pytest.raises(ValueError, match=r"objective 1 is -0.5"):
        EPO().weights(torch.eye(2), torch.tensor([1.0, -0.5]))
    with pytest.raises(ValueError, match="preference"):
        EPO(preference=[1.0, 2.0]).weights(torch.eye(3), torch.ones(3))
    for options in ({"preference": [1.0, 0.0]}, {"preference": []}, {"eps": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            EPO(**options)
