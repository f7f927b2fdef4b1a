"""The straight line between latent and noise, and its time grids."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mogb_diffusion import flow

CASES = json.loads((Path(__file__).parents[1] / "cases" / "diffusion.json").read_text())["solver"]["cases"]


def pair(shape=(3, 2, 4), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return clean, noise, torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)


def test_the_line_by_hand():
    clean, noise = torch.tensor([[2.0], [2.0]]), torch.tensor([[10.0], [10.0]])
    time = torch.tensor([0.25, 1.0])
    assert flow.noised(clean, noise, time).tolist() == [[4.0], [10.0]]
    assert flow.velocity_target(clean, noise).tolist() == [[8.0], [8.0]]


def test_the_target_velocity_leads_back_to_both_ends():
    clean, noise, time = pair()
    middle, velocity = flow.noised(clean, noise, time), flow.velocity_target(clean, noise)
    assert torch.equal(middle[0], clean[0])
    assert torch.equal(middle[2], noise[2])
    assert_close(flow.clean_from_velocity(middle, velocity, time), clean)
    assert_close(flow.noise_from_velocity(middle, velocity, time), noise)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_latents_keep_their_dtype_and_are_rounded_once(dtype):
    clean, noise, time = pair(dtype=dtype)
    for function in (flow.noised, flow.clean_from_velocity, flow.noise_from_velocity):
        actual = function(clean, noise, time)
        assert actual.dtype == dtype
        assert torch.equal(actual, function(clean.float(), noise.float(), time).to(dtype))


@pytest.mark.parametrize("case", CASES, ids=[f"{case['solver']}-{case['steps']}" for case in CASES])
def test_the_grid_of_the_reference_is_reproduced(case):
    assert_close(
        flow.sd3_sigmas(case["steps"]), torch.tensor(case["sigmas"], dtype=torch.float64), rtol=2e-5, atol=1e-6
    )


def test_the_published_timesteps_of_ten_steps():
    published = [1000, 960.129, 913.349, 857.692, 790.368, 707.279, 602.151, 464.876, 278.049, 8.929, 0]
    assert_close(flow.sd3_sigmas(10) * 1000, torch.tensor(published, dtype=torch.float64), rtol=0, atol=6e-4)


def test_the_end_shifted_once_is_the_shifted_thousandth():
    # 3 * 0.001 / (1 + 2 * 0.001); twice: the same map applied to the result.
    once = 0.003 / 1.002
    twice = 3 * once / (1 + 2 * once)
    assert flow.sd3_sigmas(7, shift_end_twice=False)[-2].item() == pytest.approx(once, rel=1e-14)
    assert flow.sd3_sigmas(7)[-2].item() == pytest.approx(twice, rel=1e-14)
    assert twice == pytest.approx(0.00893, abs=5e-6)


@given(steps=st.integers(1, 60), shift=st.floats(0.2, 8))
@settings(max_examples=60, deadline=None)
def test_grids_fall_strictly_from_one_to_zero(steps, shift):
    for grid in (
        flow.sd3_sigmas(steps, shift=shift),
        flow.sd3_sigmas(steps, shift=shift, shift_end_twice=False),
        flow.linear_sigmas(steps, shift=shift),
    ):
        assert grid.shape == (steps + 1,)
        assert grid.dtype == torch.float64
        assert grid[0] == 1
        assert grid[-1] == 0
        assert bool((grid.diff() < 0).all())


@given(first=st.floats(0.2, 5), second=st.floats(0.2, 5))
@settings(max_examples=50, deadline=None)
def test_shifts_multiply(first, second):
    grid = flow.linear_sigmas(9)
    assert_close(flow.shifted(flow.shifted(grid, first), second), flow.shifted(grid, first * second))
    assert_close(flow.shifted(grid, 1.0), grid)
    assert flow.linear_sigmas(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"clean": torch.ones(3)}, ValueError, "noise must have the shape of clean"),
        ({"clean": torch.ones(3), "noise": torch.ones(3)}, ValueError, r"clean must have the shape \[B, ...\]"),
        ({"clean": [1.0]}, TypeError, "clean must be a floating-point tensor"),
        ({"time": torch.tensor([1, 2, 3])}, TypeError, "time must be a floating-point tensor"),
        ({"time": torch.tensor([0.5])}, ValueError, "one number per rollout"),
        ({"time": torch.tensor([0.5, -0.1, 0.2])}, ValueError, "-0.1 to 0.5"),
    ],
)
def test_bad_latents_and_times_are_named(change, error, message):
    given = {"clean": torch.ones(3, 2), "noise": torch.ones(3, 2), "time": torch.full((3,), 0.5)}
    with pytest.raises(error, match=message):
        flow.noised(**given | change)


def test_bad_grids_are_named():
    for steps in (0, -3, 2.0, True):
        with pytest.raises(ValueError, match="num_steps must be an integer >= 1"):
            flow.sd3_sigmas(steps)
    with pytest.raises(ValueError, match="shift must be a finite number > 0"):
        flow.linear_sigmas(4, shift=0)
