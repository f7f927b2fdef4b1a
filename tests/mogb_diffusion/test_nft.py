"""DiffusionNFT's loss head against the reference's numbers, a naive loop, and the identities that it promises."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mogb_diffusion import combine_optimality, nft_losses, optimality
from mogb_diffusion.nft import nft_terms, nft_weights, reference_kl

CASES = json.loads((Path(__file__).parents[1] / "cases" / "diffusion.json").read_text())["nft_loss"]


def batch(size: int = 3, *, seed: int = 0, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (2, 4, 4)):
    """Velocities, latents and times as nft_losses takes them; the velocity is a leaf."""
    generator = torch.Generator().manual_seed(seed)
    clean, noise, miss, drift = torch.randn(4, size, *shape, generator=generator, dtype=torch.float64)
    time = torch.rand(size, generator=generator, dtype=torch.float64)
    spread = time.reshape(-1, *[1] * len(shape))
    old = noise - clean + 0.5 * miss
    inputs = {
        "velocity": (old + 0.3 * drift).to(dtype).requires_grad_(),
        "old_velocity": old.to(dtype),
        "noised": ((1 - spread) * clean + spread * noise).to(dtype),
        "clean": clean.to(dtype),
        "time": time.to(dtype),
    }
    return inputs, generator


def naive_terms(inputs, beta: float):
    """L+ and L- of every rollout, sample by sample, in the words of the reference: weighted velocities."""
    toward, away = [], []
    for i, time in enumerate(inputs["time"].double().tolist()):
        v, old, x_t, x_0 = (inputs[key][i].double() for key in ("velocity", "old_velocity", "noised", "clean"))
        for sink, mixed in ((toward, beta * v + (1 - beta) * old), (away, (1 + beta) * old - beta * v)):
            error = x_t - time * mixed - x_0
            weight = max(error.detach().abs().sum().item() / error.numel(), 1e-5)
            sink.append((error * error / weight).sum() / error.numel())
    return toward, away


def naive_losses(inputs, values, mask, beta: float, scale: float):
    """The formula of the contract, one reward and one rollout at a time."""
    toward, away = naive_terms(inputs, beta)
    losses = []
    for r, m in zip(values.tolist(), mask.tolist(), strict=True):
        common = sum((plus + minus) / 2 for plus, minus in zip(toward, away, strict=True)) / len(toward)
        slope = sum(m_i * (r_i - 0.5) * (p - q) for m_i, r_i, p, q in zip(m, r, toward, away, strict=True))
        losses.append(scale / beta * (common + slope / max(sum(m), 1)))
    return torch.stack(losses)


def gradients(losses, velocity):
    return torch.stack([torch.autograd.grad(loss, velocity, retain_graph=True)[0] for loss in losses])


def case_inputs(case):
    given = {key: torch.tensor(value, dtype=torch.float64) for key, value in case["inputs"].items()}
    latents, predictions = (getattr(torch, case[key].removeprefix("torch.")) for key in ("dtype", "pred_dtype"))
    return {
        "velocity": given["forward_prediction"].to(predictions).requires_grad_(),
        "old_velocity": given["old_prediction"].to(predictions),
        "noised": given["xt"].to(latents),
        "clean": given["x0"].to(latents),
        "time": given["t"].to(latents),
    }, given


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_the_reference_losses_and_gradients_are_reproduced(case):
    inputs, given = case_inputs(case)
    expected = case["expected"]
    double = case["dtype"] == "torch.float64"
    close = {"rtol": 1e-6, "atol": 1e-8} if double else {"rtol": 2e-5, "atol": 1e-6}

    def check(actual, key):
        assert_close(actual.detach().double(), torch.tensor(expected[key], dtype=torch.float64), **close)

    clip = case["adv_clip_max"]
    r = optimality(given["advantages"], max_advantage=clip, mode=case["adv_mode"])
    assert_close(r, torch.tensor(expected["r"], dtype=torch.float64), rtol=1e-6, atol=1e-8)
    terms = nft_terms(**inputs, beta=case["beta"])
    check(terms[:, 1] + terms[:, 0], "positive_loss")
    check(terms[:, 1] - terms[:, 0], "negative_loss")
    policy = nft_losses(**inputs, optimality=r[None], beta=case["beta"], scale=clip)
    kl = reference_kl(inputs["velocity"], given["ref_prediction"].to(inputs["velocity"]))
    check(kl, "kl_div")
    total = policy[0] + case["kl_weight"] * kl
    check(total, "total_loss")
    total.backward()
    check(inputs["velocity"].grad, "grad_forward_prediction")


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize(("rewards", "size"), [(1, 1), (3, 1), (1, 4), (5, 3)])
def test_losses_and_gradients_equal_a_naive_loop(rewards, size, beta):
    inputs, generator = batch(size, seed=rewards)
    values = torch.rand(rewards, size, generator=generator, dtype=torch.float64)
    losses = nft_losses(**inputs, optimality=values, beta=beta, scale=5.0)
    expected = naive_losses(inputs, values, torch.ones_like(values), beta, 5.0)
    assert losses.shape == (rewards,)
    assert losses.dtype == torch.float64
    assert_close(losses, expected, rtol=1e-13, atol=0)
    velocity = inputs["velocity"]
    assert_close(gradients(losses, velocity), gradients(expected, velocity), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_a_mask_divides_only_the_part_that_depends_on_the_reward(dtype):
    inputs, generator = batch(4)
    values = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]])
    losses = nft_losses(**inputs, optimality=values, beta=0.1, scale=5.0, mask=mask.to(dtype))
    expected = naive_losses(inputs, values, mask, 0.1, 5.0)
    assert_close(losses, expected, rtol=1e-13, atol=0)
    velocity = inputs["velocity"]
    assert_close(gradients(losses, velocity), gradients(expected, velocity), rtol=1e-12, atol=1e-15)
    half = nft_losses(**inputs, optimality=torch.full((1, 4), 0.5).double(), beta=0.1, scale=5.0)
    assert_close(losses[2:], half, rtol=1e-15, atol=0)


def test_optimality_where_the_mask_is_zero_does_not_matter():
    inputs, generator = batch(3)
    values = torch.rand(2, 3, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    hidden = values.masked_fill(~mask, torch.nan)
    losses = [nft_losses(**inputs, optimality=given, beta=1.0, mask=mask) for given in (values, hidden)]
    assert torch.equal(*losses)


def test_the_weight_tensor_is_slope_and_common_part():
    values = torch.tensor([[1.0, 0.5, 0.0], [0.25, 0.75, 0.5]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    weights = nft_weights(values, beta=0.5, scale=5.0, mask=mask)
    # 5 / 0.5 = 10. Reward 0 is divided by its two rollouts, reward 1 by three; the common part by three, always.
    slope = torch.tensor([[10 * 1 / 2, 0, 0], [10 * -0.5 / 3, 10 * 0.5 / 3, 0]], dtype=torch.float64)
    assert_close(weights[..., 0], slope)
    assert_close(weights[..., 1], torch.full((2, 3), 10 / 3, dtype=torch.float64))
    inputs, _ = batch(3)
    from_terms = torch.einsum("kij,ij->k", weights, nft_terms(**inputs, beta=0.5))
    assert_close(from_terms, naive_losses(inputs, values, mask, 0.5, 5.0), rtol=1e-13, atol=0)


@given(
    rewards=st.integers(1, 6),
    size=st.integers(1, 5),
    seed=st.integers(0, 2**16),
    clipped=st.booleans(),
    beta=st.sampled_from([0.1, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_a_weighted_sum_of_losses_is_one_loss(rewards, size, seed, clipped, beta):
    inputs, generator = batch(size, seed=seed, shape=(2, 2, 2))
    spread = 8.0 if clipped else 1.0
    values = optimality(spread * torch.randn(rewards, size, generator=generator, dtype=torch.float64))
    weights = torch.rand(rewards, generator=generator, dtype=torch.float64) * 3
    total, mixed = combine_optimality(weights, values)
    assert total.dtype == mixed.dtype == torch.float64
    assert mixed.min() >= -1e-15
    assert mixed.max() <= 1 + 1e-15
    several = weights @ nft_losses(**inputs, optimality=values, beta=beta)
    one = total * nft_losses(**inputs, optimality=mixed[None], beta=beta)[0]
    assert_close(one, several, rtol=1e-14, atol=0)
    pair = gradients(torch.stack([one, several]), inputs["velocity"])
    assert (pair[0] - pair[1]).abs().max() <= 1e-14 * pair[1].abs().max()


def test_mixing_clipped_optimalities_is_exact_and_mixing_advantages_is_not():
    inputs, _ = batch(2)
    advantages = torch.tensor([[9.0, -1.0], [-2.0, 8.0]], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    exact = weights @ nft_losses(**inputs, optimality=optimality(advantages), beta=1.0)
    total, mixed = combine_optimality(weights, optimality(advantages))
    assert_close(total * nft_losses(**inputs, optimality=mixed[None], beta=1.0)[0], exact, rtol=1e-14, atol=0)
    sloppy = nft_losses(**inputs, optimality=optimality(weights @ advantages)[None], beta=1.0)[0]
    assert abs(sloppy - exact) > 1e-2 * abs(exact)


def test_combined_optimality_by_hand():
    values = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    for weights in (torch.tensor([0.3, 1.1]), np.array([0.3, 1.1]), [0.3, 1.1]):
        total, mixed = combine_optimality(weights, values)
        assert float(total) == pytest.approx(1.4)
        assert_close(mixed, torch.tensor([0.85 / 1.4, 0.55 / 1.4], dtype=torch.float64), rtol=1e-6, atol=0)


def test_weights_of_zero_combine_to_nothing():
    total, mixed = combine_optimality([0.0, 0.0], torch.rand(2, 3))
    assert total == 0
    assert torch.equal(mixed, torch.full((3,), 0.5, dtype=torch.float64))


def test_combining_refuses_masks_and_says_why():
    with pytest.raises(ValueError, match=r"does not hold under a mask.*own rollouts.*mask=mask\)\)\.backward"):
        combine_optimality([1.0, 1.0], torch.rand(2, 3), mask=torch.ones(2, 3))
    # And it is right to: this mixture of two masked losses would need an optimality beyond 1.
    inputs, _ = batch(3)
    values = torch.tensor([[1.0, 0.5, 0.5], [0.5, 1.0, 0.5]], dtype=torch.float64)
    mask = torch.tensor([[1, 0, 0], [0, 1, 0]])
    losses = nft_losses(**inputs, optimality=values, beta=1.0, mask=mask)
    needed = torch.tensor([0.5 + 3 / 4, 0.5 + 3 / 4, 0.5], dtype=torch.float64)
    assert needed.max() > 1
    toward, away = (torch.stack(parts) for parts in naive_terms(inputs, 1.0))
    assert_close(2 * (needed * toward + (1 - needed) * away).mean(), losses.sum(), rtol=1e-13, atol=0)


def test_balancing_with_given_weights_is_the_amortised_backward():
    import mogb

    model = torch.nn.Linear(8, 8).double()
    inputs, generator = batch(4, shape=(8,))
    values = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    weights = [0.2, 0.7, 0.4]

    def losses(given):
        return nft_losses(**inputs | {"velocity": model(inputs["noised"])}, optimality=given, beta=0.1, scale=5.0)

    mogb.backward(losses(values), model, mogb.make("weighted_sum", weights=weights))
    balanced = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    total, mixed = combine_optimality(weights, values)
    (total * losses(mixed)).sum().backward()
    assert_close([parameter.grad for parameter in model.parameters()], balanced, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("on_policy", "rank"), [(False, 2), (True, 1)])
def test_terms_and_weights_give_all_gradients_in_two_passes_and_on_policy_in_one(on_policy, rank):
    from mogb.engines.per_sample import PerSample

    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 8)).double()
    inputs, generator = batch(4, shape=(8,))
    values = torch.rand(5, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(5, 4, generator=generator) < 0.7
    with PerSample(model) as engine:
        velocity = model(inputs["noised"])
        inputs["velocity"] = velocity
        inputs["old_velocity"] = velocity.detach() if on_policy else inputs["old_velocity"]
        jacobian = engine.gradients(
            nft_terms(**inputs, beta=0.1), nft_weights(values, beta=0.1, scale=5.0, mask=mask), retain_graph=True
        )
    assert engine.report.rank == rank
    expected = naive_losses(inputs, values, mask, 0.1, 5.0)
    for block, parameter in zip(jacobian.blocks, model.parameters(), strict=True):
        rows = torch.stack([torch.autograd.grad(loss, parameter, retain_graph=True)[0] for loss in expected])
        assert_close(block, rows, rtol=1e-11, atol=1e-13)


def test_on_policy_the_common_gradient_is_zero_to_the_bit_and_the_value_knows_no_reward():
    inputs, generator = batch(4)
    inputs["velocity"] = inputs["old_velocity"].clone().requires_grad_()
    terms = nft_terms(**inputs, beta=0.1)
    assert torch.equal(terms[:, 0], torch.zeros(4, dtype=torch.float64))
    (slope, common) = gradients([terms[:, 0].sum(), terms[:, 1].sum()], inputs["velocity"])
    assert torch.equal(common, torch.zeros_like(common))
    values = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    losses = nft_losses(**inputs, optimality=values, beta=0.1)
    assert_close(losses, losses[:1].expand(3), rtol=1e-15, atol=0)
    factors = (2 * values - 1).reshape(3, 4, 1, 1, 1) / (4 * 0.1)
    assert_close(gradients(losses, inputs["velocity"]), factors * slope, rtol=1e-13, atol=1e-16)


def test_an_exact_prediction_has_loss_zero_and_no_nan():
    inputs, _ = batch(2)
    time = inputs["time"].reshape(-1, 1, 1, 1)
    exact = (inputs["noised"] - inputs["clean"]) / time
    inputs |= {"velocity": exact.clone().requires_grad_(), "old_velocity": exact}
    losses = nft_losses(**inputs, optimality=torch.ones(1, 2), beta=1.0)
    losses.sum().backward()
    assert losses.item() < 1e-25
    assert inputs["velocity"].grad.isfinite().all()


def test_errors_below_the_floor_are_divided_by_the_floor():
    # x_t = 0, t = 1, x_0 = 0, v = v_old = 1e-6: the mean error is 1e-6 < 1e-5, so L = 1e-12 / 1e-5.
    zeros, small = torch.zeros(1, 2, dtype=torch.float64), torch.full((1, 2), 1e-6, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    losses = nft_losses(small, small, noised=zeros, clean=zeros, time=one, optimality=one[None], beta=1.0)
    assert_close(losses, torch.tensor([1e-7], dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_adaptive_weight_carries_no_gradient():
    # One number, x_t = x_0 = 0, t = 1, beta = 1, r = 1: L = v^2 / |v|, whose gradient is 2 v / |v| = 2, not 1.
    v = torch.tensor([[3.0]], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    loss = nft_losses(v, zero, noised=zero, clean=zero, time=one, optimality=one[None], beta=1.0)
    loss.sum().backward()
    assert loss.item() == 3.0
    assert v.grad.item() == 2.0


def test_only_the_velocity_gets_a_gradient():
    inputs, _ = batch(2)
    leaves = {key: value.detach().clone().requires_grad_() for key, value in inputs.items()}
    values = torch.rand(1, 2, requires_grad=True)
    nft_losses(**leaves, optimality=values, beta=1.0).sum().backward()
    assert leaves["velocity"].grad.abs().sum() > 0
    assert all(leaves[key].grad is None for key in leaves if key != "velocity")
    assert values.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_are_computed_in_float64(dtype):
    inputs, generator = batch(3, dtype=dtype)
    values = torch.rand(2, 3, generator=generator).to(dtype)
    losses = nft_losses(**inputs, optimality=values, beta=0.1, scale=5.0)
    wide = {key: value.detach().double().requires_grad_(key == "velocity") for key, value in inputs.items()}
    expected = nft_losses(**wide, optimality=values.double(), beta=0.1, scale=5.0)
    assert losses.dtype == torch.float64
    assert torch.equal(losses, expected)
    grad, wide_grad = (gradients(given, of["velocity"]) for given, of in ((losses, inputs), (expected, wide)))
    assert torch.equal(grad, wide_grad.to(dtype))


def test_non_contiguous_latents_and_one_row_of_optimality():
    inputs, generator = batch(2)
    turned = {key: value if value.ndim == 1 else value.mT.contiguous().mT for key, value in inputs.items()}
    assert not turned["clean"].is_contiguous()
    values = torch.rand(2, generator=generator, dtype=torch.float64)
    expected = nft_losses(**inputs, optimality=values[None], beta=1.0)
    assert_close(nft_losses(**turned, optimality=values, beta=1.0), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"velocity": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "velocity must be a floating-point"),
        ({"velocity": torch.ones(3)}, ValueError, r"velocity must have the shape \[B, ...\]"),
        ({"velocity": torch.ones(0, 4)}, ValueError, "B >= 1"),
        ({"old_velocity": torch.ones(3, 5)}, ValueError, r"old_velocity must have the shape of velocity, \[3, 4\]"),
        ({"noised": torch.ones(2, 4)}, ValueError, "noised must have the shape"),
        ({"clean": None}, TypeError, "clean must be a floating-point tensor"),
        ({"time": torch.ones(2)}, ValueError, r"time must have one number per rollout, \[3\]"),
        ({"time": torch.tensor([0.1, 500.0, 1.0])}, ValueError, "0.1 to 500.*Divide timesteps"),
        ({"time": torch.tensor([0.1, torch.nan, 1.0])}, ValueError, r"time must lie in \[0, 1\], but holds NaN"),
        ({"optimality": torch.ones(2, 4)}, ValueError, "one column per rollout, 3"),
        ({"optimality": torch.tensor([[0.2, -1.3, 0.5]])}, ValueError, "-1.3 to 0.5.*mogb_diffusion.optimality"),
        ({"optimality": torch.tensor([[0.2, torch.nan, 0.5]])}, ValueError, "optimality.*NaN"),
        ({"optimality": torch.ones(1, 1, 3)}, ValueError, "optimality must have the shape"),
        ({"beta": 0.0}, ValueError, "beta must be a finite number > 0, but got 0.0"),
        ({"beta": float("nan")}, ValueError, "beta"),
        ({"beta": None}, TypeError, "beta must be a number"),
        ({"scale": -5.0}, ValueError, "scale must be a finite number > 0"),
        ({"mask": torch.ones(2, 3)}, ValueError, "mask must have the shape of optimality"),
        ({"mask": torch.full((1, 3), 0.5)}, ValueError, "mask must hold only True and False"),
        ({"mask": [[True, False, True]]}, TypeError, "mask must be a tensor"),
    ],
)
def test_bad_input_is_named(change, error, message):
    given = {
        "velocity": torch.ones(3, 4),
        "old_velocity": torch.ones(3, 4),
        "noised": torch.ones(3, 4),
        "clean": torch.ones(3, 4),
        "time": torch.full((3,), 0.5),
        "optimality": torch.full((1, 3), 0.5),
        "beta": 1.0,
    }
    nft_losses(**given)
    with pytest.raises(error, match=message):
        nft_losses(**given | change)


@pytest.mark.parametrize(
    ("weights", "values", "message"),
    [
        ([1.0], torch.rand(2, 3), r"weights must have one number per reward, \[2\]"),
        ([1.0, -0.5], torch.rand(2, 3), r"weights must be finite and >= 0.*weights @ nft_losses"),
        ([1.0, float("nan")], torch.rand(2, 3), "finite"),
        ([-1.0, -1.0], torch.rand(2, 3), "finite and >= 0"),
        ([1.0], torch.rand(3), r"optimality must have the shape \[K, B\]"),
        ([1.0], torch.tensor([[1.5]]), r"optimality must lie in \[0, 1\]"),
    ],
)
def test_bad_combinations_are_named(weights, values, message):
    with pytest.raises(ValueError, match=message):
        combine_optimality(weights, values)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("all", [1.0, 0.54, 0.5, 0.46, 0.0]),
        ("positive_only", [1.0, 0.54, 0.5, 0.5, 0.5]),
        ("negative_only", [0.5, 0.5, 0.5, 0.46, 0.0]),
        ("one_only", [0.6, 0.6, 0.5, 0.5, 0.5]),
        ("binary", [0.6, 0.6, 0.5, 0.4, 0.4]),
    ],
)
def test_the_modes_by_hand(mode, expected):
    advantages = torch.tensor([7.0, 0.4, 0.0, -0.4, -torch.inf], dtype=torch.float64)
    assert_close(optimality(advantages, mode=mode), torch.tensor(expected, dtype=torch.float64))


@given(
    values=st.lists(st.floats(-100, 100), min_size=1, max_size=8),
    limit=st.floats(0.1, 50),
    mode=st.sampled_from(["all", "positive_only", "negative_only", "one_only", "binary"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
@settings(max_examples=150, deadline=None)
def test_optimality_lies_in_the_unit_interval_and_grows_with_the_advantage(values, limit, mode, dtype):
    advantages = torch.tensor(sorted(values), dtype=dtype)
    r = optimality(advantages, max_advantage=limit, mode=mode)
    assert r.dtype == dtype
    assert r.shape == advantages.shape
    assert r.min() >= 0
    assert r.max() <= 1
    assert bool((r.diff() >= 0).all())
    assert optimality(torch.zeros(1, dtype=dtype), max_advantage=limit, mode=mode).item() == 0.5


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        (torch.tensor([1, 2]), {}, TypeError, "advantages must be a floating-point tensor"),
        (torch.tensor([torch.nan]), {}, ValueError, "advantages hold NaN.*gives 0"),
        (torch.ones(1), {"max_advantage": 0}, ValueError, "max_advantage must be a finite number > 0"),
        (torch.ones(1), {"mode": "some"}, ValueError, "mode must be one of all, positive_only"),
    ],
)
def test_bad_advantages_are_named(given, options, error, message):
    with pytest.raises(error, match=message):
        optimality(given, **options)


def test_the_kl_of_half_precision_does_not_vanish():
    reference = torch.zeros(2, 3, 4, dtype=torch.float16)
    velocity = torch.full((2, 3, 4), 1e-4, dtype=torch.float16, requires_grad=True)
    assert ((velocity - reference) ** 2).mean() == 0  # what the autocast dtype makes of it
    kl = reference_kl(velocity, reference)
    assert kl.dtype == torch.float32
    assert kl.item() == pytest.approx(1e-8, rel=1e-2)
    assert reference_kl(velocity.double(), reference).dtype == torch.float64


def test_the_kl_is_the_mean_square_and_anchors_only_the_policy():
    velocity = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    reference = torch.tensor([[1.0, 0.0], [0.0, 4.0]], requires_grad=True)
    kl = reference_kl(velocity, reference)
    kl.backward()
    assert kl.item() == (4 + 9) / 4
    assert_close(velocity.grad, torch.tensor([[0.0, 1.0], [1.5, 0.0]]))
    assert reference.grad is None
    with pytest.raises(ValueError, match="reference_velocity must have the shape of velocity"):
        reference_kl(velocity, reference[:1])
