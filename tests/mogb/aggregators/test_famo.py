"""The two phases are tested in test_phases.py, the official sequences in test_parity_losses.py."""

import json
import math
import pathlib

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mogb.aggregators.famo import FAMO
from mogb.problems import make_problem

CASES = pathlib.Path(__file__).parents[2] / "cases"


def official(logits, optimizer, before, after):
    """The update as the paper writes it, with torch's Adam and autograd."""
    delta = before.log() - after.log()
    logits.grad = torch.autograd.grad(torch.softmax(logits, 0), logits, delta)[0]
    optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.001, 0.5])
def test_many_updates_equal_torch_s_adam(weight_decay):
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.025, weight_decay=weight_decay)
    method = FAMO(weight_decay=weight_decay)
    for _ in range(60):
        before, after = (0.1 + torch.rand(2, 4, generator=generator, dtype=torch.float64)).unbind()
        shares = torch.softmax(logits.detach(), 0) / before
        assert_close(method.weights(losses=before), shares / shares.sum(), rtol=1e-12, atol=0)
        method.update(after)
        official(logits, optimizer, before, after)
        assert_close(method.state_dict()["logits"], logits.detach(), rtol=1e-10, atol=1e-14)


def test_the_direction_does_not_see_the_scale_of_a_loss_at_any_step():
    jacobian = torch.tensor([[1.0, 2.0], [-3.0, 1.0]], dtype=torch.float64)
    scale = torch.tensor([1e-9, 1e3], dtype=torch.float64)
    method, scaled = FAMO(), FAMO()
    for step in range(5):
        losses = torch.tensor([0.5, 2.0], dtype=torch.float64) / (1 + step)
        first, second = method(jacobian, losses), scaled(scale[:, None] * jacobian, scale * losses)
        assert_close(first / first.norm(), second / second.norm())
        after = losses * torch.tensor([0.9, 0.99], dtype=torch.float64)
        method.update(after)
        scaled.update(scale * after)


def test_bounds_make_room_for_negative_losses():
    method = FAMO(min_losses=[-3.0, 0.0])
    assert_close(method.weights(losses=torch.tensor([-2.0, 3.0])), torch.tensor([0.75, 0.25]))  # gaps 1 and 3
    assert not method.needs_positive_losses


def test_losses_at_their_bound_are_named_with_a_remedy():
    with pytest.raises(
        ValueError, match=r"losses above -3, but the loss of objective 0 is -3. Lower its bound in min_l"
    ):
        FAMO(min_losses=[-3.0, 0.0]).weights(losses=torch.tensor([-3.0, 3.0]))
    method = FAMO()
    method.weights(losses=torch.ones(2))
    before = method.state_dict()
    with pytest.raises(ValueError, match="objective 1 is 0"):
        method.update(torch.tensor([1.0, 0.0]))
    assert method.state_dict().keys() == before.keys()


def test_the_objective_that_fell_less_gets_more():
    method = FAMO()
    before = method.weights(losses=torch.ones(2))
    method.update(torch.tensor([0.5, 1.0]))
    after = method.weights(losses=torch.ones(2))
    assert after[1] > before[1]


def test_the_value_is_the_weighted_sum_of_the_logarithms():
    losses = torch.tensor([2.0, 0.5, 7.0], dtype=torch.float64)
    value = losses.log().mean() / (1 / losses).mean()
    assert FAMO().solve(losses=losses).value == pytest.approx(value.item())


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # for speed
def test_on_the_valley_it_ends_where_the_published_simulation_does():
    """All five starts of the FAMO paper's toy, scale (0.1, 1), against a reference simulation (toy_outcomes.json)."""
    steps, scale = 50_000, (0.1, 1.0)
    expected = reference_ends(scale)
    problem = make_problem("valley_scaled")
    x = torch.tensor([run["init"] for run in expected], dtype=torch.float64)
    methods = [FAMO(weight_decay=0.0, min_losses=[-21.0 * scale[0], -21.0]) for _ in x]
    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, steps + 1):
        losses, rows = problem.jacobian(x)
        if step > 1:  # as in the official toy: the next step's losses serve as those after the step
            for method, values in zip(methods, losses, strict=True):
                method.update(values)
        solved = np.stack([m._solve(None, v).weights for m, v in zip(methods, losses.numpy(), strict=True)])
        grad = (torch.from_numpy(solved)[:, None] @ rows)[:, 0]
        mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad.square()
        x = x - 1e-3 * mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    found = [round(value, 2) for value in x[:, 0].tolist()]
    assert found == pytest.approx([run["x"][0] for run in expected], abs=0.02), found
    assert math.isfinite(float(x.sum()))


def reference_ends(scale):
    outcomes = json.loads((CASES / "toy_outcomes.json").read_text())["results"]
    (found,) = [one["runs"] for one in outcomes if one["method"] == "FAMO" and tuple(one["scale"]) == scale]
    return found
