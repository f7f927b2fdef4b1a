"""Multi-reward reinforcement learning of diffusion models, with gradients balanced by mogb.

The names below are imported when they are first asked for, so that the command line answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mogb_diffusion.advantages import prompt_advantages
    from mogb_diffusion.config import Run, load_run
    from mogb_diffusion.nft import combine_optimality, nft_losses, optimality
    from mogb_diffusion.policy_schedule import old_policy_decay
    from mogb_diffusion.prompts import Prompt

_HOMES = {
    "Prompt": "prompts", "Run": "config", "combine_optimality": "nft", "load_run": "config", "nft_losses": "nft",
    "old_policy_decay": "policy_schedule", "optimality": "nft", "prompt_advantages": "advantages",
}  # fmt: skip

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
