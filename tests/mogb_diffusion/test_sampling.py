"""The solvers against the reference's trajectories and against fields whose answer is known."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from mogb_diffusion.flow import linear_sigmas, sd3_sigmas
from mogb_diffusion.sampling import integrate

CASES = json.loads((Path(__file__).parents[1] / "cases" / "diffusion.json").read_text())["solver"]["cases"]
SOLVERS = {"dpm2": "dpm2", "flow": "euler", "dpm1": "euler", "ddim": "euler"}  # first order: all the same steps


def linear(latents, sigma):
    return 0.5 * latents - 0.2 * sigma + 0.1


def gaussian(latents, sigma):
    """Exact for clean latents distributed as N(1, 1/4): noise z ends at 1 + z / 2."""
    alpha = 1 - sigma
    variance = 0.25 * alpha**2 + sigma**2
    clean = 1 + 0.25 * alpha / variance * (latents - alpha)
    return sigma / variance * (latents - alpha) - clean


FIELDS = {"linear": linear, "gaussian": gaussian}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=[f"{c['solver']}-{c['velocity']}-{c['steps']}" for c in CASES])
def test_the_reference_trajectories_are_reproduced(case, dtype):
    seen = []

    def velocity(latents, sigma):
        seen.append((latents, sigma))
        return FIELDS[case["velocity"]](latents, sigma)

    final = integrate(velocity, torch.tensor(case["z0"], dtype=dtype), case["sigmas"], SOLVERS[case["solver"]])
    for actual, key in ((seen[1][0], "second"), (seen[2][0], "third"), (final, "final")):
        assert actual.dtype == dtype
        assert_close(actual, torch.tensor(case[key], dtype=dtype), rtol=2e-5, atol=1e-6)
    assert [sigma for _, sigma in seen] == case["sigmas"][:-1]
    assert all(type(sigma) is float for _, sigma in seen)


@pytest.mark.parametrize(("solver", "published"), [("dpm2", 2.0537), ("euler", 1.5387)])
def test_on_ten_steps_the_second_order_solver_is_the_worse_one(solver, published):
    # The answer for z = 1.5 is 1.75: an error of 0.30 against 0.21.
    final = integrate(gaussian, torch.tensor([[1.5]], dtype=torch.float64), sd3_sigmas(10), solver)
    assert final.item() == pytest.approx(published, abs=5e-5)


@pytest.mark.parametrize(("steps", "factor"), [(10, 2.25), (25, 1.82), (40, 1.54)])
def test_the_step_before_the_last_extrapolates_by_the_stated_factor(steps, factor):
    # A field whose predicted clean latent is 0 until that step and 1 at it: the step adds what it makes of the 1.
    grid = sd3_sigmas(steps).tolist()

    def velocity(latents, sigma):
        clean = 1.0 if sigma <= grid[-3] else 0.0
        return (latents - clean) / sigma

    reached = []
    integrate(lambda z, s: reached.append(z) or velocity(z, s), torch.zeros(1, 1).double(), grid, "dpm2")
    first_order = (1 - grid[-2]) - (1 - grid[-3]) * grid[-2] / grid[-3]
    extra = reached[-1].item() - first_order
    assert extra / (1 - grid[-2]) == pytest.approx(factor, abs=0.01)  # (1 - sigma') (1 - e^-h) h / (2 h_before)


def test_euler_with_a_constant_field_is_exact():
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(integrate(lambda z, s: torch.ones_like(z), noise, [1.0, 0.5, 0.2]), noise - 0.8)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("dpm2", 2)])
def test_errors_shrink_with_the_order_of_the_solver(solver, order):
    noise = torch.tensor([[1.5], [-0.5]], dtype=torch.float64)
    exact = 1 + 0.5 * noise

    def error(steps):  # away from both ends, where the steps in log-SNR are even enough for the order to show
        grid = torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64)
        start = (1 - 0.95) + (exact - 1) * 2 * math.sqrt(0.25 * 0.05**2 + 0.95**2)
        final = integrate(gaussian, start, grid, solver)
        truth = 0.95 + (exact - 1) * 2 * math.sqrt(0.25 * 0.95**2 + 0.05**2)
        return (final - truth).abs().max().item()

    rate = math.log2(error(160) / error(320))
    assert rate == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("solver", ["euler", "dpm2"])
def test_one_step_is_the_predicted_clean_latent(solver):
    noise = torch.tensor([[1.5, -2.0]], dtype=torch.float64)
    assert_close(integrate(linear, noise, [1.0, 0.0], solver), noise - linear(noise, 1.0))


def test_half_precision_is_handed_out_but_not_accumulated_in():
    noise = torch.tensor([[1.0]], dtype=torch.bfloat16)
    seen = []
    final = integrate(lambda z, s: seen.append(z.dtype) or torch.ones_like(z), noise, linear_sigmas(1000))
    assert set(seen) == {torch.bfloat16}
    assert final.dtype == torch.bfloat16
    assert abs(final.item()) < 1e-5  # steps of 0.001 from 1 would be lost in bfloat16


def test_no_graph_is_built():
    weight = torch.ones(1, requires_grad=True)
    noise = torch.ones(1, 1)
    assert not integrate(lambda z, s: weight * z, noise, linear_sigmas(3)).requires_grad
    assert noise.item() == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sigmas": [1.0]}, ValueError, "at least two times"),
        ({"sigmas": [0.0, 0.5, 1.0]}, ValueError, "decrease strictly"),
        ({"sigmas": [1.0, 0.5, 0.5, 0.0]}, ValueError, "decrease strictly"),
        ({"sigmas": [1000.0, 500.0, 0.0]}, ValueError, "Divide timesteps"),
        ({"sigmas": [1.0, float("nan")]}, ValueError, "NaN"),
        ({"sigmas": "fast"}, TypeError, "sigmas must be"),
        ({"solver": "heun"}, ValueError, "solver must be one of euler, dpm2"),
        ({"noise": torch.ones(2, 2, dtype=torch.int64)}, TypeError, "noise must be a floating-point"),
        ({"velocity_fn": lambda z, s: z[:1]}, ValueError, "What velocity_fn returns must have the shape of noise"),
        ({"velocity_fn": lambda z, s: (z,)}, TypeError, "What velocity_fn returns must be a floating-point tensor"),
    ],
)
def test_bad_input_is_named(change, error, message):
    given = {"velocity_fn": linear, "noise": torch.ones(2, 2), "sigmas": [1.0, 0.5, 0.0], "solver": "euler"}
    with pytest.raises(error, match=message):
        integrate(**given | change)
