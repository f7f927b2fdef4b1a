r"""The rules of GenEval: does what was detected in an image match what the prompt asked for?

Two judgements of the same detections. ``correct`` is that of the benchmark (Ghosh et al. 2023, arXiv 2310.11513):
every clause is checked on its ``count`` best objects, and more of them are fine unless a clause excludes them.
``strict_correct`` and ``score`` are what Flow-GRPO and DiffusionNFT train on: the number of objects must match
exactly, excluded clauses are not looked at, and the score is a mean over partial credits.

The training score has quirks that published runs include. It has no lower bound (five dogs instead of one give −3), and
a clause whose position fails still gets its full credit for the position beside the 0, so that it loses a quarter
instead of a third. Both can be switched off: ``clip_min=0.0``, ``position_bug_compat=False``.

This file needs no detector: a detection is a class, a box ``x1, y1, x2, y2`` in pixels (y grows downwards), a score,
and the name of its colour, if it was looked at.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OBJECT_THRESHOLD = 0.3  # detections must score above this,
COUNTING_THRESHOLD = 0.9  # or above this when the prompt is about counting
MAX_OBJECTS = 16  # of one class
NMS_THRESHOLD = 1.0  # the overlap from which the weaker of two boxes is dropped: 1 switches it off
POSITION_THRESHOLD = 0.1  # the part of both sizes that does not count as an offset
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

Box = Sequence[float]
Detections = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the rules say about one image.

    Attributes:
        correct: By the rule of the benchmark.
        strict_correct: By the rule of the training code: exact counts.
        score: The training reward, at most 1.
    """

    correct: bool
    strict_correct: bool
    score: float


def relative_position(box_a: Box, box_b: Box, threshold: float = POSITION_THRESHOLD) -> set[str]:
    """Where A lies with respect to B: none, one or two of ``left of``, ``right of``, ``above``, ``below``.

    Per axis, the offset of the centres shrinks by ``threshold`` times the sum of both sizes; what remains, divided by
    the length of the whole offset, must exceed 1/2.
    """
    a, b = _as_box("box_a", box_a), _as_box("box_b", box_b)
    offset = [(a[axis] + a[axis + 2]) / 2 - (b[axis] + b[axis + 2]) / 2 for axis in (0, 1)]
    sizes = [(a[axis + 2] - a[axis]) + (b[axis + 2] - b[axis]) for axis in (0, 1)]
    shrunk = [
        math.copysign(max(abs(along) - threshold * size, 0.0), along) for along, size in zip(offset, sizes, strict=True)
    ]
    if all(abs(along) < 1e-3 for along in shrunk):
        return set()
    length = math.sqrt(offset[0] ** 2 + offset[1] ** 2)
    x, y = shrunk[0] / length, shrunk[1] / length
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation in RELATIONS if holds[relation]}


def iou(box_a: Box, box_b: Box) -> float:
    """Intersection over union of two boxes whose last pixels belong to them: a side is ``x2 - x1 + 1`` pixels long."""
    a, b = _as_box("box_a", box_a), _as_box("box_b", box_b)
    sides = [max(min(a[axis + 2], b[axis + 2]) - max(a[axis], b[axis]) + 1, 0.0) for axis in (0, 1)]
    shared = sides[0] * sides[1]
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return shared / (sum(areas) - shared)


def select_objects(
    detections: Detections, tag: str, *, nms_threshold: float = NMS_THRESHOLD
) -> dict[str, list[Mapping[str, Any]]]:
    """The detections that count, best first: what :func:`judge` expects.

    Keeps scores above 0.3 (above 0.9 if the tag is ``"counting"``), the best 16 of each class and, if
    ``nms_threshold`` is below 1, only boxes that overlap less than that with every better one. Classes without any
    object are absent.

    Args:
        detections: For every class, mappings with ``box`` and ``score``; other keys are passed on.
        tag: Of the prompt's metadata.
        nms_threshold: In (0, 1]; 1, as in the benchmark, drops nothing.
    """
    if not 0 < nms_threshold <= 1:
        raise ValueError(f"nms_threshold must lie in (0, 1], where 1 drops nothing, but got {nms_threshold!r}.")
    least = COUNTING_THRESHOLD if tag == "counting" else OBJECT_THRESHOLD
    selected = {}
    for name, found in detections.items():
        best_first = sorted((item for item in found if item["score"] > least), key=lambda item: -item["score"])
        kept: list[Mapping[str, Any]] = []
        for item in best_first[:MAX_OBJECTS]:
            if nms_threshold == 1 or all(iou(item["box"], other["box"]) < nms_threshold for other in kept):
                kept.append(item)
        if kept:
            selected[name] = kept
    return selected


