"""CR-MOGM: its average by hand, any method inside, state."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import mogb
from mogb.aggregators.cr_mogm import CRMOGM
from mogb.aggregators.upgrad import UPGrad
from mogb.base import Promise
from mogb.wrappers.smoothed import Smoothed


def steps(count):
    for seed in range(count):
        rows = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        yield rows - 0.7 * rows.mean(dim=0)


@pytest.mark.parametrize("name", ["upgrad", "mgda", "cagrad", "imtl_g"])
def test_the_weights_are_averaged(name):
    method, inner = CRMOGM(weighting=name, alpha=0.6), mogb.make(name)
    average = None
    for rows in steps(6):
        fresh = inner.weights(rows @ rows.mT)
        average = fresh if average is None else 0.6 * average + 0.4 * fresh
        assert_close(method.weights(rows @ rows.mT), average)


def test_the_defaults_are_upgrad_and_nine_tenths():
    method, wrapped = CRMOGM(), Smoothed(UPGrad(), decay=0.9)
    for rows in steps(4):
        assert torch.equal(method(rows), wrapped(rows))
    assert method == CRMOGM(weighting=UPGrad())


def test_averaging_gives_up_what_only_each_solution_keeps():
    assert Promise.NON_CONFLICTING not in CRMOGM(weighting="mgda").keeps
    assert Promise.SIMPLEX_WEIGHTS in CRMOGM(weighting="mgda").keeps
    opposite = torch.tensor([[1.0, 0.0], [-0.5, 1.0]]).double()
    method = CRMOGM(weighting="mgda")
    method(torch.tensor([[0.01, 0.0], [0.0, 9.0]]).double())  # all weight on objective 0, and it lasts
    assert (opposite @ method(opposite)).min() < 0


def test_methods_that_read_losses_get_them():
    method = CRMOGM(weighting="gradnorm", alpha=0.5)
    assert method.reads == "gramian+losses"
    inner = mogb.make("gradnorm")
    gramian, losses = torch.diag(torch.tensor([1.0, 9.0])).double(), torch.tensor([1.0, 2.0]).double()
    first, second = inner.weights(gramian, losses), inner.weights(gramian, losses)
    method.weights(gramian, losses)
    assert_close(method.weights(gramian, losses), (first + second) / 2)


def test_state_resumes_to_the_bit_with_that_of_the_method_inside():
    def fresh():
        return CRMOGM(weighting=mogb.make("gradvac", seed=4), alpha=0.8)

    everything = list(steps(8))
    whole, first, second = fresh(), fresh(), fresh()
    expected = [whole(rows) for rows in everything]
    for rows in everything[:4]:
        first(rows)
    saved = first.state_dict()
    assert sorted(saved) == ["inner.average", "inner.inner.generator", "inner.inner.targets"]
    second.load_state_dict(saved)
    assert all(torch.equal(second(rows), wanted) for rows, wanted in zip(everything[4:], expected[4:], strict=True))
    whole.reset()
    assert torch.equal(whole(everything[0]), expected[0])


def test_an_objective_that_sits_out_keeps_its_average():
    method, live = CRMOGM(weighting="mgda", alpha=0.5), np.array([True, False, True])
    rows = next(steps(1))
    gramian = (rows @ rows.mT).numpy()
    before = method._solve_live(gramian, np.ones(3), np.ones(3, dtype=bool)).weights
    assert method._solve_live(gramian, np.ones(3), live).weights[1] == 0
    assert method.state_dict()["inner.average"][1] == pytest.approx(before[1])


def test_refusals():
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\), but got 1.0"):
        CRMOGM(alpha=1.0)
    with pytest.raises(ValueError, match="Unknown aggregator 'mgdaa'"):
        CRMOGM(weighting="mgdaa")
    with pytest.raises(ValueError, match="'graddrop' reads the whole Jacobian"):
        CRMOGM(weighting="graddrop")
