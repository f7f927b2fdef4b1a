"""Multi-reward reinforcement learning of diffusion models, with gradients balanced by mogb."""

from mogb_diffusion.advantages import prompt_advantages
from mogb_diffusion.config import Run, load_run
from mogb_diffusion.nft import combine_optimality, nft_losses, optimality
from mogb_diffusion.policy_schedule import old_policy_decay
from mogb_diffusion.prompts import Prompt

__all__ = [
    "Prompt",
    "Run",
    "combine_optimality",
    "load_run",
    "nft_losses",
    "old_policy_decay",
    "optimality",
    "prompt_advantages",
]
