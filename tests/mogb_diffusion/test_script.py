import numpy as np
import pytest
import torch
from small import TIMES, Step, make_rewards, make_run
from torch.testing import assert_close

import mogb
from mogb_diffusion.flow import noised
from mogb_diffusion.nft import nft_losses, optimality
from mogb_diffusion.script import slsqp_min_norm


def test_slsqp_comes_close_to_the_exact_point():
    generator = np.random.default_rng(0)
    for _ in range(20):
        rows = generator.standard_normal((5, 12))
        rows /= np.linalg.norm(rows, axis=1)[:, None]
        gramian = rows @ rows.T
        exact = mogb.min_norm(torch.from_numpy(gramian)).squared_norm
        found = slsqp_min_norm(gramian)
        assert found @ gramian @ found == pytest.approx(float(exact), abs=1e-6)
        assert found.sum() == pytest.approx(1)


def micro_loss(step, samples, column, r):
    """The ordinary loss of a micro-batch, every picture counted."""
    latents = noised(step.clean[samples], step.noise[column, samples], step.time[column, samples])
    velocity = step.model(latents, step.time[column, samples])
    with torch.no_grad():
        old = step.old(latents, step.time[column, samples])
    return nft_losses(
        velocity, old, noised=latents, clean=step.clean[samples], time=step.time[column, samples], optimality=r,
        beta=step.run.loss.beta, scale=step.run.loss.max_advantage,
    )  # fmt: skip


def solved_by_hand(step, samples, column, before, decay=0.7):
    """Alpha after the solve of one micro-step, and its direction."""
    signal = step.signal()
    grads = []
    for k in range(len(signal.names)):
        mine = [i for i in samples if signal.applies[k, i]]
        grads.append(
            step.gradient(micro_loss(step, mine, column, signal.optimality[k : k + 1, mine])[0]) if mine else None
        )
    valid = [k for k, grad in enumerate(grads) if grad is not None]
    rows = torch.stack([grads[k] for k in valid])
    norms = rows.norm(dim=1)
    unit = (rows / norms[:, None]) @ (rows / norms[:, None]).mT
    alpha = np.zeros(len(grads))
    alpha[valid] = np.asarray(mogb.min_norm(unit).weights)
    alpha = alpha if before is None else decay * before + (1 - decay) * alpha
    direction = norms.mean() * (torch.from_numpy(alpha)[valid] @ (rows / norms[:, None]))
    return alpha, direction


def test_the_first_step_solves_at_every_micro_step_and_later_ones_once():
    step = Step(make_run("marble_script", refresh_every=2))
    report, found = step.run_update(micro_batch=4)
    alpha, total = None, 0.0
    for samples in ([0, 1, 2, 3], [4, 5, 6, 7]):
        for column in range(TIMES):
            alpha, direction = solved_by_hand(step, samples, column, alpha)
            total = total + direction / 4
    assert_close(found, total, rtol=1e-4, atol=1e-5)
    assert_close(torch.from_numpy(report.shares), torch.from_numpy(alpha), rtol=0, atol=1e-4)

    # The second step only uses alpha: advantages mixed with NaN as 0, clipped, one loss over every picture.
    alpha = report.shares
    signal = step.signal()
    mixed = optimality(torch.from_numpy(alpha) @ signal.advantages)[None]
    by_hand = sum(
        step.gradient(micro_loss(step, samples, column, mixed[:, samples])[0]) / 4
        for samples in ([0, 1, 2, 3], [4, 5, 6, 7])
        for column in range(TIMES)
    )
    report, found = step.run_update(micro_batch=4)
    assert_close(found, by_hand, rtol=1e-9, atol=1e-12)
    assert report.passes == 1

    # The third one solves on its first micro-step alone, where the third reward says nothing.
    report, found = step.run_update(micro_batch=4)
    alpha, direction = solved_by_hand(step, [0, 1, 2, 3], 0, alpha)
    assert_close(torch.from_numpy(report.shares), torch.from_numpy(alpha), rtol=0, atol=1e-4)
    assert report.left_out == ("text",)


def test_the_script_differs_from_the_exact_direction():
    exact = Step(make_run("marble_exact", gradients="full")).run_update(4)[1]
    script = Step(make_run("marble_script")).run_update(4)[1]
    cosine = float(exact @ script / exact.norm() / script.norm())
    assert 0.5 < cosine < 0.9999


def test_rewards_that_say_nothing_leave_the_distance_alone():
    values = make_rewards()
    values[:] = float("nan")
    step = Step(make_run("marble_script", kl_weight=0.1), rewards=values)
    report, found = step.run_update(4)
    assert report.left_out == report.names
    assert float(found.norm()) > 0
