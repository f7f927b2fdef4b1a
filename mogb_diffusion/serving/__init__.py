"""Rewards as a service: JSON and PNG over HTTP, for rewards that are heavy, or need other packages than the trainer.

- :mod:`~mogb_diffusion.serving.messages`: what a request may hold, and nothing else.
- :mod:`~mogb_diffusion.serving.batching`: one reward, and many requests at once.
- :mod:`~mogb_diffusion.serving.server`: the HTTP around both.

The client is :mod:`mogb_diffusion.rewards.remote`.
"""

from mogb_diffusion.serving.batching import Batcher
from mogb_diffusion.serving.messages import Limits, RequestError
from mogb_diffusion.serving.server import RewardServer, Settings

__all__ = ["Batcher", "Limits", "RequestError", "RewardServer", "Settings"]
