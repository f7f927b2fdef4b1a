"""The LAION aesthetic predictor: how good a picture looks, whatever its prompt (Schuhmann et al., 2022)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mogb_diffusion import checks
from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rewards._clip import (
    Pictures,
    bicubic_crop,
    linear_head,
    load_clip,
    read_checkpoint,
    score_in_batches,
)


class Aesthetic:
    """A linear head of five layers on the unit image embedding; about 1 to 10.

    Args:
        weights: ``sac+logos+ava1-l14-linearMSE.pth``, of the repository
            christophschuhmann/improved-aesthetic-predictor (Apache-2.0 licence). It is in no hub: give its path.
        model: The CLIP that it was trained on (MIT licence).
        device: Where it runs.
        dtype: Of CLIP; the head is in float32.
        batch_size: Pictures at once.
        offload: Whether the weights lie on the CPU between calls.
    """

    def __init__(
        self,
        weights: str | None = None,
        model: str = "openai/clip-vit-large-patch14",
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 16,
        offload: bool = False,
    ) -> None:
        if weights is None:
            raise InputError(
                "The aesthetic reward needs weights=PATH, the file sac+logos+ava1-l14-linearMSE.pth of the repository "
                "christophschuhmann/improved-aesthetic-predictor."
            )
        self.batch_size = checks.whole_number("batch_size", batch_size)
        self.clip = load_clip(model, model, device, dtype, offload)
        try:
            self.head = linear_head(read_checkpoint(Path(weights))).to(self.clip.device)
        except InputError as error:
            raise InputError(f"{weights} is not the aesthetic predictor: {error}") from error

    @torch.no_grad()
    def __call__(self, images: Pictures, prompts: Sequence[Prompt]) -> Tensor:
        """The rewards ``[B]``, float32 on the CPU; the prompts do not matter."""

        def score(part: slice) -> Tensor:
            scored: Tensor = self.head(self.clip.images(bicubic_crop(images[part], self.clip.size)))
            return scored.squeeze(-1)

        with self.clip.weights.on_device():
            return score_in_batches(len(prompts), self.batch_size, score)
