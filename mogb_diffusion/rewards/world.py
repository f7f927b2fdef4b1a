r"""Five rewards for the tiny world, read from the pixels alone, in the roles of the five of the MARBLE recipe.

==================== ============= ====================================================================================
reward               applies to    what it looks at
==================== ============= ====================================================================================
world_preference     everything    calm paper, and ink in the colours that the prompt asks for
world_aesthetic      everything    white paper and strong ink, whatever is drawn
world_alignment      signs,        the best likeness (normalized cross-correlation) of what the prompt names, wherever
                     objects       it is: soft, blind to counts that are too large and to relations, as CLIP is
world_text           signs         reads letters by matching templates; the metric of the OCR reward judges them
world_composition    objects       finds objects as connected components; the rules of GenEval judge them
==================== ============= ====================================================================================

Elsewhere the last three are NaN. A clean drawing of its prompt gets 1 from each of them.

**Scales.** What a plain sum of rewards starves depends on their spreads. ``as_is`` leaves all rewards as they come.
``in_the_wild`` multiplies each by a constant such that its standard deviation among pictures of one prompt by the base
model is about that of the real rewards: 0.03 for the general ones, 0.3 for the two specialists;
``in_the_wild_reversed`` is the other way round. Neither moves the best picture.

Shapes: B = pictures, H = W = 16.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mogb_diffusion import checks
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rewards import geneval, ocr
from mogb_diffusion.world.drawing import ADVANCE, FONT, INK, PALETTE, SIZE, STAMP, STAMPS
from mogb_diffusion.world.vocabulary import COLORS, SHAPES

Scale = Literal["as_is", "in_the_wild", "in_the_wild_reversed"]
SCALES: tuple[Scale, ...] = ("as_is", "in_the_wild", "in_the_wild_reversed")
GENERAL_SPREAD, SPECIALIST_SPREAD = 0.03, 0.3  # of the real rewards, within the pictures of one prompt

_INK = 0.35  # pixels that differ from white by more are ink
_FULL = 0.9  # the difference of the palest colour of the palette
_LIKENESS = 0.6  # what a letter must exceed to be read
_SMALLEST = 5  # pixels of a component that may be an object


class _WorldReward:
    """A reward of the tiny world."""

    name: ClassVar[str]
    specialist: ClassVar[bool] = False
    picture_size: ClassVar[int] = SIZE  # the only one that it judges
    spread: ClassVar[float]  # standard deviation among pictures of one prompt by the base model

    def __init__(self, *, scale: Scale = "as_is") -> None:
        checks.choice("scale", scale, SCALES)
        self.scale = scale
        wanted = GENERAL_SPREAD if self.specialist == (scale == "in_the_wild_reversed") else SPECIALIST_SPREAD
        self.factor = 1.0 if scale == "as_is" else wanted / self.spread

    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Float[Tensor, " B"]:
        """The rewards of pictures in [0, 1]; NaN where the reward does not apply."""
        images = checks.floating("images", images, "[B, 3, 16, 16]").detach().float().cpu()
        if images.shape[1:] != (3, SIZE, SIZE) or len(images) != len(prompts):
            raise ValueError(
                f"images must have the shape [B, 3, {SIZE}, {SIZE}] with one prompt each, but have "
                f"{list(images.shape)} for {len(prompts)} prompts."
            )
        rewards = torch.full((len(prompts),), math.nan)
        chosen = [index for index, prompt in enumerate(prompts) if self.applies(prompt)]
        if chosen:
            ink = 1 - images[chosen].nan_to_num(0.0).clamp(0, 1)  # what the paper lacks
            rewards[chosen] = self.factor * self._judge(ink, [prompts[index] for index in chosen]).float()
        return rewards

    def applies(self, prompt: Prompt) -> bool:
        """Whether the reward has anything to say about pictures of this prompt."""
        raise NotImplementedError

    def _judge(self, ink: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The rewards as they are of ``[B, 3, 16, 16]``; every prompt is one that the reward applies to."""
        raise NotImplementedError


def _is_sign(prompt: Prompt) -> bool:
    return bool(prompt.target_text)


def _is_objects(prompt: Prompt) -> bool:
    return "include" in prompt.metadata


