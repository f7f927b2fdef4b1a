import pytest
import torch
from jacobians import random
from torch.testing import assert_close

import mogb
from mogb.aggregators.cagrad import CAGrad
from mogb.aggregators.mgda import MGDA
from mogb.aggregators.upgrad import UPGrad
from mogb.aggregators.weighted_sum import WeightedSum
from mogb.wrappers.silenced import Silenced


def with_silence(norms):
    """Two ordinary rows, and one more of each norm."""
    jacobian = random(2 + len(norms), 8)
    jacobian[2:] *= torch.tensor(norms, dtype=torch.float64)[:, None] / jacobian[2:].norm(dim=1, keepdim=True)
    return jacobian


@pytest.mark.parametrize("inner", [MGDA(), CAGrad(), UPGrad()], ids=repr)
def test_silent_objectives_are_as_if_they_did_not_exist(inner):
    jacobian = with_silence([0.0, 1e-12])
    solution = Silenced(inner).solve(jacobian @ jacobian.mT)
    assert solution.left_out == (2, 3)
    assert solution.weights[2:].tolist() == [0, 0]
    assert_close(Silenced(inner)(jacobian), inner(jacobian[:2]))


def test_without_it_a_silent_objective_swallows_the_whole_weight():
    jacobian = with_silence([1e-12])
    assert MGDA()(jacobian).norm() < 1e-11
    assert Silenced(MGDA())(jacobian).norm() > 0.1


def test_the_tolerance_is_relative_to_the_longest_gradient():
    jacobian = torch.diag(torch.tensor([10.0, 1.0, 0.05], dtype=torch.float64))
    for scale in (1e-9, 1.0, 1e9):
        gramian = (scale * jacobian) @ (scale * jacobian).mT
        assert Silenced(WeightedSum(), tolerance=0.01).solve(gramian).left_out == (2,)
        assert Silenced(WeightedSum(), tolerance=0.2).solve(gramian).left_out == (1, 2)
        assert Silenced(WeightedSum(), tolerance=0.001).solve(gramian).left_out == ()


def test_the_mean_is_taken_over_the_others():
    jacobian = torch.tensor([[2.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    assert_close(Silenced(WeightedSum())(jacobian), torch.tensor([1.0, 2.0]))


def test_a_tolerance_of_zero_keeps_every_promise():
    assert Silenced(MGDA(), tolerance=0.0).keeps == MGDA().keeps
    assert mogb.Promise.NON_CONFLICTING not in Silenced(MGDA()).keeps


def test_all_silent_is_no_direction():
    solution = Silenced(MGDA()).solve(torch.zeros(3, 3))
    assert solution.left_out == (0, 1, 2)
    assert not solution.weights.any()


def test_impossible_tolerances_are_refused():
    for bad in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"tolerance must be in \[0, 1\)"):
            Silenced(MGDA(), tolerance=bad)
