r"""From noise to a clean latent: solvers of the probability-flow equation :math:`dx/d\sigma = v(x, \sigma)`.

- ``euler``: :math:`x \leftarrow x + (\sigma' - \sigma) v`, first order. On this line DDIM and first-order DPM-Solver++
  are the same steps.
- ``dpm2``: DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2) with :math:`\alpha = 1 - \sigma`, on the
  predicted clean latent :math:`m = x - \sigma v`: with :math:`\lambda = \log(\alpha / \sigma)` and h the length of a
  step in λ,

  .. math::  x \leftarrow \frac{\sigma'}{\sigma} x + \Big(\alpha' - \alpha \frac{\sigma'}{\sigma}\Big)
             \Big(m + \frac{h}{2 h_{before}} (m - m_{before})\Big) .

  As in the reference of DiffusionNFT the first and the last step are of first order. Beware of the step before the
  last: on the grid of :func:`mogb_diffusion.flow.sd3_sigmas` its h is so much longer than the one before that
  it extrapolates by :math:`h / (2 h_{before}) (1 - e^{-h})` = 2.25 differences (10 steps; 1.82 with 25, 1.54 with 40),
  and where the answer is known, dpm2 with 10 steps is *worse* than euler. It is kept for parity with published runs.

Shapes: latents are ``[B, ...]``; S = the times of a grid.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mogb_diffusion import checks

Solver = Literal["euler", "dpm2"]
VelocityFn = Callable[[Tensor, float], Tensor]


@torch.no_grad()
def integrate(
    velocity_fn: VelocityFn, noise: Tensor, sigmas: Tensor | Sequence[float], solver: Solver = "euler"
) -> Float[Tensor, "B ..."]:
    """The clean latents that a velocity field leads the noise to, without gradient.

    Args:
        velocity_fn: ``velocity_fn(latents, sigma)``, with latents in the dtype of ``noise`` and sigma a Python float
            in (0, 1]; called once per step. Rounding sigma to a timestep of the model is its business.
        noise: ``[B, ...]``, the latents at ``sigmas[0]``. Between the calls they are kept in float32 or wider.
        sigmas: The grid, strictly decreasing in [0, 1], from :mod:`mogb_diffusion.flow`. It usually ends in 0.
        solver: ``"euler"`` or ``"dpm2"``; see the module for how they differ.

    Returns:
        The latents at ``sigmas[-1]``, in the dtype of ``noise``.

    Raises:
        TypeError: ``noise``, or what velocity_fn gave, is no floating-point tensor.
        ValueError: A grid that does not decrease within [0, 1], an unknown solver, or a velocity of another shape.
    """
    checks.floating("noise", noise, "[B, ...]")
    checks.choice("solver", solver, ("euler", "dpm2"))
    grid = _as_grid(sigmas)
    latents = noise.to(checks.at_least_float32(noise))
    before: tuple[float, Tensor] | None = None
    for sigma, following in pairwise(grid):
        velocity = checks.floating("What velocity_fn returns", velocity_fn(latents.to(noise.dtype), sigma), "[B, ...]")
        checks.same_shape("What velocity_fn returns", velocity, "noise", noise)
        velocity = velocity.to(latents.dtype)
        if solver == "euler":
            latents = latents + (following - sigma) * velocity
        else:
            clean = latents - sigma * velocity
            target = clean if following == grid[-1] else _extrapolated(clean, before, sigma, following)
            ratio = following / sigma
            latents = ratio * latents + ((1 - following) - (1 - sigma) * ratio) * target
            before = sigma, clean
    return latents.to(noise.dtype)


def _extrapolated(clean: Tensor, before: tuple[float, Tensor] | None, sigma: float, following: float) -> Tensor:
    """The clean latent of the middle of the step, on the line through the last two predictions."""
    if before is None:
        return clean
    ahead = (_log_snr(following) - _log_snr(sigma)) / (_log_snr(sigma) - _log_snr(before[0]))
    return clean + ahead / 2 * (clean - before[1])


def _log_snr(sigma: float) -> float:
    return -math.inf if sigma == 1 else math.log((1 - sigma) / sigma)


def _as_grid(sigmas: Tensor | Sequence[float]) -> list[float]:
    grid = checks.real_numbers("sigmas", sigmas, "[S]").double()
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"sigmas must be a list of at least two times, but has the shape {list(grid.shape)}.")
    checks.unit_interval("sigmas", grid, "Divide timesteps of 0 to 1000 by 1000.")
    values: list[float] = grid.tolist()
    if any(following >= sigma for sigma, following in pairwise(values)):
        raise ValueError(
            f"sigmas must decrease strictly, from noise to clean, but got {values}. Take them from "
            "mogb_diffusion.flow.sd3_sigmas(num_steps)."
        )
    return values