class Preference(_WorldReward):
    r"""Half for calm, :math:`\exp(-u / 0.08)`, half for the share of ink in colours that the prompt asks for.

    u is the mean difference between neighbouring pixels of paper; less than 200 pairs of them (of 480) count less.
    Objects ask for the colours that they name, or for
    any one of the palette; signs for grey to black; another prompt for anything but white.
    """

    name = "world_preference"
    spread = 0.148

    def applies(self, prompt: Prompt) -> bool:
        return True

    def _judge(self, ink: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        strength = ink.norm(dim=1)
        paper = strength < _INK
        unrest = torch.zeros(len(ink))
        pairs = torch.zeros(len(ink))
        for axis in (1, 2):
            both = paper.narrow(axis, 0, SIZE - 1) & paper.narrow(axis, 1, SIZE - 1)
            unrest += (ink.diff(dim=axis + 1).norm(dim=1) * both).sum(dim=(1, 2))
            pairs += both.sum(dim=(1, 2))
        calm = torch.exp(-unrest / pairs.clamp(min=1) / 0.08) * (pairs / 200).clamp(max=1)
        fits = (_likeness_to_colors(ink) > 0.93) & _asked_for(prompts)[:, :, None, None]
        fitting = (strength * fits.any(dim=1)).sum(dim=(1, 2)) / strength.sum(dim=(1, 2)).clamp(min=1e-6)
        return (calm + fitting) / 2


def _asked_for(prompts: Sequence[Prompt]) -> Tensor:
    """Which colours of the palette, and after them black, fit each prompt, ``[B, 6]``."""
    rows = []
    for prompt in prompts:
        named = {clause.get("color") for clause in prompt.metadata.get("include", ())}
        free = named <= {None}
        rows.append([(free or color in named) and not _is_sign(prompt) for color in COLORS])
        rows[-1].append(_is_sign(prompt) or not _is_objects(prompt))
    return torch.tensor(rows)


class Aesthetic(_WorldReward):
    r"""Half for white paper, :math:`\exp(-p / 0.08)`, half for the mean strength of the ink.

    p is how much the paper lacks of white, in the mean. Pictures with less than twelve pixels of ink, or with less
    than half of them paper, lose what is missing in proportion.
    """

    name = "world_aesthetic"
    spread = 0.159

    def applies(self, prompt: Prompt) -> bool:
        return True

    def _judge(self, ink: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        strength = ink.norm(dim=1).flatten(1)
        inked = strength > _INK
        number = inked.sum(dim=1)
        paper = (strength * ~inked).sum(dim=1) / (SIZE * SIZE - number).clamp(min=1)
        white = torch.exp(-paper / 0.08) * ((SIZE * SIZE - number) / (SIZE * SIZE / 2)).clamp(max=1)
        full = ((strength - _INK) / (_FULL - _INK)).clamp(0, 1)
        strong = (full * inked).sum(dim=1) / number.clamp(min=1) * (number / 12).clamp(max=1)
        return (white + strong) / 2


class Alignment(_WorldReward):
    """How much the best place of the picture looks like what the prompt names; the mean over objects."""

    name = "world_alignment"
    spread = 0.128

    def applies(self, prompt: Prompt) -> bool:
        return _is_sign(prompt) or _is_objects(prompt)

    def _judge(self, ink: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        rewards = torch.zeros(len(prompts))
        signs = [index for index, prompt in enumerate(prompts) if _is_sign(prompt)]
        objects = [index for index, prompt in enumerate(prompts) if not _is_sign(prompt)]
        if signs:
            words = torch.stack([_word_template(str(prompts[index].target_text)) for index in signs])
            rewards[signs] = _correlation_each(ink[signs].norm(dim=1), words).flatten(1).amax(dim=1).clamp(min=0)
        if objects:
            rewards[objects] = _likeness_of_objects(ink[objects], [prompts[index] for index in objects])
        return rewards


def _likeness_of_objects(ink: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """The mean over clauses of the mean likeness of the best ``count`` places, which do not overlap."""
    colored = ((_likeness_to_colors(ink)[:, : len(COLORS)] - 0.8) / 0.2).clamp(min=0)
    evidence = colored * (ink.norm(dim=1, keepdim=True) / _FULL).clamp(max=1)
    jobs = [(row, clause) for row, prompt in enumerate(prompts) for clause in prompt.metadata["include"]]
    maps = torch.stack(
        [evidence[row, COLORS.index(c["color"])] if "color" in c else evidence[row].amax(dim=0) for row, c in jobs]
    )
    templates = torch.stack([_stamp_template(clause["class"]) for _, clause in jobs])
    places = _correlation_each(maps, templates)  # [jobs, 12, 12]
    counts = torch.tensor([clause["count"] for _, clause in jobs])
    found, along = torch.zeros(len(jobs)), torch.arange(places.shape[-1])
    for index in range(int(counts.max())):
        best, where = places.flatten(1).max(dim=1)
        found += best.clamp(min=0) * (index < counts)
        y, x = where // places.shape[-1], where % places.shape[-1]
        near = ((along - y[:, None]).abs() < STAMP)[:, :, None] & ((along - x[:, None]).abs() < STAMP)[:, None, :]
        places = places.masked_fill(near, -1.0)
    total = torch.zeros(len(prompts)).index_add_(0, torch.tensor([row for row, _ in jobs]), found / counts)
    return total / torch.tensor([len(prompt.metadata["include"]) for prompt in prompts])


class Text(_WorldReward):
    """Reads the clearest line of letters, anywhere, and compares it with the word asked for as the OCR reward does."""

    name = "world_text"
    specialist = True
    spread = 0.263

    def applies(self, prompt: Prompt) -> bool:
        return _is_sign(prompt)

    def _judge(self, ink: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        lines = read(1 - ink)
        return torch.tensor(
            [ocr.text_reward([line], str(prompt.target_text)) for line, prompt in zip(lines, prompts, strict=True)]
        )


def read(images: Float[Tensor, "B 3 H W"]) -> list[tuple[str, float]]:
    """The clearest line of letters in each picture, and how clear it is, at most 1; ``("", 0.0)`` if there is none.

    Letters are matched with their templates, blank margins included; on every row of pixels the chain of letters at
    least a letter's width apart whose likenesses exceed 0.6 by most in total is found exactly, and the best row wins.
    """
    letters = "".join(FONT)
    templates = torch.stack([_letter_template(letter) for letter in letters])
    likeness, which = _correlation(1 - images, templates).max(dim=1)  # [B, 12, 14]
    gain = (likeness - _LIKENESS).clamp(min=0)
    best = [torch.zeros(gain.shape[:2])] * ADVANCE  # of what lies left of a column, per row of pixels
    taken = []
    for x in range(gain.shape[2]):
        with_letter = best[-ADVANCE] + gain[:, :, x]
        taken.append((with_letter > best[-1]) & (gain[:, :, x] > 0))
        best.append(torch.maximum(best[-1], with_letter))
    rows = best[-1].argmax(dim=1)
    each = torch.arange(len(images))
    chosen = torch.stack(taken, dim=2)[each, rows].tolist()
    likeness_list, which_list = likeness[each, rows].tolist(), which[each, rows].tolist()
    lines = []
    for row_taken, row_likeness, row_which in zip(chosen, likeness_list, which_list, strict=True):
        x, places = len(row_taken) - 1, []
        while x >= 0:
            if row_taken[x]:
                places.append(x)
            x -= ADVANCE if row_taken[x] else 1
        text = "".join(letters[row_which[place]] for place in reversed(places))
        lines.append((text, sum(row_likeness[place] for place in places) / len(places) if places else 0.0))
    return lines


class Composition(_WorldReward):
    """Finds objects and judges them with the rules of GenEval: the score that models are trained on.

    Args:
        scale: See the module.
        position_bug_compat: See :func:`mogb_diffusion.rewards.geneval.judge`.
        clip_min: The least score; None, as in the reference, leaves it unbounded below.
    """

    name = "world_composition"
    specialist = True
    spread = 0.314

    def __init__(
        self, *, scale: Scale = "as_is", position_bug_compat: bool = True, clip_min: float | None = None
    ) -> None:
        super().__init__(scale=scale)
        self.position_bug_compat, self.clip_min = position_bug_compat, clip_min

    def applies(self, prompt: Prompt) -> bool:
        return _is_objects(prompt)

    def _judge(self, ink: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        judgements = [
            geneval.judge(
                geneval.select_objects(found, prompt.metadata.get("tag", "")),
                prompt.metadata,
                position_bug_compat=self.position_bug_compat,
                clip_min=self.clip_min,
            )
            for found, prompt in zip(detect(1 - ink), prompts, strict=True)
        ]
        return torch.tensor([judgement.score for judgement in judgements])


def detect(images: Float[Tensor, "B 3 H W"]) -> list[dict[str, list[dict[str, Any]]]]:
    """The objects of each picture, by class, for :func:`mogb_diffusion.rewards.geneval.select_objects`.

    An object is a connected component of ink of one colour. Its class is the stamp that it overlaps best; the score
    is 0 for an overlap (intersection over union) of 0.4 and 1 from 0.8 on.
    """
    from scipy import ndimage

    ink = 1 - images
    color = _likeness_to_colors(ink)[:, : len(COLORS)].argmax(dim=1)
    chroma = ink.amax(dim=1) - ink.amin(dim=1)
    inked = (ink.norm(dim=1) > _INK) & (chroma > _INK / 2)
    masks = (F.one_hot(color, len(COLORS)).bool() & inked.unsqueeze(-1)).permute(0, 3, 1, 2).numpy()
    within_picture = np.zeros((3, 3, 3, 3), dtype=bool)
    within_picture[1, 1] = True  # pixels that touch at a corner are connected, too
    labels, _ = ndimage.label(masks, structure=within_picture)
    found: list[dict[str, list[dict[str, Any]]]] = [{} for _ in range(len(images))]
    windows, where = [], []
    for index, (image, which, rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        component = labels[image.start, which.start, rows, columns] == index
        if component.sum() >= _SMALLEST:
            windows.append(_centred(component))
            box = [columns.start, rows.start, columns.stop, rows.stop]
            where.append((image.start, {"box": box, "color": COLORS[which.start]}))
    if windows:
        for (image, item), overlaps in zip(where, _overlaps(np.stack(windows)).tolist(), strict=True):
            best = max(range(len(SHAPES)), key=overlaps.__getitem__)
            item["score"] = min(max((overlaps[best] - 0.4) / 0.4, 0.0), 1.0)
            found[image].setdefault(SHAPES[best], []).append(item)
    return found


def _centred(component: np.ndarray) -> np.ndarray:
    window = np.zeros((2 * SIZE, 2 * SIZE), dtype=np.float32)
    top, left = (SIZE - side // 2 for side in component.shape)
    window[top : top + component.shape[0], left : left + component.shape[1]] = component
    return window


def _overlaps(components: np.ndarray) -> Tensor:
    """Intersection over union with every stamp at its best place, ``[N, shapes]``; components are ``[N, 32, 32]``."""
    stamps = torch.stack([torch.from_numpy(STAMPS[shape]).float() for shape in SHAPES])
    tensor = torch.from_numpy(components).unsqueeze(1)
    shared = F.conv2d(tensor, stamps.unsqueeze(1)).flatten(2).amax(dim=2)
    return shared / (tensor.sum(dim=(1, 2, 3)).unsqueeze(1) + stamps.sum(dim=(1, 2)) - shared)


@cache
def _directions() -> Tensor:
    """What each colour, and after them black, lacks of white, as unit vectors ``[6, 3]``."""
    return F.normalize(1 - torch.tensor([*(PALETTE[color] for color in COLORS), INK]), dim=1)


def _likeness_to_colors(ink: Tensor) -> Tensor:
    """The cosine with every colour and black, ``[B, 6, H, W]``: pale ink of a colour is that colour; paper is none."""
    return torch.einsum("bchw,kc->bkhw", ink / ink.norm(dim=1, keepdim=True).clamp(min=1e-6), _directions())


def _with_margin(bitmap: np.ndarray) -> Tensor:
    return F.pad(torch.from_numpy(bitmap).float(), (1, 1, 1, 1))


@cache
def _stamp_template(shape: str) -> Tensor:
    return _standardized(_with_margin(STAMPS[shape]))


@cache
def _letter_template(letter: str) -> Tensor:
    return _standardized(_with_margin(FONT[letter]))


@cache
def _word_template(word: str) -> Tensor:
    blank = np.zeros((5, ADVANCE - 3), dtype=bool)
    columns = [part for letter in word for part in (FONT.get(letter, np.zeros((5, 3), dtype=bool)), blank)]
    return _standardized(_with_margin(np.concatenate(columns[:-1], axis=1)))


def _standardized(template: Tensor) -> Tensor:
    centred = template - template.mean()
    return centred / centred.norm().clamp(min=1e-6)


def _correlation(ink: Tensor, templates: Tensor) -> Tensor:
    """Normalized cross-correlation of each picture's ink ``[B, 3, H, W]`` with every template ``[T, h, w]``."""
    strength = F.pad(ink.norm(dim=1, keepdim=True), (1, 1, 1, 1))
    return F.conv2d(strength, templates.unsqueeze(1)) / _contrast(strength, templates.shape[1:])


def _correlation_each(maps: Tensor, templates: Tensor) -> Tensor:
    """The same of each map ``[B, H, W]`` with its own template ``[B, h, w]``."""
    padded = F.pad(maps, (1, 1, 1, 1))
    product = F.conv2d(padded.unsqueeze(0), templates.unsqueeze(1), groups=len(maps)).squeeze(0)
    return product / _contrast(padded.unsqueeze(1), templates.shape[1:]).squeeze(1)


def _contrast(maps: Tensor, window: Sequence[int]) -> Tensor:
    """The norm of every window less its mean; at least 0.5, so that nearly empty windows look like nothing."""
    area = window[0] * window[1]
    box = torch.ones(1, 1, *window)
    squares = F.conv2d(maps.square(), box) - F.conv2d(maps, box).square() / area
    return squares.clamp(min=0.25).sqrt()


REWARDS: Mapping[str, Callable[..., _WorldReward]] = {
    reward.name: reward for reward in (Preference, Aesthetic, Alignment, Text, Composition)
}
