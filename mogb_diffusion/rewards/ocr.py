r"""How well the text that was read from an image matches the text that was asked for.

.. math::  reward = 1 - \min(d(read, target),\ |target|)\, /\, |target|

d is the edit distance, or 0 if the target occurs anywhere in what was read. Spaces and case do not count. The metric
of Flow-GRPO and DiffusionNFT.
"""

import math
from collections.abc import Sequence


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


def _plain(text: str) -> str:
    return text.replace(" ", "").lower()


def _as_line(line: tuple[str, float]) -> tuple[str, float]:
    try:
        text, confidence = line
        return "" + text, float(confidence)
    except (TypeError, ValueError):
        raise TypeError(f"recognized must hold pairs (text, confidence), but got {line!r}.") from None
