r"""UnifiedReward: a vision-language model that gives a picture one to five points (Wang et al. 2025, arXiv 2503.05236).

The model runs elsewhere, behind any server with OpenAI's ``chat/completions`` (SGLang, vLLM, ...). What is asked, and
how the points are read off, follows Flow-GRPO and DiffusionNFT: a square of 512 pixels, temperature 0, and

.. math::  reward = (points - low) / (high - low)

with low = 0 and high = 5. They count an answer without points as 0; here it is NaN, and counted.
"""

import base64
import math
import os
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from mogb_diffusion import checks
from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rewards._clip import Pictures, eight_bit
from mogb_diffusion.rewards._http import Client, RemoteError, all_at_once, as_png

# The question that UnifiedReward-7b-v1.5 was trained on: scores of another one cannot be compared with published ones.
TEMPLATE = (
    "<image>\n"
    "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image "
    "based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy "
    "of depicted objects, their relationships, and attributes as described in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color "
    "accuracy, and overall aesthetic appeal.\n"
    "Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)
PATTERN = r"Final Score:\s*([1-5](?:\.\d+)?)"


class UnifiedReward:
    """The points of a vision-language model, from 0 to 1.

    Pictures whose request fails, or whose answer holds no points, are NaN. If every request of a call fails, the call
    fails.

    Args:
        url: Of the server, up to ``/v1``.
        model: Under which name it serves the model (``CodeGoat24/UnifiedReward-7b-v1.5``; licence: see its page).
        template: The question; ``{prompt}`` stands for the text of the prompt.
        pattern: A regular expression with one group, the points.
        matches: How often it must occur; the mean counts. UnifiedReward-2.0 gives three scores.
        low: Points that become 0,
        high: and 1; points beyond are clamped.
        size: The side in pixels that pictures are resized to; None leaves them.
        key_variable: The environment variable that holds the key of the server, if it wants one.
        timeout: Seconds that one attempt may take.
        retries: Attempts after the first one.
        concurrency: Requests at once.
        seed: Of the jitter in the pauses between attempts.

    Attributes:
        counts: Of the requests (:class:`~mogb_diffusion.rewards._http.Client`), and ``unread``: answers without points.

    Raises:
        InputError: An impossible option.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:17140/v1",
        model: str = "UnifiedReward-7b-v1.5",
        template: str = TEMPLATE,
        pattern: str = PATTERN,
        matches: int = 1,
        low: float = 0.0,
        high: float = 5.0,
        size: int | None = 512,
        key_variable: str = "UNIFIEDREWARD_KEY",
        timeout: float = 120.0,
        retries: int = 4,
        concurrency: int = 16,
        seed: int = 0,
    ) -> None:
        if "{prompt}" not in template:
            raise InputError("template must hold {prompt}, where the text of the prompt goes.")
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise InputError(f"pattern must be a regular expression, but {pattern!r} is none: {error}.") from error
        if self.pattern.groups != 1:
            raise InputError(f"pattern must have one group, the points, but {pattern!r} has {self.pattern.groups}.")
        self.low, self.high = checks.number("low", low), checks.number("high", high, above=low)
        self.model, self.template = model, template
        self.matches = checks.whole_number("matches", matches)
        self.concurrency = checks.whole_number("concurrency", concurrency)
        self.size = None if size is None else checks.whole_number("size", size)
        self.client = Client(url, token=os.environ.get(key_variable), timeout=timeout, retries=retries, seed=seed)

    @property
    def counts(self) -> Counter[str]:
        return self.client.counts

    def __call__(self, images: Pictures, prompts: Sequence[Prompt]) -> Tensor:
        """The rewards ``[B]``, float32.

        Raises:
            RemoteError: Every request failed.
        """
        pairs = list(zip(eight_bit(images), prompts, strict=True))
        points = all_at_once(self._points, pairs, self.concurrency)
        return torch.tensor([math.nan if isinstance(found, RemoteError) else found for found in points])

    def _points(self, pair: tuple[Tensor, Prompt]) -> float:
        picture, prompt = pair
        data = base64.b64encode(as_png(picture, self.size)).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
            {"type": "text", "text": self.template.replace("{prompt}", prompt.text)},
        ]
        question = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        try:
            answer = self.client.post("/chat/completions", question)
            said = answer["choices"][0]["message"]["content"]
            found = [float(points) for points in self.pattern.findall(said)][: self.matches]
        except RemoteError as error:
            if error.kind != "answer":
                raise
            found = []
        except (LookupError, TypeError, ValueError):
            found = []
        if len(found) < self.matches:
            self.client.count("unread")
            return math.nan
        mean = min(max(sum(found) / len(found), self.low), self.high)
        return (mean - self.low) / (self.high - self.low)
