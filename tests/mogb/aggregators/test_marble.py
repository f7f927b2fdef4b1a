import itertools

import pytest
import torch
from jacobians import random
from torch.testing import assert_close

import mogb
from mogb.aggregators.marble import MARBLE
from mogb.aggregators.mgda import MGDA
from mogb.wrappers.normalized import Normalized
from mogb.wrappers.rescaled import Rescaled
from mogb.wrappers.smoothed import Smoothed


def shortest(units):
    """The min-norm point of the hull by trying every face, [K] weights."""
    size, best, best_norm = len(units), None, float("inf")
    for count in range(1, size + 1):
        for face in itertools.combinations(range(size), count):
            rows = units[list(face)]
            system = torch.ones(count + 1, count + 1, dtype=torch.float64)
            system[:count, :count], system[count, count] = rows @ rows.mT, 0
            target = torch.zeros(count + 1, dtype=torch.float64)
            target[count] = 1
            weights = (torch.linalg.pinv(system) @ target)[:count]
            norm = (weights @ rows).norm()
            if weights.min() >= -1e-12 and abs(weights.sum() - 1) < 1e-9 and norm < best_norm - 1e-12:
                best = torch.zeros(size, dtype=torch.float64)
                best[list(face)], best_norm = weights.clamp(min=0), norm
    return best


class DirectMARBLE:
    """Written down from the paper's steps 4 to 6 with the moving average, without any of our parts."""

    def __init__(self, decay):
        self.decay, self.average = decay, None

    def __call__(self, jacobian):
        norms = jacobian.norm(dim=1)
        live = norms > 0
        units = jacobian[live] / norms[live, None]
        alpha = torch.zeros(len(jacobian), dtype=torch.float64)
        alpha[live] = shortest(units)
        if self.average is None:
            self.average = alpha.clone()
        else:
            self.average[live] = self.decay * self.average[live] + (1 - self.decay) * alpha[live]
        used = self.average * live / self.average[live].sum()
        return norms[live].mean() * (used[live] @ units), used


@pytest.mark.parametrize("decay", [0.0, 0.7, 0.9])
def test_it_equals_a_direct_implementation_over_many_steps(decay):
    agg, direct = MARBLE(decay=decay), DirectMARBLE(decay)
    for step in range(12):
        jacobian = random(5, 9, seed=step, conflict=0.8, spread=2.0)
        if step in (4, 5, 9):
            jacobian[step % 5] = 0
        direction, simplex = direct(jacobian)
        copy = MARBLE(decay=decay)
        copy.load_state_dict(agg.state_dict())
        solution = copy.solve(jacobian @ jacobian.mT)
        assert_close(torch.from_numpy(solution.details["simplex"]), simplex, rtol=1e-8, atol=1e-10)
        assert_close(agg(jacobian), direction, rtol=1e-8, atol=1e-10)


def test_it_is_the_composition_of_its_wrappers():
    agg = MARBLE(decay=0.6)
    parts = Rescaled(Normalized(Smoothed(MGDA(), decay=0.6)), length="times_mean_norm")
    for step in range(6):
        jacobian = random(4, 7, seed=step, conflict=0.5, spread=1.0)
        assert torch.equal(agg(jacobian), parts(jacobian))


def test_the_promises_are_those_of_the_composition():
    parts = Rescaled(Normalized(Smoothed(MGDA())), length="times_mean_norm")
    assert MARBLE().keeps == parts.keeps


def test_two_objectives_by_hand():
    # Unit gradients (1, 0) and (0, 1), weights 1/2 each, mean norm 2.
    assert_close(MARBLE()(torch.tensor([[3.0, 0.0], [0.0, 1.0]])), torch.tensor([1.0, 1.0]))


def test_the_average_starts_from_the_first_solve_and_then_moves_by_its_share():
    e1, e2 = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    agg = MARBLE(decay=0.7)
    first = torch.stack([e1, e2, e1 + e2])  # the third one leans on the others: weights (1/2, 1/2, 0)
    second = torch.stack([e1, e1 + e2, -e1 + 3 * e2])
    agg(first)
    alpha = shortest(torch.nn.functional.normalize(second.double()))
    solution = agg.solve(second @ second.mT)
    expected = 0.7 * torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64) + 0.3 * alpha
    assert_close(torch.from_numpy(solution.details["simplex"]), expected, rtol=1e-6, atol=1e-7)


class TestSilentObjectives:
    jacobian = torch.tensor([[2.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 6.0]], dtype=torch.float64)

    def test_it_is_left_out_of_the_solve_and_of_the_mean_norm(self):
        jacobian = self.jacobian.clone()
        jacobian[2] = 0
        solution = MARBLE().solve(jacobian @ jacobian.mT)
        assert solution.left_out == (2,)
        assert_close(MARBLE()(jacobian), torch.tensor([1.5, 1.5, 0.0], dtype=torch.float64))

    def test_a_silent_step_does_not_mute_it(self):
        agg = MARBLE(decay=0.7)
        silent = self.jacobian.clone()
        silent[2] = 0
        agg(self.jacobian)
        solution = agg.solve(silent @ silent.mT)
        assert solution.details["simplex"][2] == 0
        assert abs(solution.details["simplex"].sum() - 1) < 1e-12
        back = agg.solve(self.jacobian @ self.jacobian.mT)
        # Its average stayed at 1/3; the others went to 0.7 / 3 + 0.3 / 2, and all move towards 1/3.
        kept, others = 1 / 3, 0.7 * (0.7 / 3 + 0.3 / 2) + 0.1
        assert_close(back.details["simplex"][2], kept / (kept + 2 * others))

    def test_one_that_was_silent_from_the_start_begins_with_its_own_first_solve(self):
        agg = MARBLE(decay=0.7)
        silent = self.jacobian.clone()
        silent[2] = 0
        agg(silent)
        solution = agg.solve(self.jacobian @ self.jacobian.mT)
        first, others = 1 / 3, 0.7 / 2 + 0.1
        assert_close(solution.details["simplex"][2], first / (first + 2 * others))


def test_the_number_of_objectives_may_not_change_without_a_reset():
    agg = MARBLE()
    agg(torch.eye(3))
    with pytest.raises(ValueError, match=r"over 3 objectives, but this step has 2: call reset\(\)"):
        agg(torch.eye(2))
    agg.reset()
    assert agg(torch.eye(2)).isfinite().all()


def test_a_step_with_nan_leaves_the_average():
    agg = MARBLE()
    agg(torch.eye(3))
    before = agg.state_dict()
    with pytest.raises(mogb.NonFiniteError):
        agg(torch.full((3, 3), float("nan")))
    assert torch.equal(before["inner.inner.inner.average"], agg.state_dict()["inner.inner.inner.average"])


def test_impossible_decays_are_refused():
    for bad in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
            MARBLE(decay=bad)
