"""The official answers, warm-up included, are in test_parity_losses.py; forgotten epochs in test_phases.py."""

import pytest
import torch
from torch.testing import assert_close

from mogb.aggregators.stch import STCH
from mogb.aggregators.tchebycheff import Tchebycheff

LOSSES = torch.tensor([2.0, 0.5, 1.25], dtype=torch.float64)


def derivatives(function):
    losses = LOSSES.clone().requires_grad_()
    value = function(losses)
    value.backward()
    return value.item(), losses.grad


@pytest.mark.parametrize("mu", [0.01, 1.0, 50.0])
def test_the_plain_form(mu):
    preference, ideal = (torch.tensor(v, dtype=torch.float64) for v in ([0.2, 0.2, 0.6], [0.5, -0.5, 1.0]))
    value, grad = derivatives(lambda losses: mu * (preference * (losses - ideal) / mu).logsumexp(0))
    solution = STCH(mu=mu, preference=[1.0, 1.0, 3.0], ideal=[0.5, -0.5, 1.0]).solve(losses=LOSSES)
    assert_close(torch.from_numpy(solution.weights), grad, rtol=1e-10, atol=1e-15)
    assert solution.value == pytest.approx(value)


@pytest.mark.parametrize("preference", [None, [1.0, 1.0, 4.0]])
def test_the_form_on_log_losses(preference):
    nadir = torch.tensor([4.0, 0.25, 1.0]).double()
    scale = torch.tensor(preference or [1.0, 1.0, 1.0]).double()
    scale = 3 * scale / scale.sum()
    value, grad = derivatives(lambda losses: 3 * 0.5 * (scale * (losses / nadir).log() / 0.5).logsumexp(0))
    solution = STCH(mu=0.5, nadir=[4.0, 0.25, 1.0], preference=preference).solve(losses=LOSSES)
    assert_close(torch.from_numpy(solution.weights), grad)
    assert solution.value == pytest.approx(value)


def test_little_smoothing_is_tchebycheff_and_never_overflows():
    losses = 1e6 * LOSSES
    assert_close(STCH(mu=1e-6).weights(losses=losses), Tchebycheff().weights(losses=losses))


def test_the_warm_up_minimizes_log_losses_and_measures_the_epoch_after_it():
    method = STCH(warmup_epochs=1)
    solution = method.solve(losses=LOSSES)
    assert_close(torch.from_numpy(solution.weights), 1 / LOSSES)
    assert "warm-up" in solution.note
    method.end_epoch()
    method.end_epoch()  # without a step: does not count
    for factor in (1.0, 3.0):
        assert_close(method.weights(losses=factor * LOSSES), 1 / (factor * LOSSES))
    method.end_epoch()
    assert_close(method.state_dict()["measured"], 2 * LOSSES)
    assert_close(method.weights(losses=LOSSES), STCH(nadir=(2 * LOSSES).tolist()).weights(losses=LOSSES))
    method.end_epoch()  # later ones change nothing
    assert_close(method.state_dict()["measured"], 2 * LOSSES)


def test_the_form_on_log_losses_needs_positive_ones():
    for method in (STCH(warmup_epochs=0), STCH(nadir=[1.0, 1.0])):
        assert method.needs_positive_losses
        with pytest.raises(ValueError, match="'stch' needs losses above 0, but the loss of objective 1 is -1"):
            method.weights(losses=torch.tensor([1.0, -1.0]))
    assert STCH().weights(losses=torch.tensor([1.0, -1.0])).isfinite().all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mu": 0.0}, "mu must be positive"),
        ({"nadir": [1.0, 0.0]}, "nadir must hold positive"),
        ({"warmup_epochs": -1}, "warmup_epochs must be a whole number, at least 0"),
        ({"max_epoch_steps": 0}, "max_epoch_steps must be a whole number, at least 1"),
        ({"nadir": [1.0], "warmup_epochs": 1}, "nadir and warmup_epochs exclude each other"),
        ({"nadir": [1.0], "ideal": [1.0]}, "ideal and nadir exclude each other"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        STCH(**options)
