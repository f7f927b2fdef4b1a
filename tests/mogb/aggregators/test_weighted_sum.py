import pytest
import torch
from torch.testing import assert_close

import mogb
from mogb.aggregators.weighted_sum import WeightedSum


def test_the_default_is_the_mean():
    jacobian = torch.tensor([[1.0, 2.0], [3.0, -4.0], [2.0, 8.0]])
    assert_close(WeightedSum()(jacobian), torch.tensor([2.0, 2.0]))
    assert_close(WeightedSum()(jacobian), jacobian.mean(dim=0))


def test_given_weights_are_used_as_they_are():
    jacobian = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    assert_close(WeightedSum(weights=[2.0, -0.5])(jacobian), torch.tensor([0.5, 6.0]))


def test_it_needs_the_number_of_losses_but_not_their_values():
    agg = WeightedSum()
    assert agg.reads == "losses"
    assert_close(agg.weights(losses=torch.tensor([5.0, 1.0])), torch.tensor([0.5, 0.5]))
    with pytest.raises(TypeError, match="how many objectives"):
        agg.weights()


@pytest.mark.usefixtures("unchecked")
def test_impossible_weights_are_refused():
    with pytest.raises(ValueError, match="one number per objective, 3, but got 2"):
        WeightedSum(weights=[1.0, 2.0])(torch.eye(3))
    with pytest.raises(ValueError, match="finite numbers"):
        WeightedSum(weights=[1.0, float("nan")])
    with pytest.raises(ValueError, match="finite numbers"):
        WeightedSum(weights=[])


def test_its_repr_can_be_evaluated():
    agg = mogb.make("weighted_sum", weights=[1.0, 2.0])
    assert repr(agg) == "WeightedSum(weights=[1.0, 2.0])"
    assert eval(repr(agg)) == agg
    assert repr(WeightedSum()) == "WeightedSum(weights=None)"


def test_only_the_mean_keeps_the_promises_of_the_class():
    assert WeightedSum().keeps == WeightedSum.promises
    assert mogb.Promise.SIMPLEX_WEIGHTS not in WeightedSum(weights=[1.0, 1.0]).keeps
