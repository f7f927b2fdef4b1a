"""The official answers are in test_parity_losses.py."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mogb.aggregators.mgda import MGDA
from mogb.aggregators.moco import MoCo
from mogb.jacobian import Jacobian
from mogb.solvers.simplex import project_on_simplex

GENERATOR = torch.Generator().manual_seed(0)
STEPS = [torch.randn(3, 7, generator=GENERATOR, dtype=torch.float64) for _ in range(6)]
LOSSES = torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64)


def dense(steps, losses, *, beta, gamma, rho, simplex):
    """The formula on whole matrices, in numpy; losses None keeps the raw gradients."""
    y, weights = np.zeros(steps[0].shape), np.full(len(steps[0]), 1 / len(steps[0]))
    for count, step in enumerate(steps, 1):
        rows = step.numpy()
        if losses is not None:
            rows = rows / np.linalg.norm(rows, axis=1, keepdims=True) * losses.numpy()[:, None]
        y = y - beta / np.sqrt(count) * (y - rows)
        weights = weights - gamma / np.sqrt(count) * (y @ y.T + rho * np.eye(len(y))) @ weights
        weights = project_on_simplex(weights) if simplex else np.exp(weights) / np.exp(weights).sum()
        yield torch.from_numpy(y.T @ weights)


@pytest.mark.parametrize("simplex", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_six_steps_equal_the_formula_on_whole_matrices(simplex, normalized):
    options = {"beta": 0.7, "gamma": 0.3, "rho": 0.2}
    method = MoCo(**options, projection="simplex" if simplex else "softmax", normalized=normalized)
    assert method.needs_losses == normalized
    expected = dense(STEPS, LOSSES if normalized else None, **options, simplex=simplex)
    for step, direction in zip(STEPS, expected, strict=True):
        blocks = Jacobian((step[:, :4].reshape(3, 2, 2), step[:, 4:]))
        parts, _, _ = method.direct(blocks, LOSSES.numpy())
        assert_close(torch.cat([part.reshape(-1) for part in parts]), direction)


@pytest.mark.usefixtures("unchecked")  # for speed
def test_the_paper_s_form_on_one_matrix_walks_to_the_min_norm_point():
    jacobian = STEPS[0]
    method = MoCo(beta=1.0, beta_sigma=0.0, gamma=0.1, gamma_sigma=0.0, projection="simplex", normalized=False)
    for _ in range(400):
        direction = method(jacobian)
    assert_close(direction, MGDA()(jacobian), atol=1e-6, rtol=0)


@pytest.mark.usefixtures("unchecked")  # for speed
def test_averages_of_half_precision_gradients_move():
    method = MoCo(beta=1e-3, beta_sigma=0.0, normalized=False)
    rows = torch.ones(2, 3, dtype=torch.bfloat16)
    for _ in range(200):  # in bfloat16 the average would stop at a few per cent
        direction = method(rows)
    assert direction.dtype == torch.bfloat16
    assert direction[0].item() == pytest.approx(1 - (1 - 1e-3) ** 200, rel=0.01)


def test_other_gradients_than_before_are_refused():
    method = MoCo()
    method(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match=r"holds the state of gradients of the shapes \[2, 3\], but got \[2, 4\]"):
        method(torch.ones(2, 4), torch.ones(2))
    with pytest.raises(ValueError, match="2 objectives, but got 3"):
        method(torch.ones(3, 3), torch.ones(3))


def test_a_negative_loss_would_turn_a_gradient_round():
    with pytest.raises(ValueError, match=r"objective 1 is -1.*normalized=False"):
        MoCo()(torch.eye(2), torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize(
    "options",
    [{"beta": 0.0}, {"beta": 1.5}, {"gamma": -1.0}, {"rho": float("inf")}, {"beta_sigma": -1.0}, {"gamma_sigma": -0.1}],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MoCo(**options)
