r"""EPO search: descend along a preference ray, and climb toward it where needed.

Let :math:`u_k = r_k L_k / \sum_j r_j L_j` be the shares of the weighted losses, equal on the ray of the preference r,
and :math:`\mu = \sum_k u_k \log(K u_k)` how far from equal they are. The anchor direction
:math:`J^\top a`, :math:`a_k = r_k (\log(K u_k) - \mu)`, moves straight toward the ray. With :math:`c = G a`:

* **balance**, while :math:`\mu > \epsilon`:  :math:`\max_{w \in S} w^\top c` s.t. :math:`(G w)_k \ge c_k` for every k
  with :math:`c_k \le 0`, and :math:`(G w)_k \ge 0` for the largest :math:`r_k L_k`; or, where no :math:`c_k` is
  positive, :math:`G w \ge 0`. Losses that balancing wants to grow may grow, but no faster than along the anchor.
* **dominance**, on the ray:  :math:`\max_{w \in S} \sum_k (G w)_k` s.t. :math:`G w \ge 0` and, if restricted,
  :math:`w^\top c \ge \min(\max_k c_k, 0)`.

S is the simplex. Both are linear programs in K variables (the class ``EPO_LP`` of the official code).

Shapes: K = objectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64
from scipy.optimize import linprog

from mogb.aggregators._options import pick, preference_array
from mogb.aggregators._state import positive_numbers
from mogb.base import GramianLossAggregator, Promise, Reference, Solution
from mogb.solvers.min_norm import solve_min_norm

# What the simplex method may leave of a constraint, on a Gramian scaled to the largest norm 1.
TOLERANCE = 1e-10
# Shares of exactly zero have no logarithm; this is where they stop.
SMALLEST_SHARE = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, kw_only=True)
class EPO(GramianLossAggregator, name="epo"):
    """Simplex weights that lead to the Pareto-optimal point where all :math:`r_k L_k` are equal.

    Mind the meaning of the preference: a *larger* number means a *smaller* loss at the end (other methods take the
    ray of the losses themselves, which has the inverse entries). Losses must not be negative; shares of zero are
    taken as 2e-16.

    Follows the official code, with HiGHS' dual simplex in place of GLPK. Balance and relaxed dominance always have a
    solution, since the min-norm weights are feasible; restricted dominance may have none, where the official code
    fails and this takes the relaxed form, which the note says. A linear program can have several solutions (equal
    gradients, losses exactly on the ray): which one comes out may then depend on the order of the objectives.

    Args:
        preference: Positive numbers r, one per objective; None means equal.
        eps: The non-uniformity below which the losses count as on the ray. 1e-4 as in the official toy experiments.
        restricted: Dominance must not leave the ray more than it has to; False is the relaxed form.

    Raises:
        ValueError: On a call with a negative loss.

    Examples:
        >>> import torch
        >>> EPO().weights(torch.eye(2), torch.tensor([1.0, 2.0]))
        tensor([0., 1.])
    """

    reference: ClassVar = Reference(
        authors="D. Mahapatra and V. Rajan",
        title=(
            "Multi-Task Learning with User Preferences: Gradient Descent with Controlled Ascent in Pareto Optimization"
        ),
        venue="ICML",
        year=2020,
        url="https://proceedings.mlr.press/v119/mahapatra20a.html",
        code="dbmptr/EPOSearch",
    )
    promises: ClassVar = frozenset({Promise.SIMPLEX_WEIGHTS, Promise.PERMUTATION_EQUIVARIANT, Promise.HOMOGENEOUS})

    preference: Sequence[float] | None = None
    eps: float = 1e-4
    restricted: bool = True

    @property
    def needs_positive_losses(self) -> bool:
        return True

    def _check(self) -> None:
        if self.preference is not None:
            object.__setattr__(self, "preference", positive_numbers(self.preference, "preference"))
        if not 0 <= self.eps < np.inf:
            raise ValueError(f"eps must be at least 0 and finite, but got {self.eps}.")

    def _only(self, live: Bool[np.ndarray, " K"]) -> "EPO":
        return self if self.preference is None else replace(self, preference=pick(self.preference, live))

    def _weights(self, gramian: Float64[np.ndarray, "K K"], losses: Float64[np.ndarray, " K"]) -> Solution:
        size = len(losses)
        preference = preference_array(self.preference, size, 1.0)
        if losses.min() < 0:
            index = int(losses.argmin())
            raise ValueError(
                f"'epo' needs losses >= 0, but that of objective {index} is {losses[index]:.6g}. Add a constant to it."
            )
        scale = gramian.diagonal().max()
        if size == 1 or scale <= 0:
            return Solution(np.full(size, 1 / size), note="" if scale > 0 else "all gradients are zero")
        non_uniformity, anchor = _adjustments(preference * losses, preference)
        system = gramian / scale
        pull = system @ anchor
        if non_uniformity > self.eps:
            note, bounds = "balance", _balance_bounds(pull, preference * losses)
            weights = _maximize(pull, system, bounds)
        else:
            note, bounds = "dominance", np.zeros(size)
            weights = self._dominate(system, pull)
            if weights is None:
                note = "dominance, relaxed: the restriction has no solution" if self.restricted else note
                weights = _maximize(system.sum(axis=0), system, bounds)
        details = {"non_uniformity": np.array(non_uniformity), "anchor": anchor}
        if weights is None:
            found = solve_min_norm(gramian)
            return Solution(found.weights, found.gap, False, note=f"{note}: min-norm weights instead", details=details)
        return Solution(weights, _violation(weights, system, bounds), note=note, details=details)

    def _dominate(
        self, system: Float64[np.ndarray, "K K"], pull: Float64[np.ndarray, " K"]
    ) -> Float64[np.ndarray, " K"] | None:
        if not self.restricted:
            return None
        bounds = np.append(np.zeros(len(pull)), min(pull.max(), 0.0))
        return _maximize(system.sum(axis=0), np.vstack([system, pull]), bounds)


def _adjustments(
    weighted: Float64[np.ndarray, " K"], preference: Float64[np.ndarray, " K"]
) -> tuple[float, Float64[np.ndarray, " K"]]:
    """The non-uniformity of the weighted losses, and the anchor direction's coefficients."""
    total = weighted.sum()
    shares = weighted / total if total > 0 else np.full(len(weighted), 1 / len(weighted))
    logs = np.log(np.maximum(shares, SMALLEST_SHARE) * len(shares))
    non_uniformity = float(shares @ logs)
    return non_uniformity, preference * (logs - non_uniformity)


