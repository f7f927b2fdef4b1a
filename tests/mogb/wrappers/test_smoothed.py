from dataclasses import dataclass

import numpy as np
import pytest
import torch
from jacobians import random
from torch.testing import assert_close

import mogb
from mogb.aggregators.mgda import MGDA
from mogb.aggregators.upgrad import UPGrad
from mogb.aggregators.weighted_sum import WeightedSum
from mogb.base import GramianAggregator, Solution
from mogb.wrappers.silenced import Silenced
from mogb.wrappers.smoothed import Smoothed


def test_it_is_the_moving_average_of_the_weights():
    agg, expected = Smoothed(UPGrad(), decay=0.8), None
    for step in range(10):
        jacobian = random(4, 7, seed=step, conflict=0.7)
        weights = UPGrad().weights(jacobian @ jacobian.mT)
        expected = weights if expected is None else 0.8 * expected + 0.2 * weights
        assert_close(agg.weights(jacobian @ jacobian.mT), expected)


def test_a_decay_of_zero_changes_nothing():
    agg = Smoothed(MGDA(), decay=0.0)
    for step in range(3):
        jacobian = random(3, 5, seed=step)
        assert_close(agg(jacobian), MGDA()(jacobian))


def test_weights_on_the_simplex_stay_there():
    agg = Smoothed(MGDA())
    for step in range(10):
        jacobian = random(5, 6, seed=step, conflict=0.9)
        weights = agg.weights(jacobian @ jacobian.mT)
        assert weights.min() >= 0
        assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))


class TestLeftOut:
    full = torch.diag(torch.tensor([1.0, 1.0, 4.0], dtype=torch.float64))

    def silent(self):
        gramian = self.full.clone()
        gramian[2, 2] = 0
        return gramian

    def test_an_objective_that_is_left_out_keeps_its_average(self):
        agg = Smoothed(Silenced(WeightedSum(weights=[1.0, 1.0, 3.0])), decay=0.5)
        agg.weights(self.full)
        assert agg.weights(self.silent()).tolist() == [1, 1, 0]
        assert agg.weights(self.full).tolist() == [1, 1, 3]

    def test_simplex_weights_are_shared_among_the_others(self):
        agg = Smoothed(MGDA(ignore_zero=True), decay=0.5)
        first = agg.weights(self.full)
        assert_close(first, torch.tensor([4.0, 4.0, 1.0], dtype=torch.float64) / 9)
        solution = agg.solve(self.silent())
        assert solution.left_out == (2,)
        assert_close(torch.from_numpy(solution.weights), torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64))

    def test_one_that_never_took_part_starts_with_its_first_weight(self):
        agg = Smoothed(Silenced(WeightedSum(weights=[1.0, 1.0, 3.0])), decay=0.5)
        agg.weights(self.silent())
        assert agg.weights(self.full).tolist() == [1, 1, 3]


def test_another_number_of_objectives_needs_a_reset():
    agg = Smoothed(MGDA())
    agg(torch.eye(3))
    with pytest.raises(ValueError, match=r"over 3 objectives, but this step has 2: call reset\(\)"):
        agg(torch.eye(2))
    agg.reset()
    assert agg(torch.eye(2)).isfinite().all()


@dataclass(frozen=True)
class Broken(GramianAggregator):
    """Gives NaN where the first gradient is longer than 2."""

    def _weights(self, gramian):
        return Solution(np.full(len(gramian), np.nan if gramian[0, 0] > 4 else 0.5))


def test_a_weight_that_is_nan_never_enters_the_average():
    agg = Smoothed(Broken())
    agg(torch.eye(2))
    with pytest.raises(mogb.NonFiniteError):
        agg(3 * torch.eye(2))
    assert_close(agg(torch.eye(2)), torch.tensor([0.5, 0.5]))


def test_impossible_decays_are_refused():
    for bad in (1.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
            Smoothed(MGDA(), decay=bad)
