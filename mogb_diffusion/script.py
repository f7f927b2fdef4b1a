r"""MARBLE as its authors' training script does it, for comparison with what the paper says and with the exact modes.

- The loss of a reward is the mean over the pictures of the *micro-batch* that it applies to, their common part
  included. Gradients shorter than 1e-12 or not finite take no part; one alone is used as it is.
- The min-norm point of the unit gradients is found by SLSQP (ftol 1e-8) on their float32 Gramian; its moving average
  starts from the first solve.
- All micro-steps of the first optimizer step solve, each for itself, and their directions add up. After that every
  ``refresh_every``-th step solves on its *first* micro-step alone.
- All other micro-steps take one backward pass on the combined advantage :math:`\sum_k \bar\alpha_k A_k`, where a reward
  that does not apply adds 0, which is then clipped: the lengths of the gradients and the numbers of pictures are lost.

Shapes: K = objectives, b = pictures of a micro-batch.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from mogb.errors import NonFiniteError
from mogb.jacobian import Jacobian
from mogb_diffusion.balancing import BalanceReport, Update, plain_rows, sum_over_ranks
from mogb_diffusion.nft import optimality
from mogb_diffusion.signals import Signal

if TYPE_CHECKING:
    from mogb_diffusion.balancing import RewardBalancer

_SHORTEST = 1e-12


def slsqp_min_norm(gramian: Float64[np.ndarray, "K K"]) -> Float64[np.ndarray, " K"]:
    """The min-norm point of the simplex by SLSQP, with the script's tolerance; uniform weights if it fails."""
    from scipy.optimize import minimize

    size = len(gramian)
    start = np.full(size, 1 / size)
    found = minimize(
        lambda alpha: 0.5 * alpha @ gramian @ alpha, start, jac=lambda alpha: gramian @ alpha, method="SLSQP",
        bounds=[(0.0, 1.0)] * size, constraints={"type": "eq", "fun": lambda alpha: alpha.sum() - 1.0},
        options={"ftol": 1e-8, "maxiter": 100},
    )  # fmt: skip
    alpha = np.clip(found.x, 0.0, None)
    return alpha / alpha.sum() if found.success and alpha.sum() > 0 else start


