import pytest
import torch
from jacobians import random
from torch.testing import assert_close

from mogb.aggregators.mgda import MGDA
from mogb.aggregators.rlw import RLW
from mogb.aggregators.upgrad import UPGrad
from mogb.wrappers.normalized import Normalized
from mogb.wrappers.refreshed import Refreshed
from mogb.wrappers.silenced import Silenced


def gramians(count, size=3):
    for step in range(count):
        jacobian = random(size, 6, seed=step, conflict=0.5)
        yield jacobian @ jacobian.mT


def test_weights_are_those_of_every_nth_step():
    agg, solved = Refreshed(UPGrad(), every=3), None
    for step, gramian in enumerate(gramians(8)):
        if step % 3 == 0:
            solved = UPGrad().weights(gramian)
        solution = agg.solve(gramian)
        assert_close(torch.from_numpy(solution.weights), solved)
        assert solution.note == ("" if step % 3 == 0 else "weights reused")


def test_every_step_is_the_method_itself():
    agg = Refreshed(MGDA(), every=1)
    for gramian in gramians(3):
        assert_close(agg.weights(gramian), MGDA().weights(gramian))


def test_a_method_that_draws_is_asked_only_when_it_solves():
    agg, plain = Refreshed(RLW(seed=4), every=2), RLW(seed=4)
    losses = torch.ones(3)
    drawn = [agg.weights(losses=losses) for _ in range(6)]
    for step in range(0, 6, 2):
        expected = plain.weights(losses=losses)
        assert torch.equal(drawn[step], expected)
        assert torch.equal(drawn[step + 1], expected)


def test_inside_a_normalization_the_weights_on_unit_gradients_are_kept():
    agg = Normalized(Refreshed(MGDA(), every=2))
    first, second = random(3, 6, seed=1), random(3, 6, seed=2, spread=2.0)
    agg(first)
    unit_weights = MGDA(normalization="l2", apply_to="raw").weights(first @ first.mT)
    units = second / second.norm(dim=1, keepdim=True)
    assert_close(agg(second), unit_weights @ units)


def test_an_objective_that_falls_silent_in_between_gets_no_weight():
    agg = Normalized(Refreshed(MGDA(), every=5))
    agg(torch.eye(3))
    solution = agg.solve(torch.diag(torch.tensor([1.0, 0.0, 1.0])))
    assert solution.left_out == (1,)
    assert_close(torch.from_numpy(solution.weights), torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64))


def test_an_objective_that_was_left_out_waits_for_the_next_solve():
    agg = Refreshed(Silenced(MGDA()), every=2)
    agg.weights(torch.diag(torch.tensor([1.0, 0.0])))
    solution = agg.solve(torch.eye(2))
    assert solution.weights.tolist() == [1, 0]
    assert solution.left_out == (1,)
    assert agg.weights(torch.eye(2)).tolist() == [0.5, 0.5]


def test_another_number_of_objectives_needs_a_reset():
    agg = Refreshed(MGDA())
    agg(torch.eye(3))
    with pytest.raises(ValueError, match=r"for 3 objectives, but this step has 2: call reset\(\)"):
        agg(torch.eye(2))


@pytest.mark.usefixtures("unchecked")
def test_impossible_periods_are_refused():
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match=r"every must be a (positive integer|whole number)"):
            Refreshed(MGDA(), every=bad)
