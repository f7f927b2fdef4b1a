"""What methods need of a training loop besides losses and gradients: hooks that may be called, and not be forgotten.

The learned numbers, the second phase of a step and the end of an epoch are those of uw, famo and dwa.
"""

import copy
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import mogb
from mogb.base import JacobianAggregator, Reference, Solution, state
from mogb.jacobian import Jacobian
from mogb.wrappers.logarithmic import Logarithmic
from mogb.wrappers.refreshed import Refreshed
from mogb.wrappers.silenced import Silenced
from mogb.wrappers.smoothed import Smoothed

LOSSES = torch.tensor([2.0, 0.5], dtype=torch.float64)


def weights(method, losses=LOSSES):
    return method.weights(losses=losses)


@pytest.mark.parametrize("name", mogb.registered())
def test_a_loop_that_calls_everything_serves_every_method(name):
    method = mogb.make(name)
    assert method.phases <= {"parameters", "update", "end_epoch"}
    learned = method.parameters()
    assert bool(learned) == ("parameters" in method.phases)
    optimizer = torch.optim.SGD(learned, lr=0.1) if learned else None
    jacobian = torch.tensor([[1.0, 0.0, 2.0], [-1.0, 1.0, 0.5], [0.0, 3.0, 1.0]], dtype=torch.float64)
    for epoch in range(3):
        for step in range(2):
            losses = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64) / (1 + epoch + step)
            assert method(jacobian, losses).isfinite().all()
            if optimizer is not None:
                optimizer.step()
            method.update(0.9 * losses)
        method.end_epoch()


class TestUpdate:
    def test_a_forgotten_update_says_what_to_call(self):
        method = mogb.make("famo")
        weights(method)
        with pytest.raises(RuntimeError, match=r"call update\(losses\) with the losses of the same batch"):
            weights(method)
        method.update(0.5 * LOSSES)
        weights(method)

    def test_losses_come_in_every_form_of_a_training_loop(self):
        forms = (
            LOSSES,
            LOSSES.float(),
            [2.0, 0.5],
            [torch.tensor(2.0, requires_grad=True), torch.tensor([0.5])],
            {"a": torch.tensor(2.0), "b": torch.tensor(0.5)},
        )
        logits = []
        for form in forms:
            method = mogb.make("famo")
            weights(method, 2 * LOSSES.flip(0))
            method.update(form)
            logits.append(method.state_dict()["logits"])
        for other in logits[1:]:
            assert_close(other, logits[0])

    @pytest.mark.usefixtures("unchecked")
    def test_bad_losses_are_refused(self):
        method = mogb.make("famo")
        weights(method)
        for losses in (torch.ones(3), torch.ones(2, 1), [], [torch.ones(2), torch.ones(2)]):
            with pytest.raises(ValueError, match=r"losses|objectives"):
                method.update(losses)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_losses_that_blew_up_teach_nothing_and_the_run_goes_on(self, bad):
        method = mogb.make("famo")
        for factor in (0.5, 0.3):
            weights(method)
            method.update(torch.tensor([1.0, factor]))
        before = method.state_dict()
        weights(method)
        with pytest.raises(mogb.NonFiniteError, match="objective 1"):
            method.update(torch.tensor([1.0, bad]))
        after = method.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(torch.as_tensor(after[key]), torch.as_tensor(before[key])) for key in before)
        assert weights(method).isfinite().all()

    def test_a_second_update_after_one_solve_changes_nothing(self):
        method = mogb.make("famo")
        weights(method)
        method.update(torch.tensor([1.0, 0.5]))
        logits = method.state_dict()["logits"]
        method.update(torch.tensor([0.1, 0.5]))
        assert torch.equal(method.state_dict()["logits"], logits)


