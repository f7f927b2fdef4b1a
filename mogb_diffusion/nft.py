r"""DiffusionNFT: how a velocity model learns from rollouts that came out better or worse than their group.

Two imagined policies stand on either side of the old one: towards the current one, and away from it,

.. math::  v^{\pm} = v_{old} \pm \beta\, (v - v_{old}), \qquad \hat x_0^{\pm} = x_t - t\, v^{\pm}, \qquad
           L^{\pm} = \frac{\operatorname{mean} (\hat x_0^{\pm} - x_0)^2}
                          {\max(\operatorname{mean} |\hat x_0^{\pm} - x_0|,\ 10^{-5})} .

The denominator carries no gradient. A rollout of optimality r in [0, 1] has the loss
:math:`r L^+ + (1 - r) L^-`, so a good one (r = 1) is learnt from directly and a bad one (r = 0) in the mirror.
That is *affine* in r and, with :math:`u = (L^+ - L^-)/2` and :math:`s = (L^+ + L^-)/2`, equal to

.. math::  (2 r - 1)\, u + s .

The K rewards of a batch share u, s and one forward pass, and s is common to all of them. On policy
(:math:`v = v_{old}` to the bit) u and the gradient of s are exactly 0, so that one backward pass gives all K gradients.

Everything here is computed in float64 whatever the dtype of the model: the loss head is tiny beside the model, and
the difference of L+ and L− cancels. Only ``velocity`` receives a gradient.

Source: Zheng et al. 2025, DiffusionNFT (arXiv 2509.16117), and its code, which is followed where they differ: x0-space
errors, the denominator above, the factor max_advantage / beta (``scale`` and ``beta`` here).

Shapes: K = objectives (rewards), B = rollouts; latents and velocities are ``[B, ...]``, usually ``[B, C, H, W]``.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mogb_diffusion import checks
from mogb_diffusion.flow import check_time

AdvantageMode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]

_MODES = ("all", "positive_only", "negative_only", "one_only", "binary")
_ERROR_FLOOR = 1e-5  # of the adaptive weighting: an exact prediction has the loss 0, not NaN
_NEGLIGIBLE = 1e-12  # how negative a solver's zero weight may be, relative to the largest one
_ROUNDING = 1e-6  # how far outside [0, 1] an optimality may lie, so that float32 mixtures pass


def optimality(advantages: Tensor, *, max_advantage: float = 5.0, mode: AdvantageMode = "all") -> Float[Tensor, "..."]:
    r"""Maps advantages of any shape to [0, 1]: :math:`r = 1/2 + a / (2 A_{max})`, a the clipped advantage.

    An advantage of 0 becomes 1/2. Modes, in the words of the reference:

    - ``all``: a is the advantage, clipped to ±max_advantage;
    - ``positive_only``, ``negative_only``: the other sign becomes 0, so r stays in [1/2, 1] or [0, 1/2];
    - ``one_only``: a is 1 where the advantage is positive, else 0. Beware: r is then 1/2 or 1/2 + 1/(2 max_advantage),
      0.6 with the default, not 0 or 1;
    - ``binary``: a is the sign, so r is 0.4, 0.5 or 0.6 with the default.

    Args:
        advantages: Any shape, usually ``[K, B]``; ±Inf is clipped like any large value.
        max_advantage: Where clipping starts. See :func:`mogb_diffusion.advantages.clamp_hits` to count how often.
        mode: Which part of the advantage counts.

    Raises:
        TypeError: No floating-point tensor.
        ValueError: NaN, a max_advantage that is not positive, or an unknown mode.
    """
    checks.floating("advantages", advantages, "[K, B]")
    limit = checks.number("max_advantage", max_advantage, above=0)
    checks.choice("mode", mode, _MODES)
    if bool(advantages.isnan().any()):
        raise ValueError(
            "advantages hold NaN. prompt_advantages gives 0 where a reward does not apply; do the same for "
            "advantages of your own."
        )
    if mode == "one_only":
        counted = (advantages > 0).to(advantages.dtype)
    elif mode == "binary":
        counted = advantages.sign()
    else:
        low = 0.0 if mode == "positive_only" else -limit
        high = 0.0 if mode == "negative_only" else limit
        counted = advantages.clamp(low, high)
    return (counted / limit / 2 + 0.5).clamp(0, 1)


def nft_losses(
    velocity: Tensor,
    old_velocity: Tensor,
    *,
    noised: Tensor,
    clean: Tensor,
    time: Tensor,
    optimality: Tensor,
    beta: float,
    scale: float = 1.0,
    mask: Tensor | None = None,
) -> Float64[Tensor, " K"]:
    r"""The K losses of one batch on one graph, affine in the optimality.

    .. math::  \ell_k = \frac{scale}{\beta} \Big( \operatorname{mean}_i s_i
               + \frac{\sum_i m_{ki} (2 r_{ki} - 1)\, u_i}{\sum_i m_{ki}} \Big)

    Without a mask that is :math:`\frac{scale}{\beta} \operatorname{mean}_i (r_{ki} L^+_i + (1 - r_{ki}) L^-_i)`.
    A mask divides only the part that depends on the reward: the common part s stays common to all K, and a reward
    that applies to no rollout of the batch keeps just that part. Any sum ``weights @ losses`` is one backward pass.

    Args:
        velocity: Of the policy in training, ``[B, ...]``; the only input that receives a gradient.
        old_velocity: Of the policy that drew the rollouts, on the same noised latents.
        noised: The latents at ``time``, as both policies saw them.
        clean: The rollouts' clean latents.
        time: In [0, 1], ``[B]``. Kept on the CPU, it and ``optimality`` are checked without waiting for the device.
        optimality: ``[K, B]`` in [0, 1], from :func:`optimality`; ``[B]`` stands for K = 1. Where the mask is 0 it
            does not matter, and may be NaN.
        beta: How far the imagined policies step, > 0. Smaller is faster and less stable (published: 0.1 and 1).
        scale: One factor on all K losses. With ``scale=max_advantage`` they equal the reference's policy loss.
        mask: ``[K, B]``, True or 1 where the reward applies to the rollout, False or 0 elsewhere.

    Returns:
        float64, ``[K]``, attached to the graph of ``velocity``.

    Raises:
        TypeError: An input is no floating-point tensor.
        ValueError: Shapes that do not fit, times or optimalities outside [0, 1], beta or scale that is not positive,
            or a mask with other values than 0 and 1.
    """
    terms = nft_terms(velocity, old_velocity, noised=noised, clean=clean, time=time, beta=beta)
    weights = nft_weights(optimality, beta=beta, scale=scale, mask=mask)
    if weights.shape[1] != len(terms):
        raise ValueError(
            f"optimality must have one column per rollout, {len(terms)}, but has the shape {list(optimality.shape)}."
        )
    return torch.einsum("kij,ij->k", weights.to(terms.device), terms)


def nft_terms(
    velocity: Tensor, old_velocity: Tensor, *, noised: Tensor, clean: Tensor, time: Tensor, beta: float
) -> Float64[Tensor, "B 2"]:
    r"""The per-rollout terms :math:`(u_i, s_i)` that all K losses are linear in, on the graph of ``velocity``.

    With :func:`nft_weights`, :math:`\ell_k = \sum_{ij} W_{kij}\, term_{ij}`: the form that an engine needs to find
    K gradients in two backward passes. Arguments and errors are those of :func:`nft_losses`.
    """
    checks.floating("velocity", velocity, "[B, ...]")
    if velocity.ndim < 2 or velocity.numel() == 0:
        raise ValueError(f"velocity must have the shape [B, ...] with B >= 1, but has {list(velocity.shape)}.")
    for name, value in (("old_velocity", old_velocity), ("noised", noised), ("clean", clean)):
        checks.same_shape(name, checks.floating(name, value, "[B, ...]"), "velocity", velocity)
    check_time(time, len(velocity))
    beta = checks.number("beta", beta, above=0)

    old, start, target = (tensor.detach().double() for tensor in (old_velocity, noised, clean))
    spread = time.detach().to(start).reshape(-1, *[1] * (start.ndim - 1))
    step = beta * (velocity.double() - old)
    toward = _normalized_error(start - spread * (old + step), target)
    away = _normalized_error(start - spread * (old - step), target)
    return torch.stack([(toward - away) / 2, (toward + away) / 2], dim=1)


def nft_weights(
    optimality: Tensor, *, beta: float, scale: float = 1.0, mask: Tensor | None = None
) -> Float64[Tensor, "K B 2"]:
    r"""The constant W of :math:`\ell_k = \sum_{ij} W_{kij}\, term_{ij}`, for the terms (u, s) of :func:`nft_terms`.

    .. math::  W_{ki0} = \frac{scale}{\beta} \frac{m_{ki} (2 r_{ki} - 1)}{\sum_i m_{ki}}, \qquad
               W_{ki1} = \frac{scale}{\beta B}

    The first column alone gives the part of each gradient that depends on its reward, the second what they share.
    """
    values = _objectives_first("optimality", checks.floating("optimality", optimality, "[K, B]"))
    values = values.detach().double()
    factor = checks.number("scale", scale, above=0) / checks.number("beta", beta, above=0)
    slope = 2 * values - 1
    if mask is None:
        applies = torch.ones_like(values)
    else:
        applies = _as_mask(mask, values)
        slope = torch.where(applies > 0, slope, torch.zeros_like(slope))
    checks.unit_interval(
        "optimality", (slope + 1) / 2, "Map advantages with mogb_diffusion.optimality first.", slack=_ROUNDING
    )
    per_reward = slope / applies.sum(dim=1, keepdim=True).clamp(min=1)
    common = torch.full_like(values, 1 / values.shape[1])
    return factor * torch.stack([per_reward, common], dim=2)


def combine_optimality(
    weights: Tensor | np.ndarray | Sequence[float], optimality: Tensor, mask: Tensor | None = None
) -> tuple[Float64[Tensor, ""], Float64[Tensor, " B"]]:
    r"""The one optimality whose loss is a weighted sum of K losses: the affine amortisation.

    .. math::  total = \sum_k w_k, \qquad \bar r_i = \frac{\sum_k w_k r_{ki}}{total}, \qquad
               \sum_k w_k\, \ell_k(r_k) = total \cdot \ell(\bar r)

    holds because each loss is affine in r, for weights that need not sum to 1. It is the *clipped* optimalities that
    are mixed: mixing advantages and clipping afterwards is another direction as soon as one of them is clipped.

    Args:
        weights: ``[K]``, finite and >= 0. All of them 0 gives the total 0 and 1/2 everywhere.
        optimality: ``[K, B]`` in [0, 1].
        mask: Must stay None; see Raises.

    Returns:
        The total, a scalar, and the mixed optimality ``[B]`` in [0, 1], both float64.

    Raises:
        ValueError: Negative or non-finite weights, or a shape that does not fit; or a mask. Under a mask each reward is
            averaged over its own rollouts, so the mixture would need :math:`\sum_k w_k m_{ki} (2 r_{ki} - 1) B / n_k`,
            which leaves [0, 1] and is no optimality. ``weights @ nft_losses(..., mask=mask)`` is exact there, at the
            same price of one backward pass.
    """
    if mask is not None:
        raise ValueError(
            "combine_optimality does not hold under a mask: every reward is then averaged over its own rollouts, "
            "and no single optimality in [0, 1] gives the weighted sum. "
            "Use (weights @ nft_losses(..., mask=mask)).backward(), which is one backward pass too."
        )
    values = checks.floating("optimality", optimality, "[K, B]").detach().double()
    if values.ndim != 2 or values.numel() == 0:
        raise ValueError(f"optimality must have the shape [K, B], but has {list(values.shape)}.")
    checks.unit_interval("optimality", values, "Map advantages with mogb_diffusion.optimality first.", slack=_ROUNDING)
    given = checks.real_numbers("weights", weights, "[K]").to(values.device, torch.float64)
    if given.shape != values.shape[:1]:
        raise ValueError(f"weights must have one number per reward, [{len(values)}], but have {list(given.shape)}.")
    if not bool((given.isfinite() & (given >= -_NEGLIGIBLE * given.max())).all()):
        raise ValueError(
            f"weights must be finite and >= 0, so that the mixture stays in [0, 1], but got {given.tolist()}. "
            "For a method with negative weights use (weights @ nft_losses(...)).backward(), which is exact."
        )
    total = given.sum()
    if float(total) == 0:
        return total, torch.full_like(values[0], 0.5)
    return total, given @ values / total


def reference_kl(velocity: Tensor, reference_velocity: Tensor) -> Float[Tensor, ""]:
    r"""The anchor to the reference, :math:`\operatorname{mean} (v - v_{ref})^2`, added after balancing.

    Up to a constant it is the KL divergence of two Gaussian steps of equal width. In float32 or wider, also when the
    velocities are narrower: the square of a difference of 1e-4 is 0 in float16. The reference gets no gradient. In the
    reference code the term is in the autocast dtype and its weight is 1e-4.
    """
    checks.floating("velocity", velocity, "[B, ...]")
    checks.floating("reference_velocity", reference_velocity, "[B, ...]")
    checks.same_shape("reference_velocity", reference_velocity, "velocity", velocity)
    dtype = checks.at_least_float32(velocity, reference_velocity)
    return (velocity.to(dtype) - reference_velocity.detach().to(dtype)).square().mean()


def _normalized_error(estimate: Float64[Tensor, "B ..."], target: Float64[Tensor, "B ..."]) -> Float64[Tensor, " B"]:
    error = (estimate - target).flatten(1)
    size = error.detach().abs().mean(dim=1).clamp(min=_ERROR_FLOOR)
    return error.square().mean(dim=1) / size


def _objectives_first(name: str, values: Tensor) -> Tensor:
    rows = values[None] if values.ndim == 1 else values
    if rows.ndim != 2 or rows.numel() == 0:
        raise ValueError(f"{name} must have the shape [K, B], or [B] for one reward, but has {list(values.shape)}.")
    return rows


def _as_mask(mask: Tensor, values: Float64[Tensor, "K B"]) -> Float64[Tensor, "K B"]:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor [K, B] of bools, or of 0 and 1, but got {type(mask).__name__}.")
    rows = _objectives_first("mask", mask).detach().to(values.device, torch.float64)
    checks.same_shape("mask", rows, "optimality", values)
    if not bool(((rows == 0) | (rows == 1)).all()):
        raise ValueError("mask must hold only True and False, or 1 and 0. Put weights on the losses instead.")
    return rows
