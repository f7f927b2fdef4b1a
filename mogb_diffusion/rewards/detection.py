"""The GenEval reward: objects found by Mask2Former, their colours named by CLIP, judged by GenEval's rules.

The original uses mmdetection's weights of Mask2Former, which current packages cannot run. This uses Meta's weights of
the same network and the post-processing of mmdetection: its numbers are GenEval-compatible, not identical.

Shapes: Q = queries, C = classes, H, W = of the picture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mogb_diffusion import checks
from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import Prompt, in_batches
from mogb_diffusion.rewards._clip import (
    Clip,
    Pictures,
    as_device,
    as_dtype,
    bicubic_crop,
    eight_bit,
    import_transformers,
    load_clip,
    missing,
    normalise,
)
from mogb_diffusion.rewards._weights import Weights
from mogb_diffusion.rewards.geneval import COLORS, Judgement, judge, select_objects

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHORT_SIDE, LONG_SIDE, DIVISOR, TOP = 800, 1333, 32, 100
GREY = 153  # behind an object whose colour is looked at
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
Metric = Literal["score", "strict", "correct"]

# COCO's 80 classes in the order of their indices, under GenEval's names.
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Instance:
    """One detected object.

    Attributes:
        label: The index of its class.
        score: The probability of the class, times the mean confidence of the mask.
        box: ``x1, y1, x2, y2`` in pixels, the last ones exclusive.
        mask: ``[H, W]``.
    """

    label: int
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray


class Detector:
    """Instance segmentation of pictures.

    Args:
        weights: Of a ``transformers.Mask2FormerForUniversalSegmentation``.
        short_side: The short side of what it is given,
        long_side: unless the long one would be longer than this.
    """

    def __init__(self, weights: Weights, short_side: int = SHORT_SIDE, long_side: int = LONG_SIDE) -> None:
        self.weights = weights
        self.short_side = short_side
        self.long_side = long_side

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> list[list[Instance]]:
        """The objects of each picture of one batch, uint8 ``[B, 3, H, W]``, best first."""
        size = (pictures.shape[2], pictures.shape[3])
        ratio = min(self.short_side / min(size), self.long_side / max(size))
        content = (int(size[0] * ratio + 0.5), int(size[1] * ratio + 0.5))
        pixels = functional.interpolate(pictures.float(), content, mode="bilinear", align_corners=False) / 255
        padded = tuple(-(-side // DIVISOR) * DIVISOR for side in content)
        pixels = functional.pad(normalise(pixels, MEAN, STD), (0, padded[1] - content[1], 0, padded[0] - content[0]))
        with self.weights.on_device() as model:
            out = model(pixel_values=pixels.to(self.weights.device, self.weights.dtype))
        return [
            find_instances(logits, masks, (padded[0], padded[1]), content, size)
            for logits, masks in zip(
                out.class_queries_logits.float().cpu(), out.masks_queries_logits.float().cpu(), strict=True
            )
        ]


def find_instances(
    logits: Tensor, masks: Tensor, padded: tuple[int, int], content: tuple[int, int], size: tuple[int, int]
) -> list[Instance]:
    """Mask2Former's instances as mmdetection reads them off.

    Args:
        logits: ``[Q, C + 1]``; the last class is no object.
        masks: ``[Q, h, w]``, before they are enlarged.
        padded: Height and width of what the network saw,
        content: without its padding,
        size: and of the picture.
    """
    masks = functional.interpolate(masks[None], padded, mode="bilinear", align_corners=False)
    masks = masks[:, :, : content[0], : content[1]]
    masks = functional.interpolate(masks, size, mode="bilinear", align_corners=False)[0]
    probabilities = logits.softmax(-1)[:, :-1]
    best = probabilities.flatten().topk(min(TOP, probabilities.numel()))
    found = []
    for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        query, label = divmod(index, probabilities.shape[1])
        inside = masks[query] > 0
        if not inside.any():
            continue
        rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
        box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
        confidence = float(masks[query][inside].sigmoid().mean())
        found.append(Instance(label, value * confidence, box, inside.numpy()))
    return sorted(found, key=lambda instance: -instance.score)


class ColorNamer:
    """The colour of an object: the one of ten whose description is nearest to its pixels on grey, by CLIP."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self._described: dict[str, Tensor] = {}

    def __call__(self, picture: Tensor, instances: Sequence[Instance], name: str) -> list[str]:
        """The colours of objects of one class, on a picture uint8 ``[3, H, W]``."""
        if not instances:
            return []
        crops = [bicubic_crop(_on_grey(picture, instance)[None], self.clip.size) for instance in instances]
        likeness = self.clip.images(torch.cat(crops)) @ self._descriptions(name).T
        return [COLORS[index] for index in likeness.argmax(-1).tolist()]

    def _descriptions(self, name: str) -> Tensor:
        if name not in self._described:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            means = self.clip.texts(texts).view(len(COLORS), len(TEMPLATES), -1).mean(1)
            self._described[name] = functional.normalize(means, dim=-1)
        return self._described[name]


