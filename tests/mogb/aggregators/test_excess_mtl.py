"""The official answers are in test_parity_losses.py."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import mogb
from mogb.aggregators.excess_mtl import ExcessMTL
from mogb.jacobian import Jacobian

GENERATOR = torch.Generator().manual_seed(0)
STEPS = [torch.randn(3, 7, generator=GENERATOR, dtype=torch.float64) for _ in range(6)]


def weights_of(method, jacobian):
    blocks = Jacobian((jacobian[:, :4].reshape(-1, 2, 2), jacobian[:, 4:]))
    parts, _, solution = method.direct(blocks, None)
    assert_close(torch.cat([part.reshape(-1) for part in parts]), torch.from_numpy(solution.weights) @ jacobian)
    return solution.weights


@pytest.mark.parametrize("simplex", [False, True])
@pytest.mark.parametrize("warmup", [1, 3])
def test_six_steps_equal_the_formula_on_whole_matrices(simplex, warmup):
    method = ExcessMTL(step_size=0.5, simplex=simplex, warmup=warmup)
    squares, weights, measured = np.zeros((3, 7)), np.ones(3), []
    for count, step in enumerate(STEPS, 1):
        squares += step.numpy() ** 2
        excess = (step.numpy() ** 2 / np.sqrt(squares + 1e-7)).sum(1)
        if count <= warmup:
            measured.append(excess)
        else:
            weights = weights * np.exp(0.5 * excess / np.mean(measured, axis=0))
        weights = weights / weights.sum() * (1 if simplex else 3)
        assert_close(weights_of(method, step), weights)


def test_the_report_shows_the_weights():
    point = torch.ones(2, dtype=torch.float64, requires_grad=True)
    report = mogb.backward(torch.stack([point.sum(), point[0] * 2]), [point], ExcessMTL())
    assert report.weights.tolist() == [1.0, 1.0]
    assert report.min_cosine > 0


def test_a_gradient_that_was_zero_at_first_takes_its_baseline_later():
    method = ExcessMTL(step_size=1.0)
    for rows in ([[1.0], [0.0]], [[1.0], [0.0]], [[1.0], [3.0]], [[1.0], [3.0]]):
        weights = method.direct(Jacobian.of(torch.tensor(rows).double()), None)[2].weights
        assert np.isfinite(weights).all()
    assert method.state_dict()["baseline"][1] == pytest.approx(3.0)  # 9 / sqrt(9)


def test_rates_without_measure_do_not_overflow():
    method = ExcessMTL(step_size=1e6)
    for _ in range(3):
        solution = method.direct(Jacobian.of(torch.tensor([[1.0], [2.0]]).double()), None)[2]
    assert solution.weights.sum() == pytest.approx(2.0)


def test_what_overflows_is_refused_and_forgotten():
    method = ExcessMTL()
    method(torch.ones(2, 3))
    before = method.state_dict()
    with pytest.raises(mogb.NonFiniteError, match="although every gradient is finite"):
        method(torch.full((2, 3), 1e25))  # its square is not a float32
    after = method.state_dict()
    assert all(torch.equal(torch.as_tensor(before[key]), torch.as_tensor(after[key])) for key in before)


def test_other_gradients_than_before_are_refused():
    method = ExcessMTL()
    method(torch.ones(2, 3))
    with pytest.raises(ValueError, match="holds the state of gradients of the shapes"):
        method(torch.ones(2, 4))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("options", [{"step_size": -1.0}, {"warmup": 0}, {"warmup": 1.5}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ExcessMTL(**options)
