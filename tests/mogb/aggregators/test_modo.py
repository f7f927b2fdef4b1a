"""MoDo: its one step by hand, where it ends, what double sampling is for; and the cross-batch Gramian."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mogb.aggregators.modo import MoDo, cross_gramian
from mogb.jacobian import Jacobian
from mogb.solvers.min_norm import solve_min_norm


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_one_step_by_hand():
    # lambda = (1/2, 1/2): G lambda = (4, 1) / 2, plus rho lambda: (2.2, 0.7); times 0.1, and back to the sum 1.
    weights = MoDo(gamma=0.1, rho=0.4).weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]]).double())
    assert_close(weights, torch.tensor([0.5 - 0.22 + 0.145, 0.5 - 0.07 + 0.145]).double())


def test_steps_that_leave_the_simplex_come_back_to_it():
    assert MoDo(gamma=10.0).weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]])).tolist() == [0.0, 1.0]


def test_it_ends_at_the_regularized_min_norm_point():
    rows = torch.randn(4, 6, generator=generator(), dtype=torch.float64)
    gramian = rows @ rows.mT
    method = MoDo(gamma=0.05, rho=1.0)
    for _ in range(400):
        weights = method.weights(gramian)
    exact = solve_min_norm(gramian.numpy() + np.eye(4)).weights
    np.testing.assert_allclose(weights.numpy(), exact, atol=1e-8)


def test_double_sampling_ends_where_the_mean_gradients_do_and_one_batch_does_not():
    means = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]).double()
    noise = torch.tensor([2.0, 0.5]).double()[:, None]  # objective 0 is the noisy one
    draws = generator()

    def batch():
        return means + noise * torch.randn(2, 3, generator=draws, dtype=torch.float64)

    double, single = MoDo(gamma=3e-3, rho=0.0), MoDo(gamma=3e-3, rho=0.0)
    tails = torch.zeros(2, 2).double()
    for step in range(1500):
        first, second = batch(), batch()
        both = torch.stack([double.weights(cross_gramian(first, second)), single.weights(first @ first.mT)])
        if step >= 500:
            tails += both / 1000
    exact = solve_min_norm((means @ means.mT).numpy()).weights  # (0.8, 0.2)
    inflated = solve_min_norm((means @ means.mT + torch.diag(3 * noise.flatten() ** 2)).numpy()).weights
    assert abs(tails[0, 0] - exact[0]) < 0.07
    assert abs(tails[1, 0] - inflated[0]) < 0.07
    assert inflated[0] < 0.3


def test_state_resumes_to_the_bit_and_resets():
    gramians = [
        (rows := torch.randn(3, 5, generator=generator(seed), dtype=torch.float64)) @ rows.mT for seed in range(6)
    ]
    whole = MoDo(gamma=0.1)
    expected = [whole.weights(gramian) for gramian in gramians]
    first = MoDo(gamma=0.1)
    for gramian in gramians[:3]:
        first.weights(gramian)
    second = MoDo(gamma=0.1)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(second.weights(g), e) for g, e in zip(gramians[3:], expected[3:], strict=True))
    whole.reset()
    assert torch.equal(whole.weights(gramians[0]), expected[0])


def test_a_failed_step_leaves_the_state_alone():
    method = MoDo()
    method.weights(torch.eye(2))
    before = method.state_dict()["simplex"]
    with pytest.raises(ValueError, match="objective 1"):
        method.weights(torch.tensor([[1.0, 0.0], [0.0, float("nan")]]))
    assert torch.equal(method.state_dict()["simplex"], before)


def test_an_objective_that_sits_out_keeps_its_share():
    method, alone = MoDo(gamma=0.1), MoDo(gamma=0.1)
    rows = torch.randn(3, 4, generator=generator(), dtype=torch.float64)
    gramian = (rows @ rows.mT).numpy()
    live = np.array([True, False, True])
    solution = method._solve_live(gramian, None, live)
    np.testing.assert_array_equal(solution.weights[live], alone._weights(gramian[live][:, live]).weights)
    assert solution.left_out == (1,)
    state = method.state_dict()["simplex"]
    assert state[1] == pytest.approx(1 / 3)
    assert state.sum() == pytest.approx(1)
    assert method._solve_live(gramian, None, np.zeros(3, dtype=bool)).weights.tolist() == [0.0] * 3


def test_refusals():
    for options in ({"gamma": 0.0}, {"gamma": float("inf")}, {"rho": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            MoDo(**options)
    method = MoDo()
    method.weights(torch.eye(2))
    with pytest.raises(ValueError, match=r"holds the state of 2 objectives, but got 3\. Call reset"):
        method.weights(torch.eye(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_cross_gramian_is_that_of_the_numbers_held(dtype):
    first, second = (
        [torch.randn(3, *shape, generator=generator(seed)).to(dtype) for shape in ((4, 5), (200,), ())]
        for seed in (0, 1)
    )
    exact = sum(a.double().reshape(3, -1) @ b.double().reshape(3, -1).mT for a, b in zip(first, second, strict=True))
    assert_close(cross_gramian(first, Jacobian.of(second)), exact, rtol=1e-12, atol=1e-12)


def test_the_cross_gramian_refuses_gradients_of_different_things():
    with pytest.raises(ValueError, match=r"\[\[2, 3\]\] and \[\[2, 4\]\]"):
        cross_gramian(torch.ones(2, 3), torch.ones(2, 4))
