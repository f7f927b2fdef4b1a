"""CLIPScore: how well a picture matches its prompt (Hessel et al., EMNLP 2021), as Flow-GRPO computes it."""

from typing import ClassVar

from mogb_diffusion.rewards._clip import Preprocessing, load_clip
from mogb_diffusion.rewards._similarity import Similarity


class ClipScore(Similarity):
    """``exp(logit scale) / 100 * cosine``, which is the cosine for OpenAI's weights.

    The paper's score is ``2.5 * max(cosine, 0)``, on CLIP's own bicubic preprocessing. This follows Flow-GRPO and
    DiffusionNFT: no factor, and a bilinear resize of the float picture.

    Args:
        model: The weights (MIT licence): a hub name or a folder, with its tokenizer.
        device: Where it runs.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        batch_size: Pictures at once.
        offload: Whether the weights lie on the CPU between calls.
    """

    preprocessing: ClassVar[Preprocessing] = "bilinear_crop"

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 16,
        offload: bool = False,
    ) -> None:
        clip = load_clip(model, model, device, dtype, offload)
        super().__init__(clip, clip.scale / 100, batch_size)
