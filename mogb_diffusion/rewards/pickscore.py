"""PickScore: how likely people are to prefer a picture for its prompt (Kirstain et al., 2023, arXiv 2305.01569)."""

from typing import ClassVar

from mogb_diffusion.rewards._clip import Preprocessing, load_clip
from mogb_diffusion.rewards._similarity import Similarity

USUAL = 26.0  # what Flow-GRPO and DiffusionNFT divide by; it brings the scores near 1 and changes no ranking


class PickScore(Similarity):
    """``exp(logit scale) * cosine / 26``, with CLIP's own preprocessing of the 8-bit picture.

    Args:
        model: The weights (MIT licence): a hub name or a folder.
        tokenizer: Whose tokenizer; the weights come without one.
        device: Where it runs.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        batch_size: Pictures at once.
        offload: Whether the weights lie on the CPU between calls.
    """

    preprocessing: ClassVar[Preprocessing] = "bicubic_crop"

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 16,
        offload: bool = False,
    ) -> None:
        clip = load_clip(model, tokenizer, device, dtype, offload)
        super().__init__(clip, clip.scale / USUAL, batch_size)
