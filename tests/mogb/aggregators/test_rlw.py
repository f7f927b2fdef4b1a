import torch
from torch.testing import assert_close

from mogb.aggregators.rlw import RLW


def test_it_is_the_softmax_of_the_draws_of_its_seed():
    agg = RLW(seed=7)
    torch.manual_seed(7)
    for _ in range(3):
        expected = torch.randn(4).softmax(dim=0)
        assert_close(agg.weights(losses=torch.ones(4)), expected)


def test_the_losses_do_not_matter_and_the_draws_differ_from_step_to_step():
    first, second = RLW(), RLW()
    assert_close(first.weights(losses=torch.tensor([1.0, 2.0])), second.weights(losses=torch.tensor([9.0, -2.0])))
    assert not torch.equal(first.weights(losses=torch.ones(2)), first.weights(losses=torch.ones(2)))


def test_on_average_it_is_the_mean():
    agg = RLW(seed=1)
    mean = torch.stack([agg.weights(losses=torch.ones(3, dtype=torch.float64)) for _ in range(4000)]).mean(dim=0)
    # The standard deviation of one weight is 0.19, that of the mean 0.003.
    assert_close(mean, torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=0.012)
