import math

import numpy as np
import pytest
import torch
from small import ROWS, TIMES, Step, make_rewards, make_run
from torch.testing import assert_close

import mogb
from mogb.errors import NonFiniteError
from mogb_diffusion import nft_losses
from mogb_diffusion.advantages import gdpo_advantages, prompt_advantages, summed_advantages
from mogb_diffusion.balancing import LossScale
from mogb_diffusion.config import ConfigError
from mogb_diffusion.flow import noised
from mogb_diffusion.nft import optimality, reference_kl

ALL = list(range(len(ROWS)))


def losses_by_hand(step, r, mask=None):
    """The K losses of the whole batch, times averaged, straight from nft_losses."""
    total = 0.0
    for column in range(TIMES):
        latents = noised(step.clean, step.noise[column], step.time[column])
        velocity = step.model(latents, step.time[column])
        with torch.no_grad():
            old = step.old(latents, step.time[column])
        total = total + nft_losses(
            velocity, old, noised=latents, clean=step.clean, time=step.time[column], optimality=r,
            beta=step.run.loss.beta, scale=step.run.loss.max_advantage, mask=mask,
        ) / TIMES  # fmt: skip
    return total


def distance_by_hand(step):
    total = 0.0
    for column in range(TIMES):
        latents = noised(step.clean, step.noise[column], step.time[column])
        velocity = step.model(latents, step.time[column])
        total = total + reference_kl(velocity, step.reference(latents, step.time[column])) / TIMES
    return step.run.loss.kl_weight * total


def gradients_by_hand(step, values=None):
    """Full gradients [K, N] and the common part [N], by ordinary backward passes."""
    values = step.values if values is None else values
    r = optimality(prompt_advantages(values, ROWS))
    mask = ~values.isnan()
    full = torch.stack([step.gradient(losses_by_hand(step, r, mask)[k]) for k in range(len(r))])
    common = step.gradient(losses_by_hand(step, torch.full((1, 8), 0.5, dtype=torch.float64))[0])
    return full, common


def marble_by_hand(rows):
    """The direction of MARBLE without average, by the exact min-norm point of the unit rows."""
    norms = rows.norm(dim=1)
    unit = rows / norms[:, None]
    alpha = mogb.min_norm(unit @ unit.mT).weights
    alpha = torch.as_tensor(np.asarray(alpha), dtype=rows.dtype)
    return norms.mean() * alpha / norms, alpha


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize("gradients", ["full", "slope"])
@pytest.mark.parametrize("mode", ["marble_exact", "marble_every_step"])
def test_marble_at_every_step_is_the_formula(mode, gradients, kl_weight):
    step = Step(make_run(mode, gradients=gradients, kl_weight=kl_weight))
    report, found = step.run_update(micro_batch=3)
    full, common = gradients_by_hand(step)
    rows = full if gradients == "full" else full - common
    weights, alpha = marble_by_hand(rows)
    expected = weights @ rows + (common if gradients == "slope" else 0)
    if kl_weight:
        expected = expected + step.gradient(distance_by_hand(step))
    assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert_close(torch.from_numpy(report.coefficients), weights, rtol=1e-9, atol=1e-12)
    assert_close(torch.from_numpy(report.shares), alpha, rtol=1e-9, atol=1e-12)
    cosines = rows @ (expected / expected.norm()) / rows.norm(dim=1)
    assert_close(torch.from_numpy(report.cosines), cosines, rtol=1e-8, atol=1e-10)
    assert report.kind == "solved"


@pytest.mark.parametrize("gradients", ["full", "slope"])
def test_exact_and_every_step_agree_and_so_does_marble_with_n_1_and_rho_0(gradients):
    directions = [
        Step(make_run(mode, gradients=gradients, kl_weight=0.1, **options)).run_update(micro_batch=3)[1]
        for mode, options in (
            ("marble_every_step", {}),
            ("marble_exact", {}),
            ("marble", {"refresh_every": 1, "decay": 0.0}),
        )
    ]
    for other in directions[1:]:
        assert float((other - directions[0]).norm() / directions[0].norm()) <= 1e-10


def test_passes_do_not_grow_with_the_rewards_and_on_policy_one_is_enough():
    def passes(mode, rewards, **how):
        step = Step(make_run(mode, rewards=rewards), **how)
        return step.run_update()[0].passes

    assert [passes("marble_exact", rewards) for rewards in (3, 5)] == [2, 2]
    assert [passes("marble_exact", 5, on_policy=True)] == [1]
    assert [passes("marble_every_step", rewards) for rewards in (3, 5)] == [3, 5]
    assert passes("fixed", 5) == 1


