import pytest
import torch
from jacobians import random
from torch.testing import assert_close

import mogb
from mogb.aggregators.fairgrad import FairGrad
from mogb.aggregators.nash_mtl import NashMTL


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_it_is_the_fixed_point(size, alpha):
    jacobian = random(size, 60, conflict=0.7, spread=2.0)
    gramian = jacobian @ jacobian.mT
    weights = FairGrad(alpha=alpha).weights(gramian)
    assert weights.min() > 0
    assert_close(gramian @ weights, weights ** (-1 / alpha), rtol=1e-8, atol=0)


def test_alpha_one_is_the_nash_bargain():
    gramian = random(5, 30, spread=2.0) @ random(5, 30, spread=2.0).mT
    assert_close(FairGrad(alpha=1.0).weights(gramian), NashMTL(max_norm=0.0).weights(gramian))


def test_orthogonal_gradients_by_hand():
    # s w = w^(-1/alpha): w = s^(-alpha / (alpha + 1)).
    squares = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    for alpha in (0.5, 1.0, 3.0):
        assert_close(FairGrad(alpha=alpha).weights(torch.diag(squares)), squares ** (-alpha / (alpha + 1)))


def test_a_large_alpha_makes_the_gains_equal():
    jacobian = random(4, 12, conflict=0.5)
    gains = jacobian @ FairGrad(alpha=200.0)(jacobian)
    assert gains.max() / gains.min() < 1.05
    ordinary = jacobian @ FairGrad(alpha=1.0)(jacobian)
    assert ordinary.max() / ordinary.min() > 1.2


def test_a_small_alpha_is_nearly_the_sum():
    jacobian = random(4, 12)
    direction, total = FairGrad(alpha=0.01)(jacobian), jacobian.sum(dim=0)
    assert direction @ total / direction.norm() / total.norm() > 0.999


def test_the_clip_is_off_by_default():
    jacobian = 1e-3 * random(4, 9)
    raw = FairGrad(alpha=2.0)(jacobian)
    assert_close(FairGrad(alpha=2.0, max_norm=0.1)(jacobian), raw * (0.1 / raw.norm()))


def test_where_no_allocation_exists_the_direction_is_zero_and_flagged():
    jacobian = torch.tensor([[1.0, 1.0], [-2.0, -2.0]], dtype=torch.float64)
    solution = FairGrad(alpha=2.0).solve(jacobian @ jacobian.mT)
    assert "stationary" in solution.note
    assert not solution.weights.any()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_values_of_alpha_are_refused(bad):
    with pytest.raises(ValueError, match="alpha must be positive and finite"):
        FairGrad(alpha=bad)


def test_only_alpha_one_is_scale_free():
    assert mogb.Promise.SCALE_FREE in FairGrad(alpha=1.0).keeps
    assert mogb.Promise.SCALE_FREE not in FairGrad(alpha=2.0).keeps
    jacobian = random(3, 9)
    scaled = jacobian * torch.tensor([[10.0], [1.0], [1.0]], dtype=torch.float64)
    assert_close(FairGrad(alpha=1.0)(scaled), FairGrad(alpha=1.0)(jacobian))
    assert not torch.allclose(FairGrad(alpha=2.0)(scaled), FairGrad(alpha=2.0)(jacobian), rtol=1e-2)


def test_preferences_weight_the_fairness():
    # Orthogonal gradients: |g|^2 w = (p / w)^(1/alpha), so w = (p^(1/alpha) / |g|^2)^(alpha/(1+alpha)), p of mean 1.
    lengths, preference, alpha = torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([1.5, 1.0, 0.5]).double(), 2.0
    weights = FairGrad(alpha=alpha, preference=[3.0, 2.0, 1.0]).weights(torch.diag(lengths**2))
    assert_close(weights, (preference ** (1 / alpha) / lengths**2) ** (alpha / (1 + alpha)))
