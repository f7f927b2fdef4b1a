"""Multi-reward reinforcement learning of diffusion models, with gradients balanced by mogb."""

from mogb_diffusion.advantages import prompt_advantages
from mogb_diffusion.nft import combine_optimality, nft_losses, optimality
from mogb_diffusion.policy_schedule import old_policy_decay

__all__ = ["combine_optimality", "nft_losses", "old_policy_decay", "optimality", "prompt_advantages"]
