r"""How well the text that was read from an image matches the text that was asked for.

.. math::  reward = 1 - \min(d(read, target),\ |target|)\, /\, |target|

d is the edit distance, or 0 if the target occurs anywhere in what was read. Spaces and case do not count. The metric
of Flow-GRPO and DiffusionNFT.
"""

import math
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mogb_diffusion import checks
from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rewards._clip import Pictures, eight_bit

Line: TypeAlias = tuple[str, float]  # text and confidence
Reader: TypeAlias = Callable[[np.ndarray], Sequence[Line]]  # from one picture [H, W, 3], uint8 RGB


class Ocr:
    """Reads a picture, and compares what it read with the text that the prompt asks for.

    It applies to prompts with a ``target_text``. The published numbers were made with PaddleOCR 2.9, which current
    packages cannot install beside torch; scores of another reader differ, so name it with your results.

    Args:
        backend: ``rapidocr`` (its models come with the package), or ``module:function`` of a reader of your own: from
            one picture, uint8 RGB ``[H, W, 3]``, to ``(text, confidence)`` pairs in reading order.
        threads: Of rapidocr, for one picture; 0 leaves the number to it.
        workers: Pictures that are read at once, each by a rapidocr of its own (about 50 MB). A reader of your own is
            called by so many threads.

    Raises:
        InputError: The backend is unknown or not installed.
    """

    specialist = True

    def __init__(self, backend: str = "rapidocr", threads: int = 1, workers: int = 1) -> None:
        threads = checks.whole_number("threads", threads, low=0)
        self.backend = backend
        self.workers = checks.whole_number("workers", workers)
        self._readers: queue.SimpleQueue[Reader] = queue.SimpleQueue()
        for _ in range(workers):
            self._readers.put(_reader(backend, threads))

    def applies(self, prompt: Prompt) -> bool:
        """Whether the prompt asks for a text."""
        return prompt.target_text is not None and bool(_plain(prompt.target_text))

    def __call__(self, images: Pictures, prompts: Sequence[Prompt]) -> Tensor:
        """The rewards ``[B]`` in [0, 1]; NaN where the prompt asks for no text."""
        pairs = list(zip(eight_bit(images), prompts, strict=True))
        with ThreadPoolExecutor(self.workers, thread_name_prefix="ocr") as pool:
            return torch.tensor(list(pool.map(self._judge, pairs)))

    def read(self, picture: np.ndarray) -> list[Line]:
        """What stands in one picture, uint8 RGB ``[H, W, 3]``."""
        reader = self._readers.get()
        try:
            return list(reader(picture))
        finally:
            self._readers.put(reader)

    def _judge(self, pair: tuple[Tensor, Prompt]) -> float:
        picture, prompt = pair
        if not self.applies(prompt):
            return math.nan
        return text_reward(self.read(picture.permute(1, 2, 0).numpy()), prompt.target_text or "")


def text_reward(recognized: Sequence[tuple[str, float]], target: str) -> float:
    """The reward in [0, 1] of the lines that a reader found; NaN if no text was asked for.

    Lines are joined as they come, so their order matters. Punctuation and accents count: they are compared character
    by character, without Unicode normalization.

    Args:
        recognized: ``(text, confidence)`` for every line, in reading order. Lines whose confidence is not positive are
            ignored. Empty when nothing was read: the reward is then 0.
        target: The text asked for. Without any character but spaces the reward does not apply: NaN.

    Raises:
        TypeError: A target that is no string, or a line that is no pair of a string and a number.
    """
    if not isinstance(target, str):
        raise TypeError(f"target must be a string, but got {target!r}. Use '' for a prompt that asks for no text.")
    wanted = _plain(target)
    if not wanted:
        return math.nan
    read = _plain("".join(text for text, confidence in map(_as_line, recognized) if confidence > 0))
    if wanted in read:
        return 1.0
    return 1 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def edit_distance(first: str, second: str) -> int:
    """The least number of insertions, deletions and substitutions of characters (Levenshtein 1966)."""
    costs = list(range(len(second) + 1))  # from a prefix of first to every prefix of second
    for row, char in enumerate(first, start=1):
        diagonal, costs[0] = costs[0], row
        for column, other in enumerate(second, start=1):
            substituted = diagonal + (char != other)
            diagonal = costs[column]
            costs[column] = min(substituted, diagonal + 1, costs[column - 1] + 1)
    return costs[-1]


def reading_order(boxes: Sequence[Any], lines: Sequence[Line]) -> list[Line]:
    """Lines from top to bottom, and from left to right where they stand side by side.

    Args:
        boxes: The corners of every line, ``[4, 2]``.
        lines: What was read in them.
    """
    corners = [np.asarray(box, dtype=float) for box in boxes]
    heights = [float(np.ptp(box[:, 1])) for box in corners]
    middles = [float(box[:, 1].mean()) for box in corners]
    rows: list[list[int]] = []
    for index in sorted(range(len(lines)), key=middles.__getitem__):
        row = rows[-1] if rows else []
        if row and middles[index] - middles[row[0]] < 0.5 * min(heights[index], heights[row[0]]):
            row.append(index)
        else:
            rows.append([index])
    return [lines[index] for row in rows for index in sorted(row, key=lambda i: float(corners[i][:, 0].min()))]


def _reader(backend: str, threads: int) -> Reader:
    if backend == "rapidocr":
        return _rapidocr(threads)
    module_name, colon, name = backend.partition(":")
    if not colon:
        raise InputError(f"backend must be rapidocr, or module:function of your own, but got {backend!r}.")
    import importlib

    try:
        found: Any = getattr(importlib.import_module(module_name), name, None)
    except ImportError as error:
        raise InputError(f"backend={backend!r} cannot be imported: {error}.") from error
    if not callable(found):
        raise InputError(f"backend={backend!r} does not exist: {module_name} has no function {name}.")
    return found


def _rapidocr(threads: int) -> Reader:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise InputError('The ocr reward needs rapidocr: pip install "mogb[ocr]".') from error
    params: dict[str, Any] = {"Global.log_level": "critical"}
    if threads:
        params |= {f"EngineConfig.onnxruntime.{kind}_op_num_threads": threads for kind in ("intra", "inter")}
    engine: Any = RapidOCR(params=params)

    def read(picture: np.ndarray) -> Sequence[Line]:
        found = engine(np.ascontiguousarray(picture[:, :, ::-1]), use_cls=False)  # it takes BGR
        if found.txts is None:
            return []
        return reading_order(found.boxes, list(zip(found.txts, map(float, found.scores), strict=True)))

    return read


def _plain(text: str) -> str:
    return text.replace(" ", "").lower()


def _as_line(line: tuple[str, float]) -> tuple[str, float]:
    try:
        text, confidence = line
        return "" + text, float(confidence)
    except (TypeError, ValueError):
        raise TypeError(f"recognized must hold pairs (text, confidence), but got {line!r}.") from None
