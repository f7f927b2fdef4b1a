r"""From rewards to advantages: how good a rollout is, beside the other rollouts of its prompt.

.. math::  A_{ki} = \frac{R_{ki} - \mu_{k,p(i)}}{\sigma + \epsilon}

A reward that does not apply to a rollout is NaN: it takes no part in any statistic and its advantage is 0, which
neither raises nor lowers that image. Everything is float64; groups are keyed by prompt id (the row of the dataset,
not its text). Where rollouts are spread over processes, gather rewards and ids first: statistics are of all of them.

Shapes: K = rewards, B = rollouts, P = prompts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from mogb_diffusion import checks

Spread = Literal["prompt", "global"]
Rewards = Tensor | np.ndarray | Sequence[Sequence[float]]
PromptIds = Tensor | np.ndarray | Sequence[int] | Sequence[str]

_SPREADS = ("prompt", "global")


def prompt_advantages(
    rewards: Rewards, prompt_ids: PromptIds, *, std: Spread = "prompt", eps: float = 1e-4
) -> Float64[Tensor, "K B"]:
    r"""Standardizes every reward over the rollouts that share a prompt.

    The mean is always that of the prompt. The standard deviation (of the population, dividing by n) is the prompt's
    own, as in MARBLE's equation 3, or with ``std="global"`` that of all the rewards of the batch, as in the recipes of
    DiffusionNFT and in MARBLE's released script. A group in which a reward does not vary has the advantage 0, exactly.

    Beware of small rewards: ``eps`` is absolute, so it halves the advantages of a group whose spread is 1e-4.

    Args:
        rewards: ``[K, B]``, higher is better, NaN where a reward does not apply.
        prompt_ids: ``[B]`` integers or strings: rollouts with the same id form a group, in any order.
        std: Whose standard deviation divides.
        eps: Added to the standard deviation, >= 0.

    Returns:
        ``[K, B]`` in float64, on the device of ``rewards``.

    Raises:
        TypeError: Rewards that are no real numbers, or ids that are neither integers nor strings.
        ValueError: Shapes that do not fit, an infinite reward, a negative eps or an unknown ``std``.
    """
    checks.choice("std", std, _SPREADS)
    eps = checks.number("eps", eps, low=0)
    values, device = _as_rewards(rewards)
    groups, _ = _as_groups(prompt_ids, values.shape[1])
    moments = _moments(values, groups)
    deviation = values - moments.mean[:, groups]
    scale = moments.std()[:, groups] if std == "prompt" else _moments(values).std()
    return _to_tensor(_standardized(deviation, scale + eps), device)


def summed_advantages(
    rewards: Rewards,
    prompt_ids: PromptIds,
    *,
    weights: Sequence[float] | None = None,
    average: bool = False,
    std: Spread = "prompt",
    eps: float = 1e-4,
) -> Float64[Tensor, " B"]:
    r"""DiffusionNFT's rule: the weighted *sum* of the raw rewards, standardized once.

    The reward with the largest spread dominates. Rewards that do not apply to any rollout of a prompt are left out of
    its sum. Where one is missing for some rollouts of a prompt only (it failed), it counts as the mean of the others,
    so that the failure neither raises nor lowers that image; a rollout without any reward has the advantage 0.

    Args:
        rewards: ``[K, B]``, NaN where a reward does not apply.
        prompt_ids: ``[B]``, as for :func:`prompt_advantages`.
        weights: One finite number per reward; None means 1 each.
        average: Divide each sum by the weights of the rewards in it, as MARBLE's released script does. With
            ``std="prompt"`` and complete groups that only changes what ``eps`` is compared with.
        std: Whose standard deviation divides: the prompt's, or that of all sums of the batch.
        eps: Added to the standard deviation, >= 0.
    """
    values, device = _as_rewards(rewards)
    factors = _as_weights(weights, len(values))
    groups, _ = _as_groups(prompt_ids, values.shape[1])
    moments = _moments(values, groups)
    applies = (moments.count > 0)[:, groups]
    filled = np.where(applies, np.where(np.isnan(values), moments.mean[:, groups], values), 0.0)
    total = factors @ filled
    if average:
        weight = factors @ applies
        if bool(((weight <= 0) & applies.any(axis=0)).any()):
            raise ValueError(
                f"average=True needs weights whose sum over the rewards of each prompt is positive, but got {weights}."
            )
        total = total / np.where(weight > 0, weight, 1.0)
    total[np.isnan(values).all(axis=0)] = np.nan
    return prompt_advantages(torch.from_numpy(total)[None], prompt_ids, std=std, eps=eps)[0].to(device)


def gdpo_advantages(
    rewards: Rewards, prompt_ids: PromptIds, *, weights: Sequence[float] | None = None, eps: float = 1e-4
) -> Float64[Tensor, " B"]:
    r"""GDPO's rule: standardize each reward in its group, add up with weights, standardize over the batch.

    .. math::  S_i = \sum_k w_k \frac{R_{ki} - \mu_{k,p(i)}}{\sigma_{k,p(i)} + \epsilon}, \qquad
               A_i = \frac{S_i - \operatorname{mean} S}{\operatorname{std} S + \epsilon}

    Both standard deviations are unbiased (dividing by n − 1), as in the official code, unlike those of
    :func:`prompt_advantages`. A reward that does not apply adds 0; a rollout to which none applies has the advantage 0
    and takes no part in the second step.

    Source: Liu et al. 2026, GDPO (arXiv 2601.05242), and its code, NVlabs/GDPO.
    """
    eps = checks.number("eps", eps, low=0)
    values, device = _as_rewards(rewards)
    factors = _as_weights(weights, len(values))
    groups, _ = _as_groups(prompt_ids, values.shape[1])
    moments = _moments(values, groups)
    each = _standardized(values - moments.mean[:, groups], moments.std(ddof=1)[:, groups] + eps)
    total = np.where(np.isnan(values).all(axis=0), np.nan, factors @ each)[None]
    over_batch = _moments(total)
    return _to_tensor(_standardized(total - over_batch.mean, over_batch.std(ddof=1) + eps)[0], device)


def clamp_hits(advantages: Tensor, *, max_advantage: float = 5.0) -> Int[Tensor, "..."]:
    """How many advantages of each reward are clipped, ``[K, B] -> [K]``: those beyond ±max_advantage.

    Mixing optimalities is exact whatever this says; mixing advantages is exact only while it says 0. With the
    prompt's own standard deviation no advantage can exceed sqrt(n - 1) in a group of n.
    """
    checks.floating("advantages", advantages, "[K, B]")
    limit = checks.number("max_advantage", max_advantage, above=0)
    return (advantages.abs() > limit).sum(dim=-1)


class RunningAdvantages:
    r"""Standardizes like :func:`prompt_advantages`, with statistics that run over all batches so far.

    A batch first joins the statistics of its prompts and is then standardized with them. ``memory`` in [0, 1] is what
    the past counts for: 1 remembers every reward equally, 0 only the batch at hand (then this *is*
    :func:`prompt_advantages`), and in between the weight of the past shrinks by that factor each time a prompt
    returns. A policy that improves makes old rewards look small, which biases advantages upwards: prefer
    ``memory < 1`` in long runs. MARBLE's equation 3 says "running"; its script keeps no statistics between epochs.

    Args:
        std: ``"prompt"``, or ``"global"`` for the running standard deviation over all prompts.
        eps: Added to the standard deviation.
        memory: The factor on the past.

    Examples:
        >>> running = RunningAdvantages()
        >>> _ = running([[1.0, 3.0]], ["a", "a"])
        >>> round(running([[5.0, 7.0]], ["a", "a"])[0, 1].item(), 3)  # 7 beside 1, 3, 5 and 7: 3 / sqrt(5)
        1.342
    """

    def __init__(self, *, std: Spread = "prompt", eps: float = 1e-4, memory: float = 1.0) -> None:
        checks.choice("std", std, _SPREADS)
        self.std = std
        self.eps = checks.number("eps", eps, low=0)
        self.memory = checks.number("memory", memory, low=0, high=1)
        self.reset()

    def reset(self) -> None:
        """Forgets every batch."""
        self._rows: dict[int | str, int] = {}
        self._prompts = _Moments.empty(0, 0)
        self._all = _Moments.empty(0, 1)

    def __call__(self, rewards: Rewards, prompt_ids: PromptIds) -> Float64[Tensor, "K B"]:
        """Adds a batch ``[K, B]`` to the statistics and standardizes it. Arguments as :func:`prompt_advantages`."""
        values, device = _as_rewards(rewards)
        groups, ids = _as_groups(prompt_ids, values.shape[1])
        if self._rows and len(values) != len(self._all.mean):
            raise ValueError(
                f"rewards must have as many rows as before, {len(self._all.mean)}, but have {len(values)}. "
                "Call reset() or use another RunningAdvantages for other rewards."
            )
        if not self._rows:
            self._prompts, self._all = _Moments.empty(len(values), 0), _Moments.empty(len(values), 1)
        for prompt in ids:
            self._rows.setdefault(prompt, len(self._rows))
        rows = np.array([self._rows[prompt] for prompt in ids])
        self._prompts = self._prompts.grown(len(self._rows))
        merged = self._prompts.select(rows).merged(_moments(values, groups), self.memory)
        self._prompts.store(rows, merged)
        self._all = self._all.merged(_moments(values), self.memory)
        scale = merged.std()[:, groups] if self.std == "prompt" else self._all.std()
        return _to_tensor(_standardized(values - merged.mean[:, groups], scale + self.eps), device)

    def state_dict(self) -> dict[str, Any]:
        """The statistics: prompt ids as a list, moments as tensors ``[3, K, P]`` and ``[3, K, 1]``."""
        return {
            "prompt_ids": list(self._rows),
            "prompts": torch.from_numpy(self._prompts.packed()),
            "all": torch.from_numpy(self._all.packed()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave; the options stay those of this instance.

        Raises:
            ValueError: Keys or shapes that are not those of such a state.
        """
        if set(state) != {"prompt_ids", "prompts", "all"}:
            raise ValueError(
                f"state must have the keys prompt_ids, prompts and all, but has {', '.join(sorted(state))}."
            )
        prompts, everything = (torch.as_tensor(state[key]).double().cpu().numpy() for key in ("prompts", "all"))
        ids = list(state["prompt_ids"])
        if prompts.ndim != 3 or prompts.shape[0] != 3 or everything.shape != (*prompts.shape[:2], 1):
            raise ValueError(
                "state must hold prompts of the shape [3, K, P] and all of the shape [3, K, 1], but they are "
                f"{list(prompts.shape)} and {list(everything.shape)}."
            )
        if len(set(ids)) != len(ids) or len(ids) != prompts.shape[2]:
            raise ValueError(f"state must have {prompts.shape[2]} different prompt_ids, but has {len(set(ids))}.")
        self._rows = {prompt: row for row, prompt in enumerate(ids)}
        self._prompts, self._all = _Moments(*prompts.copy()), _Moments(*everything.copy())


