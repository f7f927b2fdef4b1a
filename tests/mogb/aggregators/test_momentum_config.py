import numpy as np
import pytest
import torch
from torch.testing import assert_close

import mogb
from mogb.aggregators.momentum_config import MomentumConFIG
from mogb.jacobian import Jacobian

GENERATOR = torch.Generator().manual_seed(0)
STEPS = [torch.randn(3, 7, generator=GENERATOR, dtype=torch.float64) for _ in range(8)]


class Dense:
    """The paper's algorithm on whole vectors, with numpy's pseudo-inverse."""

    def __init__(self, size, length, beta_1, beta_2):
        self.betas = beta_1, beta_2
        self.m, self.counts = np.zeros((size, length)), np.zeros(size)
        self.fake, self.v, self.t = np.zeros(length), np.zeros(length), 0

    def step(self, indices, rows):
        beta_1, beta_2 = self.betas
        for index, row in zip(indices, rows, strict=True):
            self.m[index] = beta_1 * self.m[index] + (1 - beta_1) * row
            self.counts[index] += 1
        if self.counts.min() == 0:
            return np.zeros(self.m.shape[1])
        self.t += 1
        m = self.m / (1 - beta_1**self.counts)[:, None]
        best = np.linalg.pinv(m / np.linalg.norm(m, axis=1, keepdims=True)) @ np.ones(len(m))
        best /= np.linalg.norm(best)
        config = (m @ best).sum() * best
        fake = config * (1 - beta_1**self.t)
        gradient = (fake - beta_1 * self.fake) / (1 - beta_1)
        self.fake, self.v = fake, beta_2 * self.v + (1 - beta_2) * gradient**2
        return config / (np.sqrt(self.v / (1 - beta_2**self.t)) + 1e-8)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)])
def test_full_steps_equal_the_algorithm_on_whole_vectors(betas):
    method, dense = MomentumConFIG(beta_1=betas[0], beta_2=betas[1]), Dense(3, 7, *betas)
    for step in STEPS:
        parts, _, _ = method.direct(Jacobian((step[:, :4].reshape(3, 2, 2), step[:, 4:])), None)
        expected = torch.from_numpy(dense.step(range(3), step.numpy()))
        assert_close(torch.cat([part.reshape(-1) for part in parts]), expected)


def test_one_gradient_at_a_time_equals_the_algorithm():
    method, dense = MomentumConFIG(num_objectives=3), Dense(3, 7, 0.9, 0.999)
    for count, index in enumerate([0, 1, 0, 2, 1, 0, 2, 2]):  # out of turn, too
        row = STEPS[count][index]
        parts = method.direct_one(index, [row[:4].reshape(2, 2), row[4:]])
        expected = torch.from_numpy(dense.step([index], [row.numpy()]))
        assert_close(torch.cat([part.reshape(-1) for part in parts]), expected)
        assert (count < 3) == (expected.abs().sum() == 0)


@pytest.mark.usefixtures("unchecked")  # for speed
def test_the_loop_of_the_docstring_trains():
    torch.manual_seed(0)
    point = torch.tensor([3.0, -2.0], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    method, optimizer = MomentumConFIG(num_objectives=2), torch.optim.SGD([point], lr=0.02)
    for step in range(400):
        index = step % 2
        optimizer.zero_grad()
        (point - targets[index]).square().sum().backward()
        (point.grad,) = method.direct_one(index, [point.grad])
        optimizer.step()
    assert abs(point[1].item()) < 0.1  # the Pareto set is the segment between the targets
    assert abs(point[0].item()) < 1.1


def test_it_resumes_bit_for_bit_in_the_middle_of_a_round():
    def run(method, steps):
        return [method.direct_one(step % 3, [STEPS[step][step % 3]])[0] for step in steps]

    method, other = MomentumConFIG(num_objectives=3), MomentumConFIG(num_objectives=3)
    run(method, range(4))
    other.load_state_dict(method.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(run(method, range(4, 8)), run(other, range(4, 8)), strict=True))


def test_a_bad_gradient_is_named_and_changes_nothing():
    method = MomentumConFIG(num_objectives=3)
    method.direct_one(0, [torch.ones(4)])
    before = method.state_dict()
    with pytest.raises(mogb.NonFiniteError, match="objective 2"):
        method.direct_one(2, [torch.tensor([1.0, float("nan"), 0.0, 0.0])])
    assert all(torch.equal(torch.as_tensor(before[key]), torch.as_tensor(method.state_dict()[key])) for key in before)


def test_the_direction_has_the_dtype_of_the_gradient():
    method = MomentumConFIG(num_objectives=1)
    assert method.direct_one(0, [torch.ones(4, dtype=torch.bfloat16)])[0].dtype == torch.bfloat16
    assert method.state_dict()["moments.0"].dtype == torch.float32


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="num_objectives="):
        MomentumConFIG().direct_one(0, [torch.ones(2)])
    method = MomentumConFIG(num_objectives=2)
    with pytest.raises(ValueError, match=r"index must be in \[0, 1\], but got 2"):
        method.direct_one(2, [torch.ones(2)])
    method.direct_one(0, [torch.ones(2)])
    with pytest.raises(ValueError, match="holds the state of gradients of the shapes"):
        method.direct_one(1, [torch.ones(3)])
    with pytest.raises(ValueError, match="2 objectives, but got 3"):
        method(torch.ones(3, 2))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("options", [{"beta_1": 1.0}, {"beta_2": -0.1}, {"num_objectives": 0}, {"num_objectives": 1.5}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MomentumConFIG(**options)
