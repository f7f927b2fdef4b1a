"""Fonseca-Fleming, against the published code and its front in closed form."""

import json
import pathlib

import pytest
import torch
from torch.testing import assert_close

from mogb.problems.fonseca import Fonseca

CASES = json.loads((pathlib.Path(__file__).parents[2] / "cases" / "problems.json").read_text())["fonseca"]["points"]


@pytest.mark.parametrize("point", CASES)
def test_values_and_gradients_are_those_of_the_published_code(point):
    losses, rows = Fonseca().jacobian(torch.tensor([point["x"]], dtype=torch.float64))
    assert_close(losses[0], torch.tensor(point["f"], dtype=torch.float64), rtol=1e-12, atol=1e-15)
    assert_close(rows[0], torch.tensor(point["df"], dtype=torch.float64), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("size", [1, 2, 20])
def test_the_front_has_its_closed_form_for_every_size(size):
    f1, f2 = Fonseca(size=size).pareto_front(101).unbind(1)
    expected = 1 - torch.exp(-((2 - (-torch.log1p(-f1)).clamp(min=0).sqrt()) ** 2))
    assert_close(f2, expected, rtol=0, atol=1e-7)  # the root loses half of the digits near f1 = 0
    assert_close(Fonseca(size=size).true_hypervolume, 0.3421155931, rtol=0, atol=5e-11)


def test_fewer_coordinates_start_at_the_same_mean_norm():
    small, large = Fonseca(size=2), Fonseca()
    norms = [
        problem.sample_starts(4000, torch.Generator().manual_seed(0)).square().sum(1).mean()
        for problem in (small, large)
    ]
    assert norms[0] == pytest.approx(20 / 12, rel=0.05)
    assert norms[1] == pytest.approx(20 / 12, rel=0.05)


def test_a_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="size must be at least 1, but got 0"):
        Fonseca(size=0)
