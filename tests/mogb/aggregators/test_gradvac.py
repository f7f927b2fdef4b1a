"""GradVac: against the published loop on the gradients themselves, step after step; groups, orders, state."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import mogb
from mogb.aggregators.gradvac import LARGEST_TARGET, GradVac
from mogb.jacobian import Jacobian


def drifting(steps, size=4, columns=9, seed=0):
    """Gradients that change slowly, with norms over two decades, so that the averages matter."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, columns, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-1, 1, size, dtype=torch.float64)[:, None]
    for _ in range(steps):
        rows = 0.7 * rows + 0.7 * torch.randn(size, columns, generator=generator, dtype=torch.float64)
        yield rows * scales


class Published:
    """Algorithm 1 on the vectors, visiting by index."""

    def __init__(self, size, beta):
        self.averages, self.beta = np.zeros((size, size)), beta

    def __call__(self, gradients):
        total = np.zeros(gradients.shape[1])
        for i, changed in enumerate(gradients.copy()):
            for j, other in enumerate(gradients):
                if j == i:
                    continue
                cosine = changed @ other / np.linalg.norm(changed) / np.linalg.norm(other)
                target = self.averages[i, j]
                if cosine < target:
                    length = np.linalg.norm(changed)
                    rise = target * np.sqrt(1 - cosine**2) - cosine * np.sqrt(1 - target**2)
                    changed = changed + length * rise / (np.linalg.norm(other) * np.sqrt(1 - target**2)) * other
                    reached = changed @ other / np.linalg.norm(changed) / np.linalg.norm(other)
                    assert reached == pytest.approx(target, abs=1e-9)  # the point of the formula
                self.averages[i, j] = (1 - self.beta) * target + self.beta * cosine
            total += changed
        return total


@pytest.mark.parametrize("beta", [0.01, 0.5, 1.0])
def test_it_is_the_published_loop(beta):
    method, published = GradVac(beta=beta, order="index"), Published(4, beta)
    for rows in drifting(12):
        assert_close(method(rows), torch.from_numpy(published(rows.numpy())), rtol=1e-9, atol=1e-9)
    assert np.abs(published.averages).max() > 0.01


def test_the_first_step_is_pcgrad_and_later_ones_are_not():
    first, second = drifting(2)
    method = GradVac(order="index", beta=1.0)
    assert_close(method(first), mogb.make("pcgrad", order="index")(first))
    assert not torch.allclose(method(second), mogb.make("pcgrad", order="index")(second))


def test_groups_of_parameters_are_treated_apart():
    method = GradVac(groups="block", order="index")
    apart = [Published(4, 0.5), Published(4, 0.5)]
    for rows in drifting(6):
        blocks = (rows[:, :4].reshape(4, 2, 2), rows[:, 4:])
        direction, gramian, solution = method.direct(Jacobian(blocks), None)
        assert gramian is None
        assert solution is None
        for part, block, published in zip(direction, blocks, apart, strict=True):
            expected = published(block.reshape(4, -1).numpy())
            assert_close(part.reshape(-1), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def test_groups_work_through_an_engine():
    rows = next(drifting(1))
    params = [torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)]
    params.append(torch.zeros(5, dtype=torch.float64, requires_grad=True))
    flat = torch.cat([param.reshape(-1) for param in params])
    report = mogb.backward(rows @ flat, params, GradVac(groups="block", order="index"))
    assert report.weights is None
    assert -1 <= report.min_cosine <= 1
    for param, block in zip(params, (rows[:, :4], rows[:, 4:]), strict=True):
        assert_close(param.grad.reshape(-1), torch.from_numpy(Published(4, 0.5)(block.numpy())))


def test_groups_yield_no_weights():
    method = GradVac(groups="block")
    assert method.reads == "jacobian"
    assert not method.yields_weights
    with pytest.raises(TypeError, match="yields no weights"):
        method.weights(torch.eye(2))
    parameter = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="refresh_every"):
        mogb.Balancer(method, [parameter], refresh_every=2)
    rows = next(drifting(1))
    method.direct(Jacobian((rows, rows)), None)
    with pytest.raises(ValueError, match="state of 2 parameter blocks, but got 1"):
        method.direct(Jacobian((rows,)), None)