def _on_grey(picture: Tensor, instance: Instance) -> Tensor:
    mask = torch.from_numpy(instance.mask)
    composed = torch.where(mask, picture, torch.tensor(GREY, dtype=torch.uint8))
    left, top, right, bottom = (round(side) for side in instance.box)
    return composed[:, top:bottom, left:right]


class GenEval:
    """Whether a picture shows the objects, numbers, colours and positions that its prompt asks for.

    It applies to prompts with GenEval's ``include`` in their metadata.

    Args:
        model: Mask2Former trained on COCO instances (the weights' licence: see their page on the hub): a hub name or a
            folder.
        clip: The CLIP that names colours; loaded when a prompt first asks for one.
        metric: ``"score"``, the partial credit that Flow-GRPO and DiffusionNFT train on; ``"strict"`` or ``"correct"``,
            1 or 0 by the rule of the training code or of the benchmark.
        device: Where both run.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        short_side: Of what the detector is given.
        long_side: Of it, at most.
        batch_size: Pictures that the detector is given at once.
        offload: Whether the weights lie on the CPU between calls.

    Raises:
        InputError: Weights that are not there, or an impossible option.
    """

    specialist = True

    def __init__(
        self,
        model: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "openai/clip-vit-large-patch14",
        metric: Metric = "score",
        device: str = "cpu",
        dtype: str = "float32",
        short_side: int = SHORT_SIDE,
        long_side: int = LONG_SIDE,
        batch_size: int = 4,
        offload: bool = False,
    ) -> None:
        if metric not in get_args(Metric):
            raise InputError(f"metric must be one of {', '.join(get_args(Metric))}, but got {metric!r}.")
        if not 1 <= short_side <= long_side:
            raise InputError(f"short_side and long_side must be 1 <= short <= long, but got {short_side}, {long_side}.")
        self.metric = metric
        self.batch_size = checks.whole_number("batch_size", batch_size)
        self.weights = _load_model(model, device, dtype, offload)
        self.detector = Detector(self.weights, short_side, long_side)
        self._clip = (clip, clip, device, dtype, offload)

    def applies(self, prompt: Prompt) -> bool:
        """Whether the prompt says what it includes."""
        return "include" in prompt.metadata

    def __call__(self, images: Pictures, prompts: Sequence[Prompt]) -> Tensor:
        """The rewards ``[B]``; NaN where the prompt says nothing about objects."""
        rewards = torch.full((len(prompts),), float("nan"))
        chosen = [index for index, prompt in enumerate(prompts) if self.applies(prompt)]
        pictures = eight_bit(images)
        with self.weights.on_device():
            for part in in_batches(chosen, self.batch_size):
                verdicts = self.judge(pictures[list(part)], [prompts[index].metadata for index in part])
                rewards[list(part)] = torch.tensor([_number(verdict, self.metric) for verdict in verdicts])
        return rewards

    def judge(self, pictures: Tensor, metadata: Sequence[Mapping[str, Any]]) -> list[Judgement]:
        """All judgements of one batch of pictures, uint8 ``[B, 3, H, W]``."""
        return [
            judge(self._detections(picture, instances, wanted), wanted)
            for picture, instances, wanted in zip(pictures, self.detector(pictures), metadata, strict=True)
        ]

    def _detections(
        self, picture: Tensor, instances: Sequence[Instance], metadata: Mapping[str, Any]
    ) -> dict[str, list[Mapping[str, Any]]]:
        """What :func:`~mogb_diffusion.rewards.geneval.judge` takes: objects by class, above GenEval's thresholds."""
        found: dict[str, list[dict[str, Any]]] = {}
        for instance in instances:
            item = {"box": list(instance.box), "score": instance.score, "color": None, "instance": instance}
            found.setdefault(CLASSES[instance.label], []).append(item)
        chosen = select_objects(found, str(metadata.get("tag", "")))
        for name in {clause["class"] for clause in metadata["include"] if "color" in clause} & chosen.keys():
            objects = chosen[name]
            colors = self.color_namer(picture, [item["instance"] for item in objects], name)
            chosen[name] = [{**item, "color": color} for item, color in zip(objects, colors, strict=True)]
        return chosen

    @property
    def color_namer(self) -> ColorNamer:
        """Of this reward's CLIP."""
        return _color_namer(*self._clip)


@cache
def _color_namer(model: str, tokenizer: str, device: str, dtype: str, offload: bool) -> ColorNamer:
    return ColorNamer(load_clip(model, tokenizer, device, dtype, offload))


@cache
def _load_model(name: str, device: str, dtype: str, offload: bool) -> Weights:
    transformers = import_transformers()
    try:
        model = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(missing(name, error)) from error
    if model.config.num_labels != len(CLASSES):
        raise InputError(f"{name!r} knows {model.config.num_labels} classes, but GenEval needs COCO's {len(CLASSES)}.")
    return Weights(model.to(as_dtype(dtype)), as_device(device), offload)


def _number(verdict: Judgement, metric: Metric) -> float:
    numbers = {"score": verdict.score, "strict": verdict.strict_correct, "correct": verdict.correct}
    return float(numbers[metric])
