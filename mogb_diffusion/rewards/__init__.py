"""What a reward is, and where rewards are found by name.

A reward is any callable ``(images [B, 3, H, W] in [0, 1], prompts) -> [B]``: higher is better, NaN where it does not
apply. It may have ``applies(prompt) -> bool``: then it is called only with pictures that it applies to, and NaN from it
counts as a failure. It may have ``specialist = True``: it applies to some prompts only. It may have a ``picture_size``,
if it judges pictures of this many pixels a side alone.
"""

import importlib
import inspect
from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor

from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rewards._secrets import hide, redacted

BUILT_IN = {
    "pickscore": "mogb_diffusion.rewards.pickscore:PickScore",
    "clip": "mogb_diffusion.rewards.clipscore:ClipScore",
    "clipscore": "mogb_diffusion.rewards.clipscore:ClipScore",
    "hpsv2": "mogb_diffusion.rewards.hpsv2:HPSv2",
    "aesthetic": "mogb_diffusion.rewards.aesthetic:Aesthetic",
    "imagereward": "mogb_diffusion.rewards.imagereward:ImageReward",
    "unifiedreward": "mogb_diffusion.rewards.unifiedreward:UnifiedReward",
    "remote": "mogb_diffusion.rewards.remote:Remote",
    "geneval": "mogb_diffusion.rewards.detection:GenEval",
    "ocr": "mogb_diffusion.rewards.ocr:Ocr",
    "world_preference": "mogb_diffusion.rewards.world:Preference",
    "world_aesthetic": "mogb_diffusion.rewards.world:Aesthetic",
    "world_alignment": "mogb_diffusion.rewards.world:Alignment",
    "world_text": "mogb_diffusion.rewards.world:Text",
    "world_composition": "mogb_diffusion.rewards.world:Composition",
}


@runtime_checkable
class Reward(Protocol):
    """Judges pictures."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """One number per picture."""


def load(name: str, **options: Any) -> Reward:
    """The reward of this name, or ``module:Class`` or ``module:function``, made with these options.

    Raises:
        InputError: There is none, its module cannot be imported, or it does not take the options.
    """
    address = BUILT_IN.get(name, name)
    module_name, colon, attribute = address.partition(":")
    if not colon:
        raise InputError(
            f"There is no reward {name!r}. Known ones: {', '.join(BUILT_IN)}; or give your own as module:Class."
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"The reward {name!r} cannot be imported: {error}.") from error
    found: Any = getattr(module, attribute, None)
    if not callable(found):
        raise InputError(f"The reward {name!r} does not exist: {module_name} has no {attribute}.")
    if not inspect.isclass(found):
        if options:
            raise InputError(f"The reward {name!r} is a function and takes no options, but got {redacted(options)}.")
        return cast(Reward, found)
    try:
        made = cast(Reward, found(**options))
    except (TypeError, ValueError, OSError) as error:
        reason = hide(" ".join(str(error).split()), options)
        raise InputError(f"The reward {name!r} cannot be made with {redacted(options)}: {reason}") from error
    if not callable(made):
        raise InputError(f"The reward {name!r} must be callable with images and prompts.")
    return made
