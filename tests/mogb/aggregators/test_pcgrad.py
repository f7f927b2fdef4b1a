import itertools

import numpy as np
import pytest
import torch
from jacobians import random, zoo
from torch.testing import assert_close

from mogb.aggregators.pcgrad import PCGrad, project


def surgery(jacobian, orders):
    """The algorithm of the paper on the gradients themselves, with the given order for every objective."""
    rows = []
    for i, order in enumerate(orders):
        gradient = jacobian[i].clone()
        for j in order:
            product = gradient @ jacobian[j]
            if j != i and product < 0:
                gradient = gradient - product / (jacobian[j] @ jacobian[j]) * jacobian[j]
        rows.append(gradient)
    return torch.stack(rows).sum(dim=0)


@pytest.mark.parametrize("label", ["two rows", "random 5 in conflict", "opposite rows", "zero row", "spread of 1e6"])
def test_the_gramian_form_equals_the_surgery_on_gradients(label):
    jacobian = zoo()[label]
    size = len(jacobian)
    orders = np.stack([np.random.RandomState(i).permutation(size) for i in range(size)])
    weights = project((jacobian @ jacobian.mT).numpy(), orders.T)
    assert_close(torch.from_numpy(weights) @ jacobian, surgery(jacobian, orders))


def test_nobody_visits_itself():
    # After its visits to the others, the third gradient is (0, 0) - (...): its product with itself is negative.
    jacobian = torch.tensor([[0.0, -1.0], [2.0, -1.0], [-2.0, 3.0]], dtype=torch.float64)
    rows = jacobian[2] - 3 * torch.tensor([0.0, 1.0]) + 4 / 5 * torch.tensor([2.0, -1.0])
    assert rows @ jacobian[2] < 0
    assert_close(PCGrad(order="index")(jacobian), surgery(jacobian, [range(3)] * 3))


def test_two_objectives_by_hand():
    # g1 = (1, 0), g2 = (-1, 1): g1 - (-1/2) g2 = (1/2, 1/2), and g2 - (-1) g1 = (0, 1).
    assert_close(PCGrad()(torch.tensor([[1.0, 0.0], [-1.0, 1.0]])), torch.tensor([0.5, 1.5]))
    assert_close(PCGrad(reduction="mean")(torch.tensor([[1.0, 0.0], [-1.0, 1.0]])), torch.tensor([0.25, 0.75]))


def test_without_conflict_it_is_the_sum():
    jacobian = random(4, 6).abs()
    assert_close(PCGrad()(jacobian), jacobian.sum(dim=0))


def test_two_objectives_end_without_conflict():
    for seed in range(20):
        jacobian = random(2, 3, seed=seed, conflict=0.8)
        assert (jacobian @ PCGrad()(jacobian)).min() >= -1e-12


class TestOrders:
    jacobian = random(3, 4, seed=5, conflict=0.95)

    def outcomes(self):
        """Directions under every combination of orders."""
        ways = list(itertools.permutations(range(3)))
        return [surgery(self.jacobian, orders) for orders in itertools.product(ways, repeat=3)]

    def test_index_visits_in_the_order_of_the_index(self):
        assert_close(PCGrad(order="index")(self.jacobian), surgery(self.jacobian, [range(3)] * 3))

    def test_shared_draws_one_order_for_all(self):
        agg = PCGrad(order="shared")
        allowed = [surgery(self.jacobian, [order] * 3) for order in itertools.permutations(range(3))]
        drawn = [agg(self.jacobian) for _ in range(30)]
        matches = [[torch.allclose(d, other) for other in allowed] for d in drawn]
        assert all(any(row) for row in matches)
        assert len({row.index(True) for row in matches}) > 2

    def test_per_task_draws_one_for_each_and_reaches_all(self):
        agg = PCGrad(order="per-task", seed=3)
        distinct = []
        for outcome in self.outcomes():
            if not any(torch.allclose(outcome, other) for other in distinct):
                distinct.append(outcome)
        drawn = [agg(self.jacobian) for _ in range(300)]
        assert all(any(torch.allclose(d, other) for other in distinct) for d in drawn)
        assert all(any(torch.allclose(d, other) for d in drawn) for other in distinct)

    def test_the_seed_decides(self):
        jacobian = random(6, 9, conflict=0.95)
        first, again, other = (PCGrad(seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first(jacobian), again(jacobian))
        assert not torch.equal(first(jacobian), other(jacobian))


def test_a_row_whose_square_vanishes_in_float32_is_no_division_by_zero():
    direction = PCGrad()(torch.tensor([[1.0, 0.0], [-1e-25, 0.0]]))
    assert direction.isfinite().all()
    assert_close(PCGrad()(torch.tensor([[1.0, 0.0], [0.0, 0.0]])), torch.tensor([1.0, 0.0]))