class _Moments:
    """Count, mean and sum of squared deviations of the numbers of every group, ``[K, P]`` each."""

    def __init__(
        self, count: Float64[np.ndarray, "K P"], mean: Float64[np.ndarray, "K P"], spread: Float64[np.ndarray, "K P"]
    ) -> None:
        self.count, self.mean, self.spread = count, mean, spread

    @staticmethod
    def empty(num_rewards: int, num_groups: int) -> "_Moments":
        return _Moments(*np.zeros((3, num_rewards, num_groups)))

    def std(self, ddof: int = 0) -> Float64[np.ndarray, "K P"]:
        """0 where there are too few numbers."""
        return np.sqrt(self.spread / np.maximum(self.count - ddof, 1))

    def merged(self, new: "_Moments", memory: float) -> "_Moments":
        """The moments of both together, the past weighted by ``memory``; Chan, Golub and LeVeque 1983."""
        old = memory * self.count
        count = old + new.count
        share = np.divide(new.count, count, out=np.zeros_like(count), where=count > 0)
        gap = new.mean - self.mean
        mean = np.where(share == 1, new.mean, self.mean + share * gap)
        return _Moments(count, mean, memory * self.spread + new.spread + gap**2 * old * share)

    def grown(self, num_groups: int) -> "_Moments":
        more = num_groups - self.count.shape[1]
        return _Moments(*np.pad(self.packed(), ((0, 0), (0, 0), (0, more))))

    def select(self, rows: Int[np.ndarray, " P"]) -> "_Moments":
        return _Moments(*self.packed()[:, :, rows])

    def store(self, rows: Int[np.ndarray, " P"], other: "_Moments") -> None:
        self.count[:, rows], self.mean[:, rows], self.spread[:, rows] = other.count, other.mean, other.spread

    def packed(self) -> Float64[np.ndarray, "3 K P"]:
        return np.stack([self.count, self.mean, self.spread])


