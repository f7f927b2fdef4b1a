"""PCD: its problem by conditions and in closed form, its averages by hand, priorities, contradictions."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mogb.aggregators.pcd import PCD


def random_rows(size, columns, seed=0):
    return torch.randn(size, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_two_objectives_in_closed_form():
    # eps = 0 at the first call: unit gradients u, v with cosine c. If c < tau, d = u + (tau - c) v, of the norm of g.
    rows = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]).double()
    u, v = (row / row.norm() for row in rows)
    tau = 0.3
    exact = u + (tau - u @ v) * v
    assert_close(PCD(tau=tau, eps=0.0)(rows), exact / exact.norm() * rows[0].norm())
    assert exact @ v == pytest.approx(tau)


def test_without_a_violated_constraint_it_is_the_primary_gradient():
    rows = torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 5.0, 0.0]]).double()
    assert_close(PCD()(rows), rows[0])
    assert_close(PCD(primary=2, tau=0.0)(rows), rows[2])


@pytest.mark.parametrize("size", [3, 5, 9])
@pytest.mark.parametrize("spread", [0.0, 4.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_projection_meets_its_optimality_conditions(size, spread, seed):
    rows = (
        random_rows(size, 12, seed) * 10 ** torch.linspace(-spread / 2, spread / 2, size, dtype=torch.float64)[:, None]
    )
    rows -= 0.9 * rows.mean(dim=0)
    tau, primary = 0.2, seed % size
    direction = PCD(tau=tau, eps=0.0, primary=primary)(rows)
    units = rows / rows.norm(dim=1, keepdim=True)
    others = [j for j in range(size) if j != primary]
    # d is the optimum up to its length: find the length at which d~ - u_p is a non-negative combination of active rows.
    shape = direction / direction.norm()
    slopes = units[others] @ shape
    # The tightest constraints have the smallest slopes; they say how long d~ is, if any binds at all.
    length = tau / slopes.min()
    if length < units[primary] @ shape:  # none binds: d~ is the primary one itself
        assert_close(shape, units[primary], rtol=0, atol=1e-9)
        return
    exact = length * shape
    active = [j for j, slope in zip(others, slopes, strict=True) if slope * length < tau + 1e-7]
    assert (units[others] @ exact >= tau - 1e-9).all()
    correction = (exact - units[primary]).numpy()
    multipliers = np.linalg.lstsq(units[active].numpy().T, correction, rcond=None)[0]
    np.testing.assert_allclose(units[active].numpy().T @ multipliers, correction, atol=1e-7)
    assert multipliers.min() > -1e-7
    assert direction.norm() == pytest.approx(float(rows[primary].norm()))


def test_against_an_independent_solver():
    quadprog = pytest.importorskip("quadprog")
    for seed in range(20):
        rows = random_rows(5, 8, seed)
        rows -= 0.8 * rows.mean(dim=0)
        units = (rows / rows.norm(dim=1, keepdim=True)).numpy()
        tau = np.linspace(0.0, 0.3, 4)
        exact = quadprog.solve_qp(np.eye(8), units[0], units[1:].T, tau)[0]
        exact *= float(rows[0].norm()) / np.linalg.norm(exact)
        assert_close(PCD(tau=tau.tolist(), eps=0.0)(rows), torch.from_numpy(exact), rtol=1e-8, atol=1e-8)


def test_the_averages_by_hand():
    rows = torch.tensor([[3.0, 0.0], [0.0, 4.0]]).double()
    method = PCD(beta=0.5, eps=0.25)
    method(rows)
    assert_close(method.state_dict()["squares"], torch.tensor([4.5, 8.0]).double())
    method(2 * rows)
    # 0.5 * 4.5 + 0.5 * 36, and 0.5 * 8 + 0.5 * 64; debiased by 1 - 0.5 ** 2
    assert_close(method.state_dict()["squares"], torch.tensor([20.25, 36.0]).double())
    scales = method._scales(np.zeros(2), np.zeros(2, dtype=bool))  # nobody is live: as they are
    np.testing.assert_allclose(scales, 1 / np.sqrt(np.array([20.25, 36.0]) / 0.75 + 0.25))


def test_a_burst_asks_for_more_of_a_secondary_objective():
    quiet = torch.tensor([[1.0, 0.0], [-0.5, 0.5]]).double()
    burst = quiet * torch.tensor([[1.0], [3.0]]).double()
    method = PCD(tau=0.2, beta=0.9)
    for _ in range(20):
        before = method(quiet)
    after = method(burst)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(after, quiet[1], dim=0) > cosine(before, quiet[1], dim=0) + 0.05


def test_contradicting_constraints_are_dropped_and_noted():
    rows = torch.tensor([[1.0, 1.0], [1.0, 0.0], [-2.0, 0.0]]).double()
    solution = PCD(tau=0.1).solve(rows @ rows.mT)
    assert solution.weights.tolist() == [1.0, 0.0, 0.0]
    assert "contradict" in solution.note
    easy = PCD(tau=0.0).solve(rows @ rows.mT)  # only the wall between the two is left
    assert easy.note == ""
    assert_close(torch.from_numpy(easy.weights) @ rows, torch.tensor([0.0, 2**0.5]).double(), rtol=0, atol=1e-7)


def test_nothing_is_left_between_opposite_gradients():
    rows = torch.tensor([[1.0, 2.0], [-3.0, -6.0]]).double()
    solution = PCD(tau=0.0).solve(rows @ rows.mT)
    assert solution.weights.tolist() == [0.0, 0.0]
    assert "leave nothing" in solution.note


def test_a_zero_primary_gradient_halts_and_others_are_left_out():
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double()
    assert PCD().solve(rows @ rows.mT).note == "the primary gradient is zero"
    assert not PCD()(rows).any()
    solution = PCD(primary=1).solve(rows @ rows.mT)
    assert solution.left_out == (0,)
    expected = PCD()(rows[1:])
    assert_close(torch.from_numpy(solution.weights) @ rows, expected)


def test_state_resumes_to_the_bit():
    steps = [random_rows(3, 5, seed) for seed in range(6)]
    whole, first, second = PCD(beta=0.7), PCD(beta=0.7), PCD(beta=0.7)
    expected = [whole(rows) for rows in steps]
    for rows in steps[:3]:
        first(rows)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(second(rows), wanted) for rows, wanted in zip(steps[3:], expected[3:], strict=True))


def test_an_objective_that_sits_out_keeps_its_average():
    live = np.array([True, False, True])
    method, other = PCD(beta=0.7), PCD(beta=0.7)
    for seed in range(3):
        rows = random_rows(3, 5, seed)
        gramian = (rows @ rows.mT).numpy()
        solution = method._solve_live(gramian, None, live)
        np.testing.assert_allclose(solution.weights[live], other._weights(gramian[live][:, live]).weights)
        assert solution.left_out == (1,)
    assert method.state_dict()["squares"][1] == 0
    assert method.state_dict()["calls"].tolist() == [3.0, 0.0, 3.0]
    assert torch.isfinite(method(rows)).all()


def test_refusals():
    for options in ({"tau": 1.5}, {"tau": [0.1, -0.1]}, {"beta": 1.0}, {"eps": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            PCD(**options)
    with pytest.raises(ValueError, match="primary=3 names none of the 2 objectives"):
        PCD(primary=3)(torch.eye(2))
    with pytest.raises(ValueError, match="one number per secondary objective, 2, but got 3"):
        PCD(tau=[0.1, 0.1, 0.1])(torch.eye(3))
    assert_close(PCD(primary=-1)(torch.eye(3).double()), PCD(primary=2)(torch.eye(3).double()))