class TestParameters:
    def test_forgotten_parameters_say_what_to_call(self):
        method = mogb.make("uw")
        weights(method)
        with pytest.raises(RuntimeError, match=r"nobody called parameters\(\)"):
            weights(method)

    @pytest.mark.parametrize("name", ["uw", "imtl_l"])
    @pytest.mark.parametrize(
        "optimizer",
        ["SGD", "Adam", "AdamW", "RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "Rprop", "ASGD"],
    )
    def test_optimizers_take_them_before_the_number_of_objectives_is_known(self, name, optimizer):
        method = mogb.make(name)
        learner = getattr(torch.optim, optimizer)(method.parameters(), lr=0.01)
        moved = []
        for _ in range(3):
            weights(method)
            learner.step()
            moved.append(method.parameters()[0].detach().clone())
        assert moved[0].shape == (2,)
        assert moved[-1].isfinite().all()
        assert not torch.equal(moved[0], moved[-1])

    def test_adagrad_takes_them_when_the_size_is_given(self):
        method = mogb.make("uw", init=[0.0, 0.0])
        learner = torch.optim.Adagrad(method.parameters(), lr=0.5)
        weights(method)
        learner.step()
        assert method.parameters()[0][0] > 0 > method.parameters()[0][1]

    @pytest.mark.parametrize(("name", "sign"), [("uw", 1.0), ("imtl_l", -1.0)])
    def test_the_slopes_are_the_derivatives(self, name, sign):
        s = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
        value = (0.5 * (-s).exp() * LOSSES + 0.5 * s).sum() if sign > 0 else (s.exp() * LOSSES - s).sum()
        value.backward()
        method = mogb.make(name, init=[0.3, -0.7])
        solution = method.solve(losses=LOSSES)
        assert_close(method.parameters()[0].grad, s.grad)
        assert solution.value == pytest.approx(value.item())

    @pytest.mark.parametrize(("name", "sign"), [("uw", 1.0), ("imtl_l", -1.0)])
    def test_they_learn_the_logarithms_of_constant_losses(self, name, sign):
        method = mogb.make(name)
        learner = torch.optim.SGD(method.parameters(), lr=0.5)
        for _ in range(400):
            weights(method)
            learner.step()
        assert_close(method.parameters()[0].detach(), sign * LOSSES.log(), atol=1e-8, rtol=0)

    def test_the_gradient_is_set_not_added(self):
        method = mogb.make("uw")
        (parameter,) = method.parameters()
        weights(method)
        once = parameter.grad.clone()
        weights(method)
        assert torch.equal(parameter.grad, once)

    def test_an_optimizer_keeps_hold_through_reset_and_load(self):
        method = mogb.make("uw")
        (parameter,) = method.parameters()
        learner = torch.optim.SGD([parameter], lr=1.0)
        weights(method)
        learner.step()
        saved = method.state_dict()
        method.reset()
        assert parameter.numel() == 0
        weights(method, torch.ones(5))
        assert parameter.shape == (5,)
        method.load_state_dict(saved)
        assert_close(parameter.detach(), torch.tensor([0.5, -0.25], dtype=torch.float64))
        weights(method)
        learner.step()
        assert method.parameters()[0] is parameter
        assert not torch.equal(parameter.detach(), saved["log_variances"])

    def test_training_resumes_bit_for_bit_with_the_optimizer(self):
        def run(method, learner, steps):
            found = []
            for step in steps:
                found.append(weights(method, LOSSES * (1 + 0.1 * step)))
                learner.step()
            return found

        def make():
            method = mogb.make("uw")
            return method, torch.optim.Adam(method.parameters(), lr=0.025)

        method, learner = make()
        whole = run(method, learner, range(40))
        method, learner = make()
        first = run(method, learner, range(20))
        saved = copy.deepcopy((method.state_dict(), learner.state_dict()))
        method, learner = make()
        method.load_state_dict(saved[0])
        learner.load_state_dict(saved[1])
        assert all(torch.equal(a, b) for a, b in zip(whole, first + run(method, learner, range(20, 40)), strict=True))

    def test_another_number_of_objectives_is_refused(self):
        method = mogb.make("imtl_l")
        method.parameters()
        weights(method)
        with pytest.raises(ValueError, match=r"2 objectives, but got 3. Call reset"):
            weights(method, torch.ones(3))

    def test_numbers_that_diverged_are_refused_and_not_learned_from(self):
        method = mogb.make("uw", init=[-2000.0, 0.0])
        (parameter,) = method.parameters()
        with pytest.raises(mogb.NonFiniteError):
            weights(method)
        assert parameter.grad is None


class TestEndEpoch:
    @pytest.mark.parametrize("options", [{"name": "dwa"}, {"name": "stch", "warmup_epochs": 1}])
    def test_a_forgotten_end_says_what_to_call(self, options):
        method = mogb.make(**options, max_epoch_steps=3)
        assert method.phases == {"end_epoch"}
        for _ in range(2):
            for _ in range(3):
                weights(method)
            method.end_epoch()
        method = mogb.make(**options, max_epoch_steps=3)
        for _ in range(3):
            weights(method)
        with pytest.raises(RuntimeError, match=r"3 steps have passed since the last end_epoch\(\). Call end_epoch\(\)"):
            weights(method)

    def test_windows_need_no_call(self):
        method = mogb.make("dwa", window=2, max_epoch_steps=1)
        assert method.phases == set()
        for _ in range(5):
            weights(method)
            method.end_epoch()


class TestWrappers:
    def test_hooks_reach_the_method_inside(self):
        method = Smoothed(mogb.make("uw"), decay=0.5)
        assert method.phases == {"parameters"}
        (parameter,) = method.parameters()
        weights(method)
        assert parameter.grad is not None
        method = Smoothed(mogb.make("dwa"))
        assert method.phases == {"end_epoch"}
        weights(method)
        method.end_epoch()
        assert "inner.newer" in method.state_dict()

    def test_a_method_on_log_losses_learns_from_log_losses(self):
        inner, twin = mogb.make("famo"), mogb.make("famo")
        method = Logarithmic(inner)
        assert method.needs_positive_losses
        before, after = torch.tensor([3.0, 9.0]).double(), torch.tensor([2.0, 8.0]).double()
        weights(method, before)
        method.update(after)
        weights(twin, before.log())
        twin.update(after.log())
        assert_close(inner.state_dict()["logits"], twin.state_dict()["logits"])

    def test_updates_between_refreshes_do_no_harm(self):
        method = Refreshed(mogb.make("famo"), every=3)
        for _ in range(7):
            weights(method)
            method.update(0.9 * LOSSES)

    @pytest.mark.parametrize("name", ["uw", "imtl_l", "famo", "dwa", "stch", "go4align", "gls", "pbi", "tchebycheff"])
    def test_an_objective_may_sit_out_a_step(self, name):
        """The others get what they would get alone, and the state keeps its size."""
        method, alone = Silenced(mogb.make(name)), mogb.make(name)
        method.parameters()
        gramian = torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
        losses = torch.tensor([2.0, 5.0, 0.5], dtype=torch.float64)
        solution = method.solve(gramian, losses)
        assert solution.left_out == (1,)
        assert solution.weights[1] == 0
        assert_close(solution.weights[[0, 2]], alone.solve(losses=losses[[0, 2]]).weights)
        method.update(0.9 * losses)
        assert method.solve(torch.eye(3, dtype=torch.float64), losses).weights.shape == (3,)
        method.update(0.9 * losses)
        silent = method.solve(torch.zeros(3, 3, dtype=torch.float64), losses)
        assert silent.left_out == (0, 1, 2)


class TestFailedSteps:
    """A step that fails after the solve leaves the method as it was, and needs no update."""

    @pytest.mark.parametrize("name", ["famo", "dwa", "rlw", "uw", "stch", "go4align"])
    def test_a_gradient_that_blows_up(self, name):
        method, twin = mogb.make(name), mogb.make(name)
        parameter = torch.ones(3, dtype=torch.float64, requires_grad=True)

        def step(agg, zero):
            losses = torch.stack([parameter.square().sum() + 1, (parameter - 2).square().sum()])
            losses = losses + torch.stack([torch.zeros(()), zero.sqrt()])  # the slope of the root at 0 is infinite
            mogb.backward(losses, [parameter], agg)
            agg.update(0.9 * losses.detach())

        for agg in (method, twin):
            agg.parameters()
            step(agg, parameter.sum() * 0 + 1)
        before = method.state_dict()
        with pytest.raises(mogb.NonFiniteError):
            step(method, parameter.sum() * 0)
        assert before.keys() == method.state_dict().keys()
        for agg in (method, twin):
            step(agg, parameter.sum() * 0 + 1)
        for key, value in twin.state_dict().items():
            assert torch.equal(torch.as_tensor(method.state_dict()[key]), torch.as_tensor(value)), key

    def test_wrappers_and_generators_go_back_too(self):
        method = Smoothed(mogb.make("rlw"))
        expected = weights(copy.deepcopy(method))

        def fail():
            with method.undone_on_failure():
                weights(method)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert torch.equal(weights(method), expected)


class TestTensorsAsState:
    def test_they_are_saved_under_flat_keys(self):
        method = mogb.make("db_mtl")
        blocks = Jacobian((torch.ones(2, 3, 4), torch.ones(2)))
        method.direct(blocks, np.array([1.0, 2.0]))
        saved = method.state_dict()
        assert {key: list(value.shape) for key, value in saved.items() if key.startswith("tracked")} == {
            "tracked.0": [2, 3, 4],
            "tracked.1": [2],
        }
        other = mogb.make("db_mtl")
        other.load_state_dict(saved)
        saved["tracked.0"].fill_(9.0)  # the saved state is the user's
        mine, theirs = method.direct(blocks, np.array([3.0, 1.0])), other.direct(blocks, np.array([3.0, 1.0]))
        assert all(torch.equal(a, b) for a, b in zip(mine[0], theirs[0], strict=True))

    @pytest.mark.parametrize("key", ["tracked", "tracked.x", "steps.0", "tracked.", "nothing.0"])
    def test_keys_that_belong_to_nothing_are_refused(self, key):
        with pytest.raises(ValueError, match="has no state named"):
            mogb.make("db_mtl").load_state_dict({key: torch.ones(2, 2)})

    def test_a_missing_part_is_refused(self):
        with pytest.raises(ValueError, match="'tracked' lacks parts: it has 0, 2"):
            mogb.make("db_mtl").load_state_dict({"tracked.0": torch.ones(2), "tracked.2": torch.ones(2)})


class Tally(JacobianAggregator):
    """Answers with weights, counts its calls, and fails when told to."""

    reference = Reference(authors="A. Nobody", title="None", year=2026)

    def __init__(self):
        self.calls, self.fail = 0, False

    def _remember(self):
        return {"calls": self.calls}

    def _recall(self, saved):
        self.calls = saved["calls"]

    def _direction(self, jacobian, losses):
        self.calls += 1
        return Solution(np.array([1.0, math.nan if self.fail else 2.0]))


def test_a_reader_of_the_jacobian_may_answer_with_weights():
    method = Tally()
    parameter = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    report = mogb.backward(torch.stack([parameter.sum(), parameter[0] * 3]), [parameter], method)
    assert_close(report.weights, torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert_close(parameter.grad, torch.tensor([7.0, 1.0], dtype=torch.float64))
    method.fail = True
    with pytest.raises(mogb.NonFiniteError):
        method(torch.eye(2))
    assert method.calls == 1


def test_state_kinds_are_declared():
    assert state(kind="tensors").metadata["state"] == "tensors"