def _moments(values: Float64[np.ndarray, "K B"], groups: Int[np.ndarray, " B"] | None = None) -> _Moments:
    """Of every group, NaN left out. Measured from each group's minimum, so that constant groups come out exact."""
    if groups is None:
        groups = np.zeros(values.shape[1], dtype=np.int64)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    valid: Bool[np.ndarray, "K B"] = ~np.isnan(values)
    low = np.fmin.reduceat(values[:, order], starts, axis=1)

    def total(numbers: Float64[np.ndarray, "K B"]) -> Float64[np.ndarray, "K P"]:
        return np.add.reduceat(np.where(valid, numbers, 0.0)[:, order], starts, axis=1)

    count = total(np.ones_like(values))
    lift = total(values - low[:, groups]) / np.maximum(count, 1)
    spread = total(((values - low[:, groups]) - lift[:, groups]) ** 2)
    return _Moments(count, np.where(count > 0, low + lift, 0.0), spread)


def _standardized(
    deviation: Float64[np.ndarray, "K B"], scale: Float64[np.ndarray, "K _"]
) -> Float64[np.ndarray, "K B"]:
    scale = np.broadcast_to(scale, deviation.shape)
    return np.divide(deviation, scale, out=np.zeros_like(deviation), where=(scale > 0) & ~np.isnan(deviation))


