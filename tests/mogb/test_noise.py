"""Noise estimates: unbiased by Monte Carlo against the exact gradients, identities by hand, and the step they make."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import mogb
from mogb.jacobian import Jacobian
from mogb.noise import NoiseEstimate, Unbiased, backward_halves, estimate_noise, pooled
from mogb.problems.bowls import Bowls
from mogb.problems.specialists import Specialists
from mogb.wrappers.normalized import Normalized

pytestmark = pytest.mark.usefixtures("unchecked")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def halves_at(problem, point, count, seed=0):
    """``[count, K, N]`` twice: gradients on independent half-batches at one point."""
    generator = torch.Generator().manual_seed(seed)
    points = point.expand(count, -1)
    return problem.jacobian(points, generator)[1], problem.jacobian(points, generator)[1]


# --- estimates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "start"), [(Bowls(noise=2.0), 0), (Specialists(groups=4), 1)], ids=["bowls", "specialists"]
)
def test_signal_and_noise_are_unbiased(problem, start):
    point = problem.starts()[start]
    exact = problem.jacobian(point[None])[1][0]
    first, second = halves_at(problem, point, 2000)
    found = [estimate_noise(*pair) for pair in zip(first, second, strict=True)]
    whole = (first + second) / 2
    centred = (whole - exact).numpy()
    covariance = torch.from_numpy(np.einsum("tin,tjn->ij", centred, centred) / len(centred))
    for estimates, target in (
        (torch.stack([one.signal for one in found]), exact @ exact.mT),
        (torch.stack([one.noise for one in found]), covariance),
    ):
        error = (estimates.mean(0) - target) / (estimates.std(0) / math.sqrt(len(found)))
        assert error.abs().max() < 4.5  # standard errors, of K (K + 1) / 2 numbers
    biased = torch.einsum("tkn,tkn->tk", whole, whole)
    gap = (biased.mean(0) - (exact @ exact.mT).diagonal()) / (biased.std(0) / math.sqrt(len(biased)))
    assert gap.max() > 10  # what the estimate corrects


def test_the_noise_of_the_bowls_is_known():
    # Independent noise of standard deviation s in N coordinates of each half: the mean of two has N s^2 / 2.
    problem = Bowls(noise=3.0)
    first, second = halves_at(problem, problem.starts()[0], 3000)
    found = pooled(estimate_noise(*pair) for pair in zip(first, second, strict=True))
    expected = problem.dim * 3.0**2 / 2
    assert_close(found.noise, expected * torch.eye(3, dtype=torch.float64), rtol=0, atol=0.05 * expected)
    squares = problem.jacobian(problem.starts()[:1])[1][0].square().sum(1)
    assert_close(found.signal_share, squares / (squares + expected), rtol=0, atol=0.05)
    assert_close(found.batches_needed[1:], expected / squares[1:], rtol=0.1, atol=0)


def test_equal_halves_have_no_noise():
    rows = normal(4, 30)
    found = estimate_noise(rows, rows.clone())
    assert_close(found.signal, rows @ rows.mT, rtol=1e-14, atol=1e-14)
    assert found.noise.abs().max() <= 1e-14 * float(found.signal.abs().max())
    assert_close(found.signal_share, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-13)
    assert_close(found.batches_needed, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-13)


def test_signal_and_noise_add_up_to_the_gramian_of_the_whole_batch():
    first, second = normal(3, 20), normal(3, 20, seed=1)
    found, mean, half = estimate_noise(first, second), (first + second) / 2, (first - second) / 2
    assert_close(found.gramian, mean @ mean.mT)
    assert_close(found.noise, half @ half.mT)
    assert_close(found.signal, mean @ mean.mT - half @ half.mT)


def test_by_hand():
    found = estimate_noise(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, -1.0]]))
    assert found.signal.tolist() == [[4.0, 0.0], [0.0, -1.0]]
    assert found.noise.tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert found.signal_share[0] == 1.0
    assert found.signal_share.isnan().tolist() == [False, True]  # the two gradients cancel: no length to share
    assert found.batches_needed.tolist() == [0.0, math.inf]
    assert found.cosines[0, 0] == 1.0
    assert found.cosines[1].isnan().all()


def test_blocks_and_jacobians_are_one_gradient():
    first, second = normal(3, 12), normal(3, 12, seed=1)
    whole = estimate_noise(first, second)
    parts = [[rows[:, :4].reshape(3, 2, 2), rows[:, 4:]] for rows in (first, second)]
    for blocks in (parts, [Jacobian.of(part) for part in parts]):
        assert_close(estimate_noise(*blocks).signal, whole.signal)


def test_halves_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"two halves of a batch, but their shapes are \[\[2, 3\]\] and \[\[2, 4\]\]"):
        estimate_noise(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="at least one NoiseEstimate"):
        pooled([])


# --- methods that wear it -------------------------------------------------------------------------------------------

GRAMIAN_METHODS = [name for name in mogb.registered() if "gramian" in mogb.make(name).reads]


@pytest.mark.parametrize("name", GRAMIAN_METHODS)
def test_without_noise_every_method_answers_as_without_the_wrapper(name):
    rows, losses = normal(3, 25), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    plain, unbiased = mogb.make(name), Unbiased(mogb.make(name))
    for _ in range(2):  # a second step, for the methods that remember
        expected = plain(rows, losses)
        assert_close(unbiased(torch.cat([rows, rows]), torch.cat([losses, losses])), expected, rtol=1e-9, atol=1e-11)


def test_the_weights_are_those_of_the_unbiased_gramian_on_the_mean_gradients():
    first = normal(3, 400) + 1.0
    second = first + 0.1 * normal(3, 400, seed=1)
    signal = (first @ second.mT + second @ first.mT) / 2
    weights = mogb.make("upgrad").weights(signal)
    unbiased = Unbiased(mogb.make("upgrad"))
    assert_close(unbiased(torch.cat([first, second])), weights @ (first + second) / 2)
    assert_close(unbiased.estimate.signal, signal)


@pytest.mark.parametrize("repair", ["shrink", "clip"])
@pytest.mark.parametrize("seed", range(8))
def test_an_indefinite_signal_is_repaired(repair, seed):
    from mogb.noise import _repaired

    first, second = (normal(4, 30, seed=2 * seed + half) + 0.45 for half in (0, 1))
    scales = torch.tensor([1e-4, 1.0, 10.0, 1e5], dtype=torch.float64)[:, None]
    found = estimate_noise(scales * first, scales * second)
    part = (found.signal.diagonal() > 0).numpy()
    assert part.any()
    lengths = found.gramian.diagonal().sqrt()
    fixed = torch.from_numpy(_repaired(found.signal.numpy(), found.noise.numpy(), part, repair))
    units = (fixed / torch.outer(lengths, lengths))[part][:, part]
    signal = (found.signal / torch.outer(lengths, lengths))[part][:, part]
    values = torch.linalg.eigvalsh(units)
    assert values[0] > -1e-12
    if torch.linalg.eigvalsh(signal)[0] > 0:
        assert_close(units, signal)
    else:
        assert values[0] < 1e-9  # no more than is needed
    if repair == "shrink":  # a convex combination of what was measured: S + t D D'
        noise = (found.noise / torch.outer(lengths, lengths))[part][:, part]
        share = ((units - signal) * noise).sum() / noise.square().sum()
        assert -1e-9 <= share <= 1 + 1e-9
        assert_close(units, signal + share * noise)
    plain = estimate_noise(first, second)  # the scales of the losses do not matter
    other = torch.from_numpy(_repaired(plain.signal.numpy(), plain.noise.numpy(), part, repair))
    assert_close(fixed, scales * other * scales.mT, rtol=1e-9, atol=0)


def test_none_hands_the_signal_over_as_it_is():
    first, second = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    unbiased = Unbiased(mogb.make("modo", gamma=0.1, rho=0.0), repair="none")
    signal = torch.tensor([[1.0, 3.0], [3.0, 1.0]])  # indefinite
    expected = mogb.make("modo", gamma=0.1, rho=0.0).weights(signal)
    rows = torch.cat([first, second])
    assert_close(unbiased.weights(rows @ rows.mT).reshape(2, 2).sum(0), expected)


def test_dependent_gradients_of_noise_alone_keep_all_of_it():
    # Two objectives with one gradient: the whole Gramian is singular, and so is every part of it that may be used.
    first, second = normal(1, 5).expand(2, -1), normal(1, 5, seed=1).abs().expand(2, -1)
    direction = Unbiased(mogb.make("mgda"))(torch.cat([first, second]))
    assert direction.isfinite().all()


def test_an_objective_without_signal_is_left_out():
    first = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    second = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, -1.0]])
    rows = torch.cat([first, second])
    solution = Unbiased(mogb.make("mgda")).solve(rows @ rows.mT)
    assert solution.left_out == (2, 5)
    assert solution.weights.tolist() == [0.25, 0.25, 0.0, 0.25, 0.25, 0.0]
    nothing = torch.cat([first[2:], second[2:]])
    assert Unbiased(mogb.make("mgda"))(nothing).tolist() == [0.0, 0.0, 0.0]


def test_the_average_is_corrected_for_its_start():
    rows = [normal(4, 10, seed=seed) for seed in range(3)]
    unbiased = Unbiased(mogb.make("mgda"), decay=0.5)
    for both in rows:
        unbiased.solve(both @ both.mT)
    signals = [estimate_noise(both[:2], both[2:]).signal for both in rows]
    expected = (0.125 * signals[0] + 0.25 * signals[1] + 0.5 * signals[2]) / 0.875
    assert_close(unbiased.estimate.signal, expected)


def test_the_average_has_the_scale_of_the_gradients_from_the_first_step_on():
    rows = normal(3, 25)
    bargain = mogb.make("nash_mtl", max_norm=0.0)  # its weights fall with the square root of the Gramian
    averaged = Unbiased(bargain, decay=0.9)
    for _ in range(2):
        assert_close(averaged(torch.cat([rows, rows])), bargain(rows))


def test_averaged_gramians_find_the_weights_of_the_exact_one():
    problem = Bowls(noise=1.0)
    point = problem.starts()[0]
    exact = problem.jacobian(point[None])[1][0]
    target = Normalized(mogb.make("mgda")).solve(exact @ exact.mT).details["unit"]
    first, second = halves_at(problem, point, 400)
    averaged, plain = Unbiased(Normalized(mogb.make("mgda")), decay=0.99), []
    for one, other in zip(first, second, strict=True):
        both = torch.cat([one, other])
        unit = averaged.solve(both @ both.mT).details["unit"]
        whole = (one + other) / 2
        plain.append(Normalized(mogb.make("mgda")).solve(whole @ whole.mT).details["unit"])
    assert np.abs(unit - target).sum() < 0.6 * np.abs(np.mean(plain, 0) - target).sum()


def test_the_state_resumes_bit_for_bit():
    rows = [normal(6, 20, seed=seed) + 0.5 for seed in range(4)]
    one = Unbiased(mogb.make("marble"), decay=0.9)
    for both in rows[:2]:
        one(both)
    other = Unbiased(mogb.make("marble"), decay=0.9)
    other.load_state_dict(one.state_dict())
    for both in rows[2:]:
        assert torch.equal(one(both), other(both))
    one.reset()
    assert one.estimate is None
    assert torch.equal(one(rows[0]), Unbiased(mogb.make("marble"), decay=0.9)(rows[0]))


def test_a_step_with_nan_changes_nothing():
    unbiased, rows = Unbiased(mogb.make("marble"), decay=0.9), normal(2, 10) + 1.0
    unbiased(torch.cat([rows, rows + 0.1 * normal(2, 10, seed=1)]))
    before = unbiased.state_dict()
    with pytest.raises(mogb.NonFiniteError):
        unbiased(torch.full((4, 10), math.nan))
    after = unbiased.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(torch.as_tensor(before[key]), torch.as_tensor(after[key])) for key in before)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Unbiased(mogb.make("weighted_sum")), "reads only losses"),
        (lambda: Unbiased(mogb.make("graddrop")), "reads the whole Jacobian"),
        (lambda: Unbiased(mogb.make("mgda"), decay=1.0), r"decay must be in \[0, 1\), but got 1.0"),
        (lambda: Unbiased(mogb.make("mgda"), repair="cut"), "repair must be one of clip, shrink, none, but got 'cut'"),
        (lambda: Unbiased(mogb.make("mgda"))(torch.ones(3, 2)), "two half-batches, an even number, but got 3"),
    ],
)
def test_what_is_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()


def test_another_number_of_objectives_is_refused():
    unbiased = Unbiased(mogb.make("mgda"), decay=0.5)
    unbiased(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"of 2 objectives, but got 3\. Call reset"):
        unbiased(torch.ones(6, 3))


# --- a training step ------------------------------------------------------------------------------------------------


def model_and_losses():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3).double()
    inputs, targets = normal(8, 5), normal(8, 3, seed=1)

    def losses_of(part):
        return (model(inputs[part]) - targets[part]).square().mean(0)

    return model, losses_of


@pytest.mark.parametrize("form", ["tensor", "stack", "list", "names"])
def test_a_step_from_two_halves(form):
    model, losses_of = model_and_losses()
    into = {
        "tensor": lambda losses: losses,
        "stack": lambda losses: torch.stack(list(losses)),
        "list": list,
        "names": lambda losses: dict(zip("abc", losses, strict=True)),
    }[form]
    with torch.random.fork_rng():
        first, second = losses_of(slice(0, 4)), losses_of(slice(4, 8))
    rows = []
    for losses in (first, second):
        grads = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
        rows.append(torch.stack([torch.cat([grad.reshape(-1) for grad in one]) for one in grads]))
    unbiased = Unbiased(mogb.make("upgrad"))
    report = backward_halves(into(losses_of(slice(0, 4))), into(losses_of(slice(4, 8))), model, unbiased)
    whole = (rows[0] + rows[1]) / 2
    found = torch.cat([param.grad.reshape(-1) for param in model.parameters()])
    assert_close(found, report.weights @ whole)
    assert_close(found, Unbiased(mogb.make("upgrad"))(torch.cat(rows)))
    assert_close(report.gramian, whole @ whole.mT)
    assert_close(report.losses, (first + second).detach() / 2)
    cosines = whole @ found / (whole.norm(dim=1) * found.norm())
    assert_close(report.cosines, cosines)
    assert report.names == (("a", "b", "c") if form == "names" else None)
    assert_close(unbiased.estimate.signal, estimate_noise(*rows).signal)


def test_a_method_is_wrapped_where_it_is_not():
    model, losses_of = model_and_losses()
    report = backward_halves(losses_of(slice(0, 4)), losses_of(slice(4, 8)), model, mogb.make("mgda"))
    assert report.weights.shape == (3,)
    assert report.backward_passes == 6


def test_halves_with_other_objectives_are_refused():
    model, losses_of = model_and_losses()
    with pytest.raises(ValueError, match="same losses on two halves of a batch, but have 3 and 2"):
        backward_halves(losses_of(slice(0, 4)), losses_of(slice(4, 8))[:2], model, mogb.make("mgda"))
    with pytest.raises(TypeError, match="params must be given"):
        backward_halves(losses_of(slice(0, 4)), losses_of(slice(4, 8)), None, mogb.make("mgda"))
    assert all(param.grad is None for param in model.parameters())


def test_a_bad_loss_is_named_with_its_half():
    model, losses_of = model_and_losses()
    first, second = (dict(zip("abc", losses_of(slice(*at)), strict=True)) for at in ((0, 4), (4, 8)))
    second["b"] = second["b"] * math.nan
    with pytest.raises(mogb.NonFiniteError, match="b, half 2"):
        backward_halves(first, second, model, mogb.make("mgda"))


def test_a_balancer_takes_the_losses_of_both_halves():
    model, losses_of = model_and_losses()
    balancer = mogb.Balancer(Unbiased(mogb.make("mgda"), decay=0.9), model, refresh_every=2)
    for _ in range(2):
        report = balancer.backward(torch.cat([losses_of(slice(0, 4)), losses_of(slice(4, 8))]))
    assert not report.refreshed
    assert report.weights.sum() == pytest.approx(1.0)
    assert isinstance(balancer.aggregator.estimate, NoiseEstimate)
