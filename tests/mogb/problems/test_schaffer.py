"""Schaffer's parabolas, by hand."""

import torch
from torch.testing import assert_close

from mogb.problems.schaffer import Schaffer


def test_values_front_and_hypervolume():
    problem = Schaffer()
    assert_close(problem.losses(torch.tensor([[3.0]], dtype=torch.float64)), torch.tensor([[9.0, 1.0]]).double())
    assert_close(problem.pareto_front(50).sqrt().sum(1), torch.full((50,), 2.0, dtype=torch.float64))
    assert problem.true_hypervolume == 40 / 3
