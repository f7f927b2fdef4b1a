import pytest
import torch
from jacobians import random
from torch.testing import assert_close

from mogb.aggregators.mgda import MGDA
from mogb.aggregators.nash_mtl import NashMTL
from mogb.aggregators.upgrad import UPGrad
from mogb.aggregators.weighted_sum import WeightedSum
from mogb.wrappers.normalized import Normalized
from mogb.wrappers.rescaled import Rescaled

JACOBIAN = random(4, 9, conflict=0.5, spread=2.0)
NORMS = JACOBIAN.norm(dim=1)


@pytest.mark.parametrize("inner", [MGDA(), UPGrad(), NashMTL()], ids=repr)
@pytest.mark.parametrize(
    ("length", "expected"), [("mean_gradient", JACOBIAN.mean(dim=0).norm()), ("mean_norm", NORMS.mean())]
)
def test_the_direction_gets_the_length_and_keeps_its_orientation(inner, length, expected):
    direction, plain = Rescaled(inner, length=length)(JACOBIAN), inner(JACOBIAN)
    assert_close(direction.norm(), expected)
    assert_close(direction / direction.norm(), plain / plain.norm())


def test_times_mean_norm_multiplies():
    inner = Normalized(MGDA())
    assert_close(Rescaled(inner, length="times_mean_norm")(JACOBIAN), NORMS.mean() * inner(JACOBIAN))


def test_a_cap_only_shortens():
    plain = WeightedSum()(JACOBIAN)
    assert_close(Rescaled(WeightedSum(), length="cap", max_norm=1e6)(JACOBIAN), plain)
    capped = Rescaled(WeightedSum(), length="cap", max_norm=0.25)(JACOBIAN)
    assert_close(capped, plain * (0.25 / plain.norm()))


def test_objectives_that_are_left_out_do_not_count_in_the_means():
    jacobian = torch.cat([JACOBIAN, torch.zeros(2, 9, dtype=torch.float64)])
    for length in ("mean_gradient", "mean_norm", "times_mean_norm"):
        agg = Rescaled(Normalized(MGDA()), length=length)
        assert_close(agg(jacobian), agg(JACOBIAN))


@pytest.mark.parametrize("length", ["mean_gradient", "mean_norm"])
def test_a_direction_that_is_zero_up_to_rounding_is_not_blown_up(length):
    jacobian = torch.tensor([[1.0, 2.0, 0.3], [-3.0, -6.0, -0.9], [0.1, 0.0, 5.0]], dtype=torch.float64)
    assert Rescaled(MGDA(), length=length)(jacobian).norm() < 1e-10
    assert not Rescaled(MGDA(), length=length)(torch.zeros(2, 3)).any()


@pytest.mark.usefixtures("unchecked")
def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="length must be one of mean_gradient, mean_norm, times_mean_norm, cap"):
        Rescaled(MGDA(), length="mean")
    with pytest.raises(ValueError, match="max_norm belongs to length='cap'"):
        Rescaled(MGDA(), max_norm=1.0)
    with pytest.raises(ValueError, match="max_norm belongs to length='cap'"):
        Rescaled(MGDA(), length="cap")
    with pytest.raises(ValueError, match="max_norm must be positive"):
        Rescaled(MGDA(), length="cap", max_norm=0.0)