def judge(
    detections: Detections,
    metadata: Mapping[str, Any],
    *,
    position_bug_compat: bool = True,
    clip_min: float | None = None,
) -> Judgement:
    """Judges one image.

    Args:
        detections: For every class, its objects, thresholded and best first (:func:`select_objects`), as mappings with
            ``box`` and, where a clause asks for a colour, ``color``. An absent class has no objects.
        metadata: Of the prompt, as in the files of GenEval: ``include`` is a list of clauses with ``class``, ``count``
            and perhaps ``color`` or ``position: [relation, index of an earlier clause]``; ``exclude`` is optional.
        position_bug_compat: Give a clause its credit for the position also when the position fails, like the
            reference.
        clip_min: The least score, for training; None leaves it unbounded, like the reference.

    Raises:
        ValueError: Metadata without clauses, a count below 1, an unknown relation, or a position that refers to no
            earlier clause; or a box that is not four finite numbers in order.
    """
    include, exclude = _as_clauses(metadata)
    strict, credits_ = _judge_strictly(detections, include, position_bug_compat)
    score = sum(credits_) / len(credits_)
    return Judgement(
        correct=_judge_as_benchmark(detections, include, exclude),
        strict_correct=strict,
        score=score if clip_min is None else max(score, clip_min),
    )


def _judge_as_benchmark(
    detections: Detections, include: Sequence[Mapping[str, Any]], exclude: Sequence[Mapping[str, Any]]
) -> bool:
    groups: list[Sequence[Mapping[str, Any]] | None] = []  # the objects of every clause; None where it failed
    for clause in include:
        count = clause["count"]
        found = detections.get(clause["class"], ())[:count]
        holds = len(found) == count and ("color" not in clause or _colored(found, clause["color"]) >= count)
        if holds and "position" in clause:
            relation, index = clause["position"]
            others = groups[index]
            holds = others is not None and _all_related(found, others, relation)
        groups.append(found if holds else None)
    crowded = any(len(detections.get(clause["class"], ())) >= clause["count"] for clause in exclude)
    return all(group is not None for group in groups) and not crowded


def _judge_strictly(
    detections: Detections, include: Sequence[Mapping[str, Any]], position_bug_compat: bool
) -> tuple[bool, list[float]]:
    groups: list[Sequence[Mapping[str, Any]] | None] = []
    earned: list[float] = []
    for clause in include:
        count = clause["count"]
        found = detections.get(clause["class"], ())
        holds = len(found) == count
        earned.append(1 - abs(count - len(found)) / count)
        if not holds and ("color" in clause or "position" in clause):
            earned.append(0.0)
        if holds and "color" in clause:
            matching = _colored(found, clause["color"])
            earned.append(1 - abs(count - matching) / count)
            holds = matching == count
        if holds and "position" in clause:
            relation, index = clause["position"]
            others = groups[index]
            holds = others is not None and _all_related(found, others, relation)
            if not holds:
                earned.append(0.0)
            if holds or (position_bug_compat and others is not None):
                earned.append(1.0)
        groups.append(found if holds else None)
    return all(group is not None for group in groups), earned


def _colored(found: Sequence[Mapping[str, Any]], color: str) -> int:
    return sum(item.get("color") == color for item in found)


def _all_related(found: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], relation: str) -> bool:
    return all(relation in relative_position(item["box"], other["box"]) for item in found for other in others)


def _as_clauses(metadata: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    include, exclude = list(metadata.get("include", ())), list(metadata.get("exclude", ()))
    if not include:
        raise ValueError(
            f"metadata must have at least one clause under 'include', but has the keys {sorted(metadata)}. "
            "Give NaN for prompts without GenEval metadata."
        )
    for kind, clauses in (("include", include), ("exclude", exclude)):
        for index, clause in enumerate(clauses):
            where = f"metadata[{kind!r}][{index}]"
            if not isinstance(clause.get("class"), str) or not isinstance(clause.get("count"), int):
                raise ValueError(f"{where} must have a 'class' (a name) and a 'count' (an integer), but is {clause!r}.")
            if clause["count"] < 1:
                raise ValueError(f"{where}['count'] must be at least 1, but is {clause['count']}.")
            if "position" in clause:
                _check_position(f"{where}['position']", clause["position"], index)
    return include, exclude


def _check_position(where: str, position: Any, index: int) -> None:
    pair = list(position) if isinstance(position, Sequence) and not isinstance(position, str) else []
    if len(pair) != 2 or pair[0] not in RELATIONS or not isinstance(pair[1], int) or not 0 <= pair[1] < index:
        raise ValueError(
            f"{where} must be [relation, index], a relation of {', '.join(RELATIONS)} and the index of an earlier "
            f"clause, below {index}, but is {position!r}."
        )


def _as_box(name: str, box: Box) -> tuple[float, float, float, float]:
    values = [float(value) for value in box]
    if len(values) != 4 or not all(map(math.isfinite, values)) or values[2] < values[0] or values[3] < values[1]:
        raise ValueError(f"{name} must be x1, y1, x2, y2 with x1 <= x2 and y1 <= y2, but got {values}.")
    return values[0], values[1], values[2], values[3]
