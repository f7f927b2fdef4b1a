"""GradNorm: against autograd and torch's own Adam, step after step; rates, starts, what sits out."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mogb.aggregators.gradnorm import GradNorm


def problem(steps, size=3, seed=0):
    """Gradients and positive losses that fall at different rates."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-1, 1, size, dtype=torch.float64)
    for step in range(steps):
        rows = torch.randn(size, 6, generator=generator, dtype=torch.float64) * scales[:, None]
        noise = 1 + 0.1 * torch.rand(size, generator=generator, dtype=torch.float64)
        yield rows @ rows.mT, noise * torch.exp(-step * torch.linspace(0.01, 0.2, size, dtype=torch.float64)) * scales


class ByAutograd:
    """The objective of the paper in the form of LibMTL, minimized by torch."""

    def __init__(self, size, alpha, lr):
        self.logits = torch.zeros(size, dtype=torch.float64, requires_grad=True)
        self.optimizer, self.alpha, self.initial = torch.optim.Adam([self.logits], lr=lr), alpha, None

    def __call__(self, gramian, losses):
        self.initial = losses if self.initial is None else self.initial
        weights = len(losses) * torch.softmax(self.logits, dim=0)
        norms = gramian.diagonal().sqrt()
        lengths = weights * norms / norms.mean()
        rates = losses / self.initial
        target = (lengths.mean() * (rates / rates.mean()) ** self.alpha).detach()
        self.optimizer.zero_grad()
        (lengths - target).abs().sum().backward()
        self.optimizer.step()
        return weights.detach()


@pytest.mark.parametrize("alpha", [0.0, 1.5])
@pytest.mark.parametrize("lr", [0.025, 0.3])
def test_it_is_what_autograd_and_adam_do(alpha, lr):
    method, independent = GradNorm(alpha=alpha, lr=lr), ByAutograd(3, alpha, lr)
    for gramian, losses in problem(40):
        weights = method.weights(gramian, losses)
        assert_close(weights, independent(gramian, losses), rtol=1e-9, atol=1e-12)
        assert weights.min() > 0
        assert weights.sum() == pytest.approx(3)
    assert weights.max() / weights.min() > 2


def test_without_restoring_force_the_weighted_norms_become_equal():
    gramian = torch.diag(torch.tensor([1.0, 16.0, 100.0])).double()
    method = GradNorm(alpha=0.0, lr=0.03)
    for _ in range(400):
        weights = method.weights(gramian, torch.ones(3))
    lengths = weights * gramian.diagonal().sqrt()
    assert_close(lengths / lengths.mean(), torch.ones(3).double(), rtol=0, atol=0.15)


def test_slow_objectives_gain_weight():
    method = GradNorm()
    for step in range(100):
        weights = method.weights(torch.eye(2).double(), torch.tensor([0.97**step, 1.0]).double())
    assert weights[1] > 1.5 * weights[0]


def test_the_scale_of_all_gradients_does_not_matter():
    one, other = GradNorm(), GradNorm()
    for gramian, losses in problem(10):
        assert_close(one.weights(gramian, losses), other.weights(1e-20 * gramian, losses))


def test_initial_losses_can_be_given():
    given, seen = GradNorm(initial_losses=[2.0, 1.0]), GradNorm()
    gramian = torch.eye(2).double()
    seen.weights(gramian, torch.tensor([2.0, 1.0]).double())
    for _ in range(2):
        given.weights(gramian, torch.tensor([1.0, 1.0]).double())
        seen.weights(gramian, torch.tensor([1.0, 1.0]).double())
    assert torch.equal(given.state_dict()["initial"], seen.state_dict()["initial"])
    # rates 1/2 and 1: objective 1 is slower, and its weight has grown
    weights = given.weights(gramian, torch.tensor([1.0, 1.0]).double())
    assert weights[1] > weights[0]


def test_zero_gradients_teach_nothing():
    method = GradNorm()
    for _ in range(3):
        assert_close(method.weights(torch.zeros(2, 2), torch.tensor([1.0, 2.0])), torch.ones(2))


def test_state_resumes_to_the_bit():
    steps = list(problem(12))
    whole, first, second = GradNorm(), GradNorm(), GradNorm()
    expected = [whole.weights(*step) for step in steps]
    for step in steps[:5]:
        first.weights(*step)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(second.weights(*s), e) for s, e in zip(steps[5:], expected[5:], strict=True))


def test_an_objective_that_sits_out_keeps_its_weight():
    live = np.array([True, False, True])
    method, other = GradNorm(), GradNorm()
    for gramian, losses in problem(6):
        gramian, losses = gramian.numpy(), losses.numpy()
        solution = method._solve_live(gramian, losses, live)
        alone = other._weights(gramian[live][:, live], losses[live])
        np.testing.assert_allclose(solution.weights[live], alone.weights)
        assert solution.left_out == (1,)
    state = method.state_dict()
    assert state["logits"][1] == 0
    assert state["calls"].tolist() == [6.0, 0.0, 6.0]
    assert method._solve_live(gramian, losses, np.zeros(3, dtype=bool)).left_out == (0, 1, 2)


def test_refusals_leave_the_state_alone():
    method = GradNorm()
    method.weights(torch.eye(2), torch.tensor([1.0, 2.0]))
    before = method.state_dict()
    with pytest.raises(ValueError, match=r"loss of objective 1 is -0.5"):
        method.weights(torch.eye(2), torch.tensor([1.0, -0.5]))
    with pytest.raises(ValueError, match="state of 2 objectives, but got 3"):
        method.weights(torch.eye(3), torch.ones(3))
    after = method.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    for options in ({"alpha": -1.0}, {"lr": 0.0}, {"initial_losses": [1.0, 0.0]}):
        with pytest.raises(ValueError, match=next(iter(options))):
            GradNorm(**options)
    with pytest.raises(ValueError, match=r"initial_losses must have one number per objective, 3"):
        GradNorm(initial_losses=[1.0, 2.0]).weights(torch.eye(3), torch.ones(3))