class ScriptUpdate(Update):
    """One optimizer step of the script. Micro-steps are averaged, then ranks."""

    def __init__(self, balancer: "RewardBalancer", signal: Signal, samples: Sequence[int], micro_steps: int) -> None:
        super().__init__(balancer)
        self.signal = signal
        every = balancer.choice.interval
        # Ranks solve together, so that they must solve equally often: as often as the one with the fewest micro-steps.
        shortest = -int(balancer.ranks.max(-micro_steps)) if balancer.ranks.size > 1 else micro_steps
        self.solves = shortest if balancer.step == 0 else int(balancer.step % every == 0)
        self.total = micro_steps
        everywhere = balancer.ranks.sum(torch.tensor(float(micro_steps), dtype=torch.float64))
        self.mean_total = float(everywhere) / balancer.ranks.size  # directions are the ranks' mean already
        self.before = balancer._simplex
        self.direction = [torch.zeros_like(param) for param in balancer.parameters]
        self.norms: Float64[np.ndarray, " K"] | None = None
        self.gramian: Float64[np.ndarray, "K K"] | None = None
        self.left_out: tuple[str, ...] = ()

    def add(
        self, terms: Float64[Tensor, "b 2"], distance: Float64[Tensor, " b"] | None, samples: Sequence[int]
    ) -> None:
        factor = self.balancer.run.loss.max_advantage / self.balancer.run.loss.beta * self.balancer.scale.value
        if self.micro_steps < self.solves:
            self._solve(terms, samples, factor, keep=distance is not None)
            if distance is None:
                return
            loss = terms.new_zeros(())
        else:
            loss = factor * (terms * self._combined(samples).to(terms)).sum()
        if distance is not None:
            loss = loss + self.balancer.scale.value * self.balancer.run.loss.kl_weight * distance.mean()
        (loss / self.total).backward()
        self.passes += 1

    def finish(self) -> BalanceReport:
        balancer = self.balancer
        size = balancer.ranks.size
        self._reduce_grads()
        for param, part in zip(balancer.parameters, self.direction, strict=True):
            assert param.grad is not None
            param.grad = param.grad / size + part / (self.mean_total * balancer.scale.value)
        if not all(bool(torch.isfinite(part).all()) for part in self.direction):
            self.drop()
            raise NonFiniteError("direction", None)
        balancer.step += 1
        assert balancer._simplex is not None
        cosines = None
        if self.gramian is not None and self.norms is not None:
            unit = np.divide(balancer._simplex, self.norms, out=np.zeros(len(self.norms)), where=self.norms > 0)
            length = math.sqrt(max(float(unit @ self.gramian @ unit), 0.0))
            scale = self.norms * length
            cosines = np.divide(self.gramian @ unit, scale, out=np.zeros(len(scale)), where=scale > 0)
        return BalanceReport(
            names=self.signal.names, kind="script", coefficients=balancer._simplex.copy(),
            shares=balancer._simplex.copy(), norms=self.norms, cosines=cosines, gramian=self.gramian,
            left_out=self.left_out, passes=self.passes / max(1, self.micro_steps),
        )  # fmt: skip

    def drop(self) -> None:
        """Forgets the step, and what its solves did to the moving average."""
        super().drop()
        self.balancer._simplex = self.before

    def _combined(self, samples: Sequence[int]) -> Float64[Tensor, "b 2"]:
        """The weights of the terms for the combined advantage."""
        alpha = self.balancer._simplex
        assert alpha is not None
        loss = self.balancer.run.loss
        advantages = self.signal.advantages[:, list(samples)].cpu()
        mixed = optimality(
            torch.from_numpy(alpha) @ advantages, max_advantage=loss.max_advantage, mode=loss.advantage_mode
        )
        return torch.stack([2 * mixed - 1, torch.ones_like(mixed)], dim=1) / len(samples)

    def _solve(self, terms: Tensor, samples: Sequence[int], factor: float, *, keep: bool) -> None:
        balancer = self.balancer
        applies = self.signal.applies[:, list(samples)].cpu().double()
        slope = 2 * self.signal.optimality[:, list(samples)].cpu().double() - 1
        mean = applies / applies.sum(dim=1, keepdim=True).clamp(min=1)
        seeds = factor * torch.stack([mean * slope, mean], dim=2).numpy()
        rows = plain_rows(terms, seeds, balancer.parameters, None, retain_graph=keep)
        self.passes += len(seeds)
        blocks = list(rows.blocks)
        sum_over_ranks(blocks, balancer.ranks)
        for block in blocks:
            block.div_(balancer.ranks.size)
        rows = Jacobian(tuple(blocks))
        gramian = rows.gramian().astype(np.float32).astype(np.float64)
        norms = np.sqrt(np.maximum(gramian.diagonal(), 0.0))
        valid = np.isfinite(gramian.diagonal()) & (norms >= _SHORTEST)
        size = len(norms)
        self.left_out = tuple(name for name, ok in zip(self.signal.names, valid, strict=True) if not ok)
        self.gramian, self.norms = gramian, norms
        if not valid.any():
            if balancer._simplex is None:
                balancer._simplex = np.full(size, 1 / size)
            return
        for block in blocks:
            block[torch.from_numpy(~valid).to(block.device)] = 0  # else 0 times NaN would be NaN
        unit = gramian[np.ix_(valid, valid)] / np.outer(norms[valid], norms[valid])
        alpha = np.zeros(size)
        alpha[valid] = slsqp_min_norm(unit) if valid.sum() > 1 else 1.0
        decay = balancer.choice.averaging
        before = balancer._simplex
        balancer._simplex = alpha if before is None else decay * before + (1 - decay) * alpha
        weights = np.zeros(size)
        weights[valid] = norms[valid].mean() * balancer._simplex[valid] / norms[valid]
        for total, part in zip(self.direction, rows.combine(weights), strict=True):
            total.add_(part.to(total.dtype))
