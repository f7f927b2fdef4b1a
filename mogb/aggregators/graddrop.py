r"""GradDrop: in every coordinate, only the gradients of one sign, drawn at random.

With the positive and the negative part of each coordinate of the summed gradients, :math:`p_n = \sum_k \max(J_{kn}, 0)`
and :math:`q_n = \sum_k \max(-J_{kn}, 0)`,

.. math::  d_n = \begin{cases} p_n & \text{if } p_n / (p_n + q_n) > U_n \\ -q_n & \text{otherwise} \end{cases}
           \qquad U_n \sim \text{uniform on } [0, 1) .

Shapes: K = objectives, N = numbers in one gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mogb.base import JacobianAggregator, Promise, Reference, state
from mogb.jacobian import CHUNK_CUDA, Jacobian

# Numbers that are treated at once on a CPU, so that the work stays in the cache.
CACHED = 1 << 17


@dataclass(kw_only=True)
class GradDrop(JacobianAggregator, name="graddrop"):
    r"""Keeps the sum of the gradients that have the drawn sign, on parameters.

    The paper drops activations' gradients at one layer. This is the form on parameters of the FAMO repository: its
    function averages the K masked gradients, its training loop multiplies by K again, and this returns that sum.

    Args:
        leak: How much of each gradient passes whatever its sign: one number in [0, 1] for all objectives or one for
            each. The direction is :math:`\sum_k (l_k + (1 - l_k) M_k) g_k` with the masks M.
        seed: Of the draws. On the CPU they are those of ``torch.rand`` under the same seed.

    Examples:
        >>> import torch
        >>> GradDrop(seed=0)(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
        tensor([6., 2., 2.])
    """

    reference: ClassVar = Reference(
        authors="Z. Chen, J. Ngiam, Y. Huang, T. Luong, H. Kretzschmar, Y. Chai and D. Anguelov",
        title="Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout",
        venue="Advances in Neural Information Processing Systems",
        year=2020,
        arxiv="2010.06808",
        code="Cranial-XIX/FAMO",
    )
    promises: ClassVar = frozenset({Promise.HOMOGENEOUS})

    leak: float | Sequence[float] = 0.0
    seed: int = 0
    _generator: torch.Generator = state(kind="generator")

    def _check(self) -> None:
        if not isinstance(self.leak, (int, float)):
            self.leak = tuple(float(leak) for leak in self.leak)
        if not (np.size(self.leak) and np.min(self.leak) >= 0 and np.max(self.leak) <= 1):
            raise ValueError(f"leak must be in [0, 1], one number or one per objective, but got {self.leak!r}.")

    def _start(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def _direction(self, jacobian: Jacobian, losses: Float64[np.ndarray, " K"] | None) -> tuple[Tensor, ...]:
        leaks = np.array(self.leak) if isinstance(self.leak, tuple) else np.full(len(jacobian), self.leak)
        if len(leaks) != len(jacobian):
            raise ValueError(f"leak must have one number per objective, {len(jacobian)}, but has {len(leaks)}.")
        return jacobian.map(lambda rows: self._drop(rows, leaks))

    def _drop(self, rows: Float[Tensor, "K N"], leaks: Float64[np.ndarray, " K"]) -> Float[Tensor, " N"]:
        size, length = rows.shape
        luck = self._draw(length, rows.device)
        width = max(1, CACHED // size) if rows.is_cpu else max(1, CHUNK_CUDA // size)
        direction = rows.new_empty(length)
        for start in range(0, length, width):
            part = slice(start, start + width)
            direction[part] = _pick_sign(rows[:, part], luck[part], leaks)
        return direction

    def _draw(self, length: int, device: torch.device) -> Float[Tensor, " N"]:
        if device.type == "cpu":
            return torch.rand(length, generator=self._generator)
        seed = int(torch.randint(2**62, (), generator=self._generator))
        return torch.rand(length, generator=torch.Generator(device).manual_seed(seed), device=device)


def _pick_sign(
    rows: Float[Tensor, "K n"], luck: Float[Tensor, " n"], leaks: Float64[np.ndarray, " K"]
) -> Float[Tensor, " n"]:
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    above, below = rows.clamp(min=0), rows.clamp(max=0)
    positive, negative = above.sum(dim=0), below.sum(dim=0)
    keep = positive * (1 - luck) > negative * -luck  # p / (p + q) > U, and Inf stays visible
    if not leaks.any():
        return torch.where(keep, positive, negative)
    leak = torch.from_numpy(leaks).to(rows.device, rows.dtype)
    return leak @ rows + torch.where(keep, (1 - leak) @ above, (1 - leak) @ below)
