"""How fast a reward is here: pictures per second, on built-in pictures."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mogb_diffusion import checks
from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rewards import Reward
from mogb_diffusion.seeds import keyed_generator

SIZE = 512  # of the pictures, unless the reward has a ``picture_size``

PROMPTS = (
    Prompt('a shop sign that says "OPEN"', target_text="OPEN"),
    Prompt(
        "a photo of a red apple and a green cup",
        metadata={
            "tag": "color_attr",
            "include": [{"class": "apple", "count": 1, "color": "red"}, {"class": "cup", "count": 1, "color": "green"}],
        },
    ),
)


@dataclass(frozen=True, eq=False)
class Throughput:
    """What was measured.

    Attributes:
        pictures_per_second: Of the second of two calls.
        seconds: That it took.
        scores: The rewards ``[B]`` that it gave.
    """

    pictures_per_second: float
    seconds: float
    scores: Tensor


def measure(reward: Reward, prompts: Sequence[Prompt] | None = None, pictures: int = 8, seed: int = 0) -> Throughput:
    """Scores the same pictures twice, and takes the time of the second call.

    Args:
        reward: The reward.
        prompts: What the pictures are judged for, repeated as often as needed; None takes built-in ones. Prompts that
            the reward does not apply to are left out.
        pictures: How many.
        seed: Of the pictures.

    Raises:
        InputError: The reward applies to none of the prompts, or ``pictures`` is no positive whole number.
    """
    checks.whole_number("pictures", pictures)
    size = getattr(reward, "picture_size", SIZE)
    applies = getattr(reward, "applies", lambda prompt: True)
    fitting = [prompt for prompt in (_known(size, seed) if prompts is None else prompts) if applies(prompt)]
    if not fitting:
        raise InputError("The reward applies to none of the prompts: give others.")
    chosen = list(islice(cycle(fitting), pictures))
    images = examples(chosen, size, seed)
    with torch.no_grad():
        reward(images, chosen)
        begun = time.perf_counter()
        scores = torch.as_tensor(reward(images, chosen)).detach().cpu()
        seconds = time.perf_counter() - begun
    return Throughput(pictures / seconds if seconds else math.inf, seconds, scores)


def examples(prompts: Sequence[Prompt], size: int = SIZE, seed: int = 0) -> Float[Tensor, "B 3 H W"]:
    """Pictures for prompts: shapes on a coloured ground and, where one is asked for, the text; 8 bits, as files are.

    Pictures of 16 pixels are drawings of the tiny world.
    """
    from mogb_diffusion.world import drawing

    generator = keyed_generator(seed, "examples")
    if size == drawing.SIZE:
        return drawing.draw(prompts, generator)
    return torch.stack([_example(prompt, size, generator) for prompt in prompts])


def _known(size: int, seed: int) -> Sequence[Prompt]:
    from mogb_diffusion.world import captions, drawing

    if size != drawing.SIZE:
        return PROMPTS
    return captions.sample_prompts(64, keyed_generator(seed, "prompts"))


def _example(prompt: Prompt, size: int, generator: torch.Generator) -> Tensor:
    from PIL import Image, ImageDraw, ImageFont

    def numbers(count: int, high: int) -> list[int]:
        return torch.randint(high, (count,), generator=generator).tolist()

    def color(low: int) -> tuple[int, ...]:
        return tuple(low + number for number in numbers(3, 128))

    image = Image.new("RGB", (size, size), color(128))
    pencil = ImageDraw.Draw(image)
    for shape in (pencil.ellipse, pencil.rectangle):
        left, top, width, height = numbers(4, size // 2)
        shape((left, top, left + width, top + height), fill=color(64))
    if prompt.target_text:
        font: Any = ImageFont.load_default(size / 8)
        pencil.text((size / 8, size / 2), prompt.target_text, fill=(0, 0, 0), font=font)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