@pytest.mark.parametrize("mode", ["marble_exact", "fixed", "marble_every_step", "weighted_sum", "cagrad"])
def test_the_cut_into_micro_batches_changes_nothing(mode):
    whole = Step(make_run(mode, kl_weight=0.2)).run_update(micro_batch=8)[1]
    for micro_batch in (1, 3):
        assert_close(Step(make_run(mode, kl_weight=0.2)).run_update(micro_batch)[1], whole, rtol=1e-9, atol=1e-12)


def test_fixed_and_single_are_weighted_slopes_and_the_common_part_once():
    step = Step(make_run("fixed", alpha={"preference": 3, "text": 1}))
    full, common = gradients_by_hand(step)
    weights = torch.tensor([0.75, 0.0, 0.25], dtype=torch.float64)
    assert_close(step.run_update(3)[1], weights @ (full - common) + common, rtol=1e-10, atol=1e-12)
    assert_close(Step(make_run("fixed")).run_update()[1], full.mean(0), rtol=1e-10, atol=1e-12)
    assert_close(Step(make_run("single:aesthetic")).run_update()[1], full[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["weighted_sum", "gdpo"])
def test_sums_make_one_objective(mode):
    step = Step(make_run(mode))
    make = summed_advantages if mode == "weighted_sum" else gdpo_advantages
    r = optimality(make(step.values, ROWS))[None]
    report, found = step.run_update(3)
    assert_close(found, step.gradient(losses_by_hand(step, r)[0]), rtol=1e-10, atol=1e-12)
    assert report.names == (mode,)


def test_stages_follow_one_another():
    stages = [{"share": 1, "rewards": ["text"]}, {"share": 3, "rewards": ["preference", "aesthetic"]}]
    step = Step(make_run("sequential", stages=stages, epochs=8))
    found = [step.run_update(epoch=epoch)[0].coefficients.tolist() for epoch in range(8)]
    assert found == [[0, 0, 1]] * 2 + [[0.5, 0.5, 0]] * 6


def test_dropout_silences_general_rewards_on_the_specialists_prompts_only():
    step = Step(make_run("reward_dropout", dropout=0.5), specialists=("text",))
    silenced = []
    for epoch in range(200):
        signal = step.signal(epoch)
        assert signal.applies[2].tolist() == [False] * 4 + [True] * 4
        assert signal.applies[:2, :4].all()  # the specialist says nothing about the first prompt
        for k in (0, 1):
            assert signal.applies[k, 4:].all() or not signal.applies[k, 4:].any()
            silenced.append(not signal.applies[k, 4])
            assert (signal.advantages[k, 4:] == 0).all() == silenced[-1]
    assert 0.4 < np.mean(silenced) < 0.6


def test_coefficients_are_kept_between_refreshes():
    step = Step(make_run("marble", refresh_every=3, decay=0.7, gradients="full"))
    first, _ = step.run_update()
    full, _ = gradients_by_hand(step)
    weights, _ = marble_by_hand(full)
    step.values = make_rewards(seed=9)  # other advantages in the same groups
    later, _ = gradients_by_hand(step)
    report, found = step.run_update()
    assert (first.kind, report.kind) == ("solved", "weighted")
    assert_close(found, weights @ later, rtol=1e-9, atol=1e-12)
    assert step.run_update()[0].kind == "weighted"
    assert step.run_update()[0].kind == "solved"


def test_raw_coefficients_are_the_simplex_weights():
    step = Step(make_run("marble", refresh_every=3, coefficients="raw"))
    step.run_update()
    full, common = gradients_by_hand(step)
    _, alpha = marble_by_hand(full - common)
    report, found = step.run_update()
    assert_close(found, alpha @ (full - common) + common, rtol=1e-9, atol=1e-12)
    assert_close(torch.from_numpy(report.shares), alpha, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gradients", ["full", "slope"])
@pytest.mark.parametrize("mode", ["marble_exact", "marble_every_step"])
def test_without_normalization_it_is_the_shortest_vector_of_the_hull_of_the_gradients(mode, gradients):
    step = Step(make_run(mode, gradients=gradients, normalize=False))
    report, found = step.run_update(micro_batch=3)
    full, common = gradients_by_hand(step)
    rows = full if gradients == "full" else full - common
    alpha = torch.as_tensor(np.asarray(mogb.min_norm(rows @ rows.mT).weights))
    assert_close(found, alpha @ rows + (common if gradients == "slope" else 0), rtol=1e-9, atol=1e-12)
    assert_close(torch.from_numpy(report.coefficients), alpha, rtol=1e-9, atol=1e-12)
    inner = rows @ (alpha @ rows)  # of the shortest vector with every gradient: its square, or more where alpha is 0
    assert (inner >= (alpha @ rows).square().sum() * (1 - 1e-9)).all()
    shortest = rows.norm(dim=1).argmin()  # what normalization prevents: the shortest gradient takes the most
    assert alpha.argmax() == shortest


@pytest.mark.parametrize("coefficients", ["raw", "norm_corrected"])
def test_without_normalization_the_weights_on_the_gradients_are_kept_and_averaged(coefficients):
    step = Step(make_run("marble", refresh_every=2, decay=0.7, normalize=False, coefficients=coefficients,
                         gradients="full"))  # fmt: skip
    solves = []
    for seed in (1, 9):
        step.values = make_rewards(seed=seed)
        rows, _ = gradients_by_hand(step)
        solves.append(np.asarray(mogb.min_norm(rows @ rows.mT).weights))
        refreshed, _ = step.run_update()
        kept, found = step.run_update()
        assert (refreshed.kind, kept.kind) == ("solved", "weighted")
        assert_close(torch.from_numpy(kept.coefficients), torch.from_numpy(refreshed.coefficients))
        assert_close(found, torch.from_numpy(kept.coefficients) @ rows, rtol=1e-9, atol=1e-12)
    assert kept.coefficients == pytest.approx(0.7 * solves[0] + 0.3 * solves[1], rel=1e-9)


def test_without_normalization_a_reward_that_was_silent_is_heard_with_its_average():
    step = Step(make_run("marble", refresh_every=2, decay=0.7, normalize=False))
    first, _ = step.run_update()
    step.run_update()
    step.values = make_rewards(silent=(1,))
    report, _ = step.run_update()
    assert report.left_out == ("aesthetic",)
    assert report.coefficients[1] == 0
    step.values = make_rewards()
    later, _ = step.run_update()
    others = report.coefficients.sum()
    assert later.coefficients[1] / others == pytest.approx(first.coefficients[1], rel=1e-9)


def test_the_average_starts_from_the_first_solve_or_from_uniform():
    full, common = gradients_by_hand(Step(make_run()))
    _, alpha = marble_by_hand(full - common)
    first = Step(make_run("marble", decay=0.7)).run_update()[0].shares
    assert_close(torch.from_numpy(first), alpha, rtol=1e-9, atol=1e-12)
    uniform = Step(make_run("marble", decay=0.7, cold_start="uniform")).run_update()[0].shares
    assert_close(torch.from_numpy(uniform), 0.7 / 3 + 0.3 * alpha, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gradients", ["full", "slope"])
@pytest.mark.parametrize("mode", ["marble_exact", "marble_every_step", "upgrad", "nash_mtl"])
def test_silent_rewards_are_left_out(mode, gradients):
    values = make_rewards(silent=(1,))
    step = Step(make_run(mode, gradients=gradients), rewards=values)
    report, found = step.run_update(3)
    assert report.left_out == ("aesthetic",)
    assert report.coefficients[1] == 0
    both = make_run(mode, gradients=gradients)
    plain = Step(both, rewards=values)
    full, common = gradients_by_hand(plain)
    rows = (full if gradients == "full" else full - common)[[0, 2]]
    gramian = rows @ rows.mT
    if mode.startswith("marble"):
        weights, _ = marble_by_hand(rows)
    else:
        weights = mogb.make(mode).weights(gramian)
    expected = weights @ rows + (common if gradients == "slope" else 0)
    assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert float(found.norm()) > 0


def test_a_reward_that_is_silent_at_the_refresh_is_heard_afterwards():
    step = Step(make_run("marble", refresh_every=2, decay=0.7))
    step.run_update()
    step.run_update()
    heard = step.balancer._simplex.copy()
    norm = step.balancer._norms[1]
    step.values = make_rewards(silent=(1,))
    report, _ = step.run_update()
    assert report.left_out == ("aesthetic",)
    step.values = make_rewards()
    report, _ = step.run_update()
    assert report.kind == "weighted"
    assert report.coefficients[1] > 0
    # Its average is untouched: what it had before, on the simplex with the new ones of the others.
    assert report.coefficients[1] * norm / (report.coefficients * step.balancer._norms).sum() == pytest.approx(
        step.balancer._simplex[1]
    )
    assert step.balancer._simplex[1] == pytest.approx(heard[1], rel=0.4)


def test_all_silent_leaves_what_is_common():
    values = make_rewards(silent=(0, 1, 2))
    step = Step(make_run("marble_exact"), rewards=values)
    report, found = step.run_update()
    _, common = gradients_by_hand(step, make_rewards())
    assert report.left_out == ("preference", "aesthetic", "text")
    assert_close(found, common, rtol=1e-9, atol=1e-12)


def test_spread_uses_the_coefficients_of_the_step_before():
    options = {"fraction": 1.0, "decay": 0.0}
    step, exact = Step(make_run("marble_spread", **options)), Step(make_run("marble_exact"))
    first, direction = step.run_update(3)
    assert_close(direction, exact.run_update(3)[1], rtol=1e-10, atol=1e-12)
    before = first.coefficients
    step.values = make_rewards(seed=5)
    full, common = gradients_by_hand(step)
    report, found = step.run_update(3)
    assert report.kind == "spread"
    assert_close(found, torch.from_numpy(before) @ (full - common) + common, rtol=1e-9, atol=1e-12)
    solved, _ = marble_by_hand(full - common)
    assert_close(torch.from_numpy(step.balancer._coefficients), solved, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gradients", ["full", "slope"])
def test_spread_over_a_part_of_the_micro_steps_keeps_the_direction(gradients):
    step = Step(make_run("marble_spread", fraction=0.4, gradients=gradients, kl_weight=0.2))
    first, _ = step.run_update(2)
    step.values = make_rewards(seed=5)
    full, common = gradients_by_hand(step)
    report, found = step.run_update(2)
    assert report.passes == pytest.approx((8 + 4 * (2 if gradients == "slope" else 3) - 4) / 8, abs=0.3)
    weights = torch.from_numpy(first.coefficients)
    slopes = weights @ (full - common)
    expected = slopes + (common if gradients == "slope" else weights.sum() * common)
    assert_close(found, expected + step.gradient(distance_by_hand(step)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gradients", ["full", "slope"])
@pytest.mark.parametrize("mode", ["marble_exact", "marble_every_step"])
def test_advantage_scale_stretches_the_slopes_alone(mode, gradients):
    step = Step(make_run(mode, gradients=gradients, advantage_scale=0.7, kl_weight=0.1))
    report, found = step.run_update(3)
    full, common = gradients_by_hand(step)
    rows = full if gradients == "full" else full - common
    weights, _ = marble_by_hand(rows)
    mask = ~step.values.isnan()
    per_reward = prompt_advantages(step.values, ROWS) * mask * 8 / mask.sum(1, keepdim=True)
    stretch = 0.7 / float((weights @ per_reward).std(correction=0))
    once = weights.sum() if gradients == "full" else 1
    expected = stretch * (weights @ (full - common)) + once * common + step.gradient(distance_by_hand(step))
    assert report.scale == pytest.approx(stretch)
    assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_modes_are_equal_in_the_scale_of_their_advantages():
    for mode in ("weighted_sum", "gdpo", "fixed", "single:text"):
        step = Step(make_run(mode, advantage_scale=1.0))
        signal = step.signal()
        report, _ = step.run_update(signal=signal)
        mask = signal.applies.double()
        combined = torch.from_numpy(report.coefficients) @ (signal.advantages * 8 / mask.sum(1, keepdim=True))
        assert float((report.scale * combined).std(correction=0)) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["cagrad", "nash_mtl", "upgrad", "pcgrad", "imtl_g", "aligned_mtl", "mgda", "epo"])
def test_methods_of_mogb_balance_rewards(name):
    step = Step(make_run(name))
    report, found = step.run_update(3)
    full, common = gradients_by_hand(step)
    rows = full - common
    method = mogb.make(name)
    losses = torch.zeros(3, dtype=torch.float64)
    if method.reads == "gramian+losses":
        r = optimality(prompt_advantages(step.values, ROWS))
        losses = losses_by_hand(step, r, ~step.values.isnan()).detach()
    weights = method.weights(rows @ rows.mT, losses)
    assert_close(found, weights @ rows + common, rtol=1e-6, atol=1e-8)
    assert report.cosines is not None


def test_methods_that_read_whole_gradients_balance_rewards_too():
    step = Step(make_run("trimmed_mean"), rewards=make_rewards(silent=(1,)))
    report, found = step.run_update(3)
    full, common = gradients_by_hand(step)
    expected = mogb.make("trimmed_mean")((full - common)[[0, 2]]) + common
    assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert report.left_out == ("aesthetic",)
    assert np.isnan(report.coefficients).all()
    assert math.isfinite(report.min_cosine)


@pytest.mark.parametrize(
    ("mode", "options", "words"),
    [
        ("dwa", {}, "balancing.mode: 'dwa' reads only the values of the losses"),
        ("cagrad", {"options": {"d": 1}}, "balancing.options: "),
        ("cagrad", {"options": {"c": -3}}, "balancing.options: "),
        ("trimmed_mean", {"refresh_every": 2}, "balancing.refresh_every: must be 1"),
    ],
)
def test_methods_that_cannot_balance_rewards_are_refused(mode, options, words, unchecked):
    with pytest.raises(ConfigError) as caught:
        Step(make_run(mode, **options))
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


def test_the_last_epochs_can_be_uniform():
    step = Step(make_run("marble_exact", final_uniform=0.2, epochs=10))
    kinds = [step.run_update(epoch=epoch)[0].kind for epoch in (0, 7, 8, 9)]
    assert kinds == ["solved", "solved", "weighted", "weighted"]
    assert step.run_update(epoch=9)[0].coefficients == pytest.approx([1 / 3] * 3)


def test_shrinkage_pulls_towards_uniform_by_the_share_of_noise():
    step = Step(make_run("marble_exact", shrinkage=True))
    report, _ = step.run_update(micro_batch=2)
    full, common = gradients_by_hand(step)
    _, alpha = marble_by_hand(full - common)
    # The gradients of the eight micro-steps, by hand: differences of what the first n of them add up to.
    signal = step.signal()
    parts = []
    for start in range(0, 8, 2):
        for column in range(TIMES):
            samples = [start, start + 1]
            update = step.balancer.start(signal, ALL, 1, TIMES, 0)
            weights = torch.from_numpy(update.batch.weights[:, samples, 0])
            parts.append(
                torch.stack([step.gradient((w * step.terms(samples, column)[0][:, 0]).sum()) for w in weights])
            )
    parts = torch.stack(parts)  # [8, K, N]
    share = 8 / 7 * (1 - parts.square().sum((0, 2)) / parts.sum(0).square().sum(1))
    noise = 1 - float(share.clamp(0, 1).mean())
    assert 0.05 < noise < 0.95
    assert_close(torch.from_numpy(report.shares), (1 - noise) * alpha + noise / 3, rtol=1e-8, atol=1e-10)


def test_a_bad_gradient_leaves_nothing_behind():
    for mode in ("marble_exact", "marble_every_step", "fixed"):
        step = Step(make_run(mode))
        step.run_update()
        before = step.balancer.state_dict()
        with torch.no_grad():
            step.clean[3, 0, 0, 0] = float("inf")
        with pytest.raises((NonFiniteError, ValueError)):
            step.run_update()
        after = step.balancer.state_dict()
        assert after["step"] == before["step"]
        for key, value in before.items():
            assert_close(after[key], value, equal_nan=True)


@pytest.mark.parametrize("mode", ["marble", "marble_spread", "marble_exact", "marble_script", "nash_mtl", "pcgrad"])
def test_a_saved_balancer_goes_on_bit_for_bit(mode):
    def two(step):
        return torch.cat([step.run_update(3)[1] for _ in range(2)])

    options = {"refresh_every": 3} if mode in ("marble", "marble_script") else {}
    step = Step(make_run(mode, **options))
    two(step)
    state = step.balancer.state_dict()
    other = Step(make_run(mode, **options))
    other.balancer.load_state_dict(state)
    assert torch.equal(two(step), two(other))


def test_loss_scales_cancel():
    for mode in ("fixed", "marble_exact", "marble_every_step", "marble_script"):
        plain = Step(make_run(mode, kl_weight=0.1)).run_update(3)[1]
        scaled = Step(make_run(mode, kl_weight=0.1))
        scaled.balancer.scale = LossScale(True, 1024.0)
        assert_close(scaled.run_update(3)[1], plain, rtol=1e-9, atol=1e-12)


def test_the_loss_scale_halves_on_overflow_and_grows_back():
    scale = LossScale.of(torch.float16)
    start = scale.value
    scale.update(False)
    assert scale.value == start / 2
    for _ in range(500):
        scale.update(True)
    assert scale.value == start
    off = LossScale.of(torch.bfloat16)
    off.update(False)
    assert off.value == 1
