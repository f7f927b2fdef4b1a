import pytest
import torch
from jacobians import random
from torch.testing import assert_close

from mogb.aggregators.cagrad import CAGrad
from mogb.aggregators.mgda import MGDA
from mogb.aggregators.weighted_sum import WeightedSum
from mogb.wrappers.logarithmic import Logarithmic

LOSSES = torch.tensor([0.5, 2.0, 30.0], dtype=torch.float64)


@pytest.mark.parametrize("inner", [MGDA(), CAGrad(), WeightedSum()], ids=repr)
def test_the_method_inside_sees_the_gradients_of_the_logarithms(inner):
    jacobian = random(3, 9, conflict=0.5)
    assert_close(Logarithmic(inner)(jacobian, LOSSES), inner(jacobian / LOSSES[:, None]))


def test_with_ones_inside_it_is_the_gradient_of_the_log_of_the_product():
    point = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    losses = torch.stack([point.square().sum() + 1, (point - 2).square().sum(), point.exp().sum()])
    expected = torch.autograd.grad(losses.prod().log(), point, retain_graph=True)[0]
    jacobian = torch.stack([torch.autograd.grad(loss, point, retain_graph=True)[0] for loss in losses])
    assert_close(Logarithmic(WeightedSum(weights=[1.0, 1.0, 1.0]))(jacobian, losses.detach()), expected)


def test_a_method_inside_that_reads_losses_gets_their_logarithms():
    jacobian = random(3, 9)
    agg = Logarithmic(MGDA(normalization="loss"))
    losses = LOSSES + 1  # logarithms must be positive here
    expected = MGDA(normalization="loss")(jacobian / losses[:, None], losses.log())
    assert_close(agg(jacobian, losses), expected)


def test_it_reads_the_losses_whatever_is_inside():
    assert Logarithmic(WeightedSum()).reads == "losses"
    assert Logarithmic(MGDA()).reads == "gramian+losses"
    with pytest.raises(TypeError, match="pass losses"):
        Logarithmic(WeightedSum())(torch.eye(2))


def test_losses_must_be_positive():
    with pytest.raises(ValueError, match=r"losses\[2\] = -1: shift that loss"):
        Logarithmic(MGDA())(torch.eye(3), torch.tensor([1.0, 2.0, -1.0]))
