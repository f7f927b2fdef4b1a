"""The official answers are in test_parity_losses.py."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import mogb
from mogb.aggregators.db_mtl import DBMTL
from mogb.jacobian import Jacobian

GENERATOR = torch.Generator().manual_seed(0)
STEPS = [torch.randn(3, 7, generator=GENERATOR, dtype=torch.float64) for _ in range(6)]
LOSSES = torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64)


def test_six_steps_equal_the_formula_on_whole_matrices():
    method, average = DBMTL(beta=0.8, beta_sigma=0.3), np.zeros((3, 7))
    for count, step in enumerate(STEPS, 1):
        losses = LOSSES * count
        share = 0.8 / count**0.3
        average = share * average + (1 - share) * step.numpy() / losses.numpy()[:, None]
        norms = np.linalg.norm(average, axis=1, keepdims=True)
        expected = (norms.max() * average / norms).sum(0)
        parts, _, _ = method.direct(Jacobian((step[:, :4].reshape(3, 2, 2), step[:, 4:])), losses.numpy())
        assert_close(torch.cat([part.reshape(-1) for part in parts]), torch.from_numpy(expected))


def test_without_momentum_the_gramian_is_enough():
    method = DBMTL(beta=0.0)
    assert method.reads == "gramian+losses"
    assert method.yields_weights
    direction = method(STEPS[0], LOSSES)
    assert_close(method.weights(STEPS[0] @ STEPS[0].mT, LOSSES) @ STEPS[0], direction)
    rows = STEPS[0] / LOSSES[:, None]
    units = rows / rows.norm(dim=1, keepdim=True)
    assert_close(direction, rows.norm(dim=1).max() * units.sum(0))
    assert method.state_dict() == {"steps": 0}


def test_without_momentum_it_can_be_amortised():
    point = torch.ones(2, dtype=torch.float64, requires_grad=True)
    balancer = mogb.Balancer(DBMTL(beta=0.0), [point], refresh_every=2)
    for passes in (2, 1):
        losses = torch.stack([point.square().sum(), (point - 3).square().sum()])
        assert balancer.backward(losses).backward_passes == passes


def test_with_momentum_it_yields_no_weights():
    with pytest.raises(TypeError, match="yields no weights"):
        DBMTL().weights(torch.eye(2), torch.ones(2))


def test_zero_gradients_are_left_out():
    solution = DBMTL(beta=0.0).solve(torch.diag(torch.tensor([0.0, 4.0])), torch.tensor([1.0, 2.0]))
    assert solution.left_out == (0,)
    assert solution.weights.tolist() == [0.0, 0.5]
    assert DBMTL()(torch.zeros(2, 3), torch.ones(2)).tolist() == [0.0, 0.0, 0.0]


def test_scales_do_not_matter_at_any_step():
    scale = torch.tensor([1e-6, 1.0, 1e5], dtype=torch.float64)
    method, other = DBMTL(), DBMTL()
    for step in STEPS:
        assert_close(other(scale[:, None] * step, scale * LOSSES), method(step, LOSSES))


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_losses_must_be_positive(beta):
    with pytest.raises(ValueError, match="'db_mtl' needs losses above 0, but the loss of objective 1 is 0"):
        DBMTL(beta=beta)(torch.eye(2), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("options", [{"beta": 1.0}, {"beta": -0.1}, {"beta_sigma": -1.0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DBMTL(**options)
