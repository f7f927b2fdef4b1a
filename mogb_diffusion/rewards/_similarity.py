"""What PickScore, CLIPScore and HPSv2.1 have in common: a picture and its prompt, compared by CLIP."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from mogb_diffusion import checks
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rewards._clip import (
    PREPROCESSING,
    Clip,
    Pictures,
    Preprocessing,
    score_in_batches,
)


class Similarity:
    r"""A multiple of the cosine between the embeddings of a picture and its prompt.

    .. math::  reward_i = s \, \cos(e_{image}(x_i), e_{text}(p_i))
    """

    preprocessing: ClassVar[Preprocessing]

    def __init__(self, clip: Clip, factor: float, batch_size: int) -> None:
        self.clip = clip
        self.factor = factor
        self.batch_size = checks.whole_number("batch_size", batch_size)

    def __call__(self, images: Pictures, prompts: Sequence[Prompt]) -> Tensor:
        """The rewards ``[B]``, float32 on the CPU.

        Raises:
            InputError: Pictures of another shape, or outside of [0, 1].
        """

        def score(part: slice) -> Tensor:
            pixels = PREPROCESSING[self.preprocessing](images[part], self.clip.size)
            words = self.clip.texts([prompt.text for prompt in prompts[part]])
            return self.factor * (self.clip.images(pixels) * words).sum(-1)

        with self.clip.weights.on_device():
            return score_in_batches(len(prompts), self.batch_size, score)
