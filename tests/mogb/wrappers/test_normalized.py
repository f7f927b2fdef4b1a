import pytest
import torch
from jacobians import random
from torch.testing import assert_close

from mogb.aggregators.cagrad import CAGrad
from mogb.aggregators.mgda import MGDA
from mogb.aggregators.upgrad import UPGrad
from mogb.aggregators.weighted_sum import WeightedSum
from mogb.wrappers.normalized import Normalized


@pytest.mark.parametrize("inner", [MGDA(), UPGrad(), CAGrad(), WeightedSum()], ids=repr)
def test_the_method_inside_sees_unit_gradients(inner):
    jacobian = random(4, 9, conflict=0.5, spread=4.0)
    units = jacobian / jacobian.norm(dim=1, keepdim=True)
    assert_close(Normalized(inner)(jacobian), inner(units))


def test_the_weights_are_those_of_the_raw_gradients():
    jacobian = torch.tensor([[3.0, 4.0], [-0.5, 0.0]], dtype=torch.float64)
    solution = Normalized(WeightedSum()).solve(jacobian @ jacobian.mT)
    assert_close(torch.from_numpy(solution.weights), torch.tensor([0.1, 1.0], dtype=torch.float64))
    assert_close(torch.from_numpy(solution.details["unit"]), torch.tensor([0.5, 0.5], dtype=torch.float64))


def test_zero_gradients_are_left_out():
    jacobian = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 5.0]])
    solution = Normalized(MGDA()).solve(jacobian @ jacobian.mT)
    assert solution.left_out == (1,)
    assert_close(Normalized(MGDA())(jacobian), torch.tensor([0.5, 0.5]))


def test_options_per_objective_keep_their_place():
    jacobian = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 5.0]])
    assert_close(Normalized(WeightedSum(weights=[1.0, 10.0, 100.0]))(jacobian), torch.tensor([1.0, 100.0]))
    assert_close(Normalized(UPGrad(preference=[1.0, 10.0, 100.0]))(jacobian), torch.tensor([1.0, 100.0]))


def test_it_reads_the_gramian_whatever_is_inside():
    assert Normalized(WeightedSum()).reads == "gramian"
    assert Normalized(MGDA(normalization="loss")).reads == "gramian+losses"


def test_norms_of_any_size_pass_through():
    jacobian = random(3, 5) * torch.tensor([[1e-100], [1.0], [1e100]], dtype=torch.float64)
    units = jacobian / jacobian.norm(dim=1, keepdim=True)
    assert_close(Normalized(WeightedSum())(jacobian), units.mean(dim=0))