def _as_rewards(rewards: Rewards) -> tuple[Float64[np.ndarray, "K B"], torch.device]:
    tensor = checks.real_numbers("rewards", rewards, "[K, B]")
    if tensor.ndim != 2 or tensor.numel() == 0:
        raise ValueError(
            f"rewards must have the shape [K, B], one row per reward, but have {list(tensor.shape)}. "
            "Write rewards[None] for a single one."
        )
    values = tensor.to("cpu", torch.float64).numpy()
    if np.isinf(values).any():
        row, column = np.argwhere(np.isinf(values))[0]
        raise ValueError(
            f"rewards hold Inf (reward {row}, rollout {column}). Use NaN where a reward failed or does not apply."
        )
    return values, tensor.device


def _as_groups(prompt_ids: PromptIds, batch: int) -> tuple[Int[np.ndarray, " B"], list[int | str]]:
    """The group of every rollout, and the id of every group."""
    ids = prompt_ids.tolist() if isinstance(prompt_ids, Tensor | np.ndarray) else list(prompt_ids)
    if not isinstance(ids, list) or len(ids) != batch:
        found = len(ids) if isinstance(ids, list) else 1
        raise ValueError(f"prompt_ids must have one id per rollout, {batch}, but got {found}.")
    for prompt in ids:
        if isinstance(prompt, bool) or not isinstance(prompt, int | str):
            raise TypeError(
                f"prompt_ids must be integers or strings, one per rollout, but got {prompt!r}. "
                "Use the row of the prompt in its dataset."
            )
    known: dict[int | str, int] = {}
    groups = np.array([known.setdefault(prompt, len(known)) for prompt in ids], dtype=np.int64)
    return groups, list(known)


def _as_weights(weights: Sequence[float] | None, num_rewards: int) -> Float64[np.ndarray, " K"]:
    if weights is None:
        return np.ones(num_rewards)
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (num_rewards,) or not np.isfinite(values).all():
        raise ValueError(f"weights must be finite numbers, one per reward, {num_rewards}, but got {weights}.")
    return values


def _to_tensor(values: Float64[np.ndarray, "..."], device: torch.device) -> Float64[Tensor, "..."]:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)