def _balance_bounds(pull: Float64[np.ndarray, " K"], weighted: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, " K"]:
    falling = pull > 0
    if not falling.any():
        return np.zeros_like(pull)
    bounds = np.where(falling, -np.inf, pull)
    bounds[weighted == weighted.max()] = 0.0
    return bounds


def _maximize(
    gains: Float64[np.ndarray, " K"], rows: Float64[np.ndarray, "M K"], bounds: Float64[np.ndarray, " M"]
) -> Float64[np.ndarray, " K"] | None:
    """The simplex weights with the largest gain and ``rows @ w >= bounds``; None where HiGHS finds none."""
    lengths = np.abs(rows).max(axis=1)
    used = np.isfinite(bounds) & (lengths > 0)
    if len(gains) == 2:
        return _maximize_two(gains, rows[used] / lengths[used, None], bounds[used] / lengths[used])
    found = linprog(
        -gains / max(np.abs(gains).max(), np.finfo(float).tiny),
        A_ub=-rows[used] / lengths[used, None],
        b_ub=-bounds[used] / lengths[used],
        A_eq=np.ones((1, len(gains))),
        b_eq=[1.0],
        method="highs-ds",
        options={"primal_feasibility_tolerance": TOLERANCE, "dual_feasibility_tolerance": TOLERANCE},
    )
    if found.status != 0:
        return None
    weights = np.maximum(found.x, 0.0)
    return weights / weights.sum()


def _maximize_two(
    gains: Float64[np.ndarray, " 2"], rows: Float64[np.ndarray, "M 2"], bounds: Float64[np.ndarray, " M"]
) -> Float64[np.ndarray, " 2"] | None:
    """In closed form: every constraint bounds the second weight from below or from above."""
    rise, room = rows[:, 1] - rows[:, 0], bounds - rows[:, 0]
    limits = np.divide(room, rise, out=np.zeros_like(room), where=rise != 0)
    low = limits[rise > 0].max(initial=0.0)
    high = limits[rise < 0].min(initial=1.0)
    if low > high + TOLERANCE or (room[rise == 0] > TOLERANCE).any():
        return None
    low, high = min(low, 1.0), max(high, 0.0)
    second = (low + high) / 2 if low > high or gains[0] == gains[1] else high if gains[1] > gains[0] else low
    return np.array([1 - second, second])


def _violation(
    weights: Float64[np.ndarray, " K"], rows: Float64[np.ndarray, "M K"], bounds: Float64[np.ndarray, " M"]
) -> float:
    return max(float((bounds - rows @ weights).max()), 0.0)
