r"""Rectified flow: the straight line between a clean latent and noise, and the grids of times on it.

.. math::  x_t = (1 - t)\, x_0 + t\, \epsilon , \qquad v = \frac{dx_t}{dt} = \epsilon - x_0 , \qquad
           x_0 = x_t - t\, v , \qquad \epsilon = x_t + (1 - t)\, v

Time t runs from 0 (clean) to 1 (noise); diffusers calls it sigma, and 1000 t the timestep. Pure functions of tensors;
arithmetic happens in float32 or wider, whatever the inputs, and the result has their dtype.

Shapes: B = rollouts; latents are ``[B, ...]``, usually ``[B, C, H, W]``, and time is ``[B]``.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mogb_diffusion import checks

SD3_SHIFT = 3.0  # the shift in the scheduler configuration of Stable Diffusion 3 and 3.5
TRAIN_TIMESTEPS = 1000  # the resolution of that scheduler: its smallest sigma is 1/1000, before any shift


def noised(clean: Tensor, noise: Tensor, time: Tensor) -> Float[Tensor, "B ..."]:
    r""":math:`x_t = (1 - t) x_0 + t \epsilon`: the clean latents ``[B, ...]``, each at its own time ``[B]``."""
    clean, noise, t, dtype = _prepared("clean", clean, "noise", noise, time)
    return ((1 - t) * clean + t * noise).to(dtype)


def velocity_target(clean: Tensor, noise: Tensor) -> Float[Tensor, "B ..."]:
    r""":math:`v = \epsilon - x_0`: what a velocity model learns, at every time of the line."""
    checks.same_shape("noise", checks.floating("noise", noise, "[B, ...]"), "clean", clean)
    return noise - clean


def clean_from_velocity(noised: Tensor, velocity: Tensor, time: Tensor) -> Float[Tensor, "B ..."]:
    r""":math:`\hat x_0 = x_t - t v`: the clean latents that a velocity points to."""
    noised, velocity, t, dtype = _prepared("noised", noised, "velocity", velocity, time)
    return (noised - t * velocity).to(dtype)


def noise_from_velocity(noised: Tensor, velocity: Tensor, time: Tensor) -> Float[Tensor, "B ..."]:
    r""":math:`\hat\epsilon = x_t + (1 - t) v`: the noise that a velocity comes from."""
    noised, velocity, t, dtype = _prepared("noised", noised, "velocity", velocity, time)
    return (noised + (1 - t) * velocity).to(dtype)


def shifted(sigmas: Tensor, shift: float) -> Tensor:
    r"""Moves a grid towards noise, :math:`\sigma \mapsto s \sigma / (1 + (s - 1) \sigma)`; 0 and 1 stay.

    Shifting by s and then by r is shifting by ``s * r``. Source: Esser et al. 2024 (arXiv 2403.03206), equation 23.
    """
    shift = checks.number("shift", shift, above=0)
    return shift * sigmas / ((1 - sigmas) + shift * sigmas)  # so written, 1 stays 1 to the bit


def linear_sigmas(num_steps: int, *, shift: float = 1.0) -> Float64[Tensor, " S"]:
    """Evenly spaced times from 1 to 0, ``num_steps + 1`` of them, then moved towards noise if ``shift`` is not 1."""
    return shifted(torch.linspace(1, 0, _steps(num_steps) + 1, dtype=torch.float64), shift)


def sd3_sigmas(num_steps: int, *, shift: float = SD3_SHIFT, shift_end_twice: bool = True) -> Float64[Tensor, " S"]:
    r"""The sampling grid of Stable Diffusion 3: ``num_steps`` times from 1 down, and a final 0.

    With :math:`s(\cdot)` for :func:`shifted`, the times are :math:`s` of an even grid from 1 to
    :math:`\sigma_{\min}`. The scheduler of diffusers takes :math:`\sigma_{\min} = s(1/1000)`, which is shifted
    already, so that the smallest time has been shifted twice (0.0089 instead of 0.0030 with the shift 3). The
    reference and every published figure use that grid: it is the default.

    Args:
        num_steps: How many times the velocity is evaluated.
        shift: Of the scheduler configuration.
        shift_end_twice: The reference's grid. False starts from 1/1000, shifted once like every other time.
    """
    end = torch.tensor(1 / TRAIN_TIMESTEPS, dtype=torch.float64)
    if shift_end_twice:
        end = shifted(end, shift)
    times = torch.linspace(1, float(end), _steps(num_steps), dtype=torch.float64)
    return torch.cat([shifted(times, shift), times.new_zeros(1)])


def check_time(time: Tensor, batch: int) -> None:
    """Refuses times that are not ``[B]`` floating-point numbers in [0, 1]."""
    checks.floating("time", time, "[B]")
    if time.shape != (batch,):
        raise ValueError(f"time must have one number per rollout, [{batch}], but has the shape {list(time.shape)}.")
    checks.unit_interval("time", time, "Divide timesteps of 0 to 1000 by 1000.")


def _prepared(
    name: str, first: Tensor, other_name: str, other: Tensor, time: Tensor
) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """Both latents and the time, ready to multiply, and the dtype of the result."""
    checks.floating(name, first, "[B, ...]")
    checks.same_shape(other_name, checks.floating(other_name, other, "[B, ...]"), name, first)
    if first.ndim < 2 or len(first) == 0:
        raise ValueError(f"{name} must have the shape [B, ...] with B >= 1, but has {list(first.shape)}.")
    check_time(time, len(first))
    work = checks.at_least_float32(first, other)
    spread = time.to(first.device, work).reshape(-1, *[1] * (first.ndim - 1))
    return first.to(work), other.to(work), spread, torch.promote_types(first.dtype, other.dtype)


def _steps(num_steps: int) -> int:
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be an integer >= 1, but got {num_steps!r}.")
    return num_steps
