"""The LAION aesthetic predictor: how good a picture looks, whatever its prompt (Schuhmann et al., 2022)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rewards._clip import (
    Pictures,
    bicubic_crop,
    checked_batch_size,
    load_clip,
    read_checkpoint,
    score_in_batches,
)

LAYERS = (0, 2, 4, 6, 7)  # of the published file; dropout lies between, and no activation


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
        self.batch_size = checked_batch_size(batch_size)
        self.clip = load_clip(model, model, device, dtype, offload)
        self.head = _head(Path(weights)).to(self.clip.device)

    @torch.no_grad()
    def __call__(self, images: Pictures, prompts: Sequence[Prompt]) -> Tensor:
        """The rewards ``[B]``, float32 on the CPU; the prompts do not matter."""

        def score(part: slice) -> Tensor:
            scored: Tensor = self.head(self.clip.images(bicubic_crop(images[part], self.clip.size)))
            return scored.squeeze(-1)

        with self.clip.weights.on_device():
            return score_in_batches(len(prompts), self.batch_size, score)


def _head(path: Path) -> nn.Sequential:
    state = read_checkpoint(path)
    wanted = [f"layers.{index}.{kind}" for index in LAYERS for kind in ("weight", "bias")]
    if sorted(state) != sorted(wanted):
        raise InputError(f"{path} is not the aesthetic predictor: it holds {sorted(state)[:3]}, not {wanted[:2]} ...")
    layers = []
    for index in LAYERS:
        weight = state[f"layers.{index}.weight"].float()
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": state[f"layers.{index}.bias"].float()})
        layers.append(layer)
    return nn.Sequential(*layers).eval().requires_grad_(False)
