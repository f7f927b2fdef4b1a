"""What the rewards of an epoch ask for: advantages and optimalities of the objectives that are balanced.

``weighted_sum`` and ``gdpo`` make one objective of all rewards; every other mode keeps them apart.

Shapes: K = objectives (1 for the modes that add up), B = pictures of an epoch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from mogb_diffusion import config
from mogb_diffusion.advantages import (
    RunningAdvantages,
    clamp_hits,
    gdpo_advantages,
    prompt_advantages,
    summed_advantages,
)
from mogb_diffusion.nft import optimality
from mogb_diffusion.seeds import keyed_generator


@dataclass(frozen=True, eq=False)
class Signal:
    """The rewards of an epoch, ready for the loss.

    Attributes:
        names: Of the K objectives.
        advantages: ``[K, B]``; 0 where a reward does not apply.
        optimality: ``[K, B]`` in [0, 1].
        applies: ``[K, B]``, where the reward said something.
        clamp_hits: How many advantages of each objective were clipped.
    """

    names: tuple[str, ...]
    advantages: Float64[Tensor, "K B"]
    optimality: Float64[Tensor, "K B"]
    applies: Bool[Tensor, "K B"]
    clamp_hits: Int[Tensor, " K"]


class SignalMaker:
    """Turns the rewards of one epoch after the other into signals.

    Args:
        run: The configuration.
        specialists: Names of the rewards that apply to some prompts only.
    """

    def __init__(self, run: config.Run, specialists: Sequence[str] = ()) -> None:
        self.run = run
        self.specialists = tuple(specialists)
        self.running = None
        loss = run.loss
        if loss.memory is not None:
            self.running = RunningAdvantages(std=loss.std, eps=loss.eps, memory=loss.memory)

    def __call__(self, rewards: Float64[Tensor, "K B"], rows: Sequence[int], epoch: int) -> Signal:
        """The signal of an epoch.

        Args:
            rewards: NaN where they do not apply, or failed.
            rows: The prompt of every picture.
            epoch: Its number.
        """
        loss, mode = self.run.loss, self.run.balancing.mode
        weights = [reward.weight for reward in self.run.rewards]
        names = self.run.reward_names
        applies = ~rewards.isnan()
        if mode == "weighted_sum":
            advantages = summed_advantages(rewards, list(rows), weights=weights, std=loss.std, eps=loss.eps)[None]
        elif mode == "gdpo":
            advantages = gdpo_advantages(rewards, list(rows), weights=weights, eps=loss.eps)[None]
        elif self.running is not None:
            advantages = self.running(rewards, list(rows))
        else:
            advantages = prompt_advantages(rewards, list(rows), std=loss.std, eps=loss.eps)
        if mode in config.SUM_MODES:
            names, applies = (mode,), applies.any(dim=0, keepdim=True)
        if mode == "reward_dropout":
            applies = applies & ~self._dropped(applies, rows, epoch)
            advantages = torch.where(applies, advantages, torch.zeros_like(advantages))
        return Signal(
            names=tuple(names),
            advantages=advantages,
            optimality=optimality(advantages, max_advantage=loss.max_advantage, mode=loss.advantage_mode),
            applies=applies,
            clamp_hits=clamp_hits(advantages, max_advantage=loss.max_advantage),
        )

    def _dropped(self, applies: Bool[Tensor, "K B"], rows: Sequence[int], epoch: int) -> Bool[Tensor, "K B"]:
        """General rewards that are silenced by chance, prompt by prompt, where a specialist applies."""
        names = self.run.reward_names
        special = torch.tensor([name in self.specialists for name in names])
        dropped = torch.zeros_like(applies)
        prompts = torch.tensor(list(rows))
        for row in dict.fromkeys(rows):
            members = prompts == row
            if not bool(applies[special][:, members].any()):
                continue
            generator = keyed_generator(self.run.seed, "dropout", epoch, row)
            chance = torch.rand(len(names), generator=generator) < self.run.balancing.dropout
            dropped[:, members] = (chance & ~special)[:, None]
        return dropped