@pytest.mark.parametrize("order", ["per-task", "shared"])
def test_random_orders_come_from_the_seed_alone(order):
    def run(seed):
        method = GradVac(order=order, seed=seed)
        return torch.stack([method(rows) for rows in drifting(5)])

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    method = GradVac(order=order)
    first = torch.stack([method(rows) for rows in drifting(5)])
    method.reset()
    assert torch.equal(first, torch.stack([method(rows) for rows in drifting(5)]))


def test_one_shared_order_is_a_permutation_of_all():
    method = GradVac(order="shared", seed=3)
    for _ in range(5):
        orders = method._orders(5)
        merged = next(p for p in orders[0:1])
        for i, order in enumerate(orders):
            assert sorted([*order, i]) == list(range(5))
            assert [j for j in order if j not in (0, i)] == [j for j in merged if j not in (0, i)]


@pytest.mark.parametrize("groups", ["whole", "block"])
def test_state_resumes_to_the_bit(groups):
    def step(method, rows):
        return torch.cat(method.direct(Jacobian((rows[:, :4], rows[:, 4:])), None)[0])

    everything = list(drifting(8))
    whole, first, second = (GradVac(groups=groups) for _ in range(3))
    expected = [step(whole, rows) for rows in everything]
    for rows in everything[:4]:
        step(first, rows)
    second.load_state_dict(first.state_dict())
    for rows, wanted in zip(everything[4:], expected[4:], strict=True):
        assert torch.equal(step(second, rows), wanted)


def test_a_failed_step_draws_and_averages_nothing():
    for groups in ("whole", "block"):
        method, twin = GradVac(groups=groups), GradVac(groups=groups)
        rows = next(drifting(1))
        bad = rows.clone()
        bad[2, 3] = float("nan")
        for each in (method, twin):
            each(rows)
        with pytest.raises(mogb.NonFiniteError, match="objective 2"):
            method(bad)
        assert torch.equal(method(rows), twin(rows))


def test_zero_gradients_are_neither_changed_nor_used():
    rows = next(drifting(1))
    with_zero = torch.cat([rows, torch.zeros(1, 9, dtype=torch.float64)])
    method, other = GradVac(order="index"), GradVac(order="index")
    for _ in range(3):
        assert_close(method(with_zero), other(rows))
    targets = method.state_dict()["targets"]
    assert not targets[0, 4].any()
    assert not targets[0, :, 4].any()


def test_an_objective_that_sits_out_changes_nothing_for_the_others():
    method, other = GradVac(order="index"), GradVac(order="index")
    live = np.array([True, True, False, True])
    for rows in drifting(4):
        gramian = (rows @ rows.mT).numpy()
        solution = method._solve_live(gramian, None, live)
        np.testing.assert_allclose(solution.weights[live], other._solve(gramian[live][:, live], None).weights)
        assert solution.weights[2] == 0
        assert solution.left_out == (2,)


def test_targets_of_one_stay_finite():
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.0]]).double()
    method = GradVac(beta=1.0)
    method(rows)
    assert method.state_dict()["targets"][0, 0, 1] == 1.0
    direction = method(torch.tensor([[1.0, 0.0], [-1.0, 1e-3]]).double())
    assert direction.isfinite().all()
    assert direction.norm() < 4 / np.sqrt(1 - LARGEST_TARGET**2)
    opposite = torch.tensor([[1.0, 0.0], [-3.0, 0.0]]).double()
    assert method(opposite).isfinite().all()


def test_refusals():
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\], but got 1.5"):
        GradVac(beta=1.5)
    for option, value in (("order", "random"), ("groups", "layer")):
        method = GradVac()
        setattr(method, option, value)
        with pytest.raises(ValueError, match=f"{option} must be .* but got '{value}'"):
            method._check()
    method = GradVac()
    method(torch.eye(3))
    with pytest.raises(ValueError, match="state of 3 objectives, but got 2"):
        method(torch.eye(2))
