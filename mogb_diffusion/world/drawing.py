r"""Drawing the tiny world: 16 x 16 pixels, white paper, stamps of 5 x 5 pixels and letters of 3 x 5.

Clean drawings show what the prompt says and nothing else: every reward gives them its best. Pictures to learn from are
by a careless hand, so that a model that imitates them well leaves something to be improved: wrong letters, objects of
another kind, colour, number or place than the prompt's, a texture on the paper, pale ink, blur, noise in the pixels.

Everything has its place: letters in three slots, objects in four, both in reading order. With objects anywhere, the
same model needed several times the training until its squares were square. With places drawn from the four, it decided
for each of them on its own whether something stood there: right in the mean, wrong in most pictures, and at a point
where no small change of one place makes counts better, so that reinforcement learning had nothing to follow.

Everything random comes from the generator that is passed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mogb_diffusion.prompts import Prompt
from mogb_diffusion.world.vocabulary import COLORS, NUMBERS, RELATIONS, SHAPES

Clause = Mapping[str, Any]  # of GenEval: class, count, perhaps color and position

SIZE = 16  # of a picture
STAMP, MARGIN = 5, 2  # of an object, and of the quarter that it stands in
TEXT_LEFT, TEXT_TOP, ADVANCE = 2, 6, 4  # where the first letter is written, and the distance to the next
PAPER = (1.0, 1.0, 1.0)
INK = (0.1, 0.1, 0.1)  # of letters
PALETTE = {
    "red": (0.85, 0.15, 0.15),
    "yellow": (0.95, 0.8, 0.1),
    "green": (0.1, 0.75, 0.3),
    "blue": (0.1, 0.3, 0.95),
    "purple": (0.65, 0.15, 0.85),
}

_STAMPS = {
    "circle": (".###.", "#...#", "#...#", "#...#", ".###."),
    "square": ("#####", "#####", "#####", "#####", "#####"),
    "triangle": ("..#..", "..#..", ".###.", ".###.", "#####"),
}
_FONT = {
    "A": (".#.", "#.#", "###", "#.#", "#.#"),
    "C": (".##", "#..", "#..", "#..", ".##"),
    "E": ("###", "#..", "##.", "#..", "###"),
    "I": ("###", ".#.", ".#.", ".#.", "###"),
    "L": ("#..", "#..", "#..", "#..", "###"),
    "N": ("##.", "#.#", "#.#", "#.#", "#.#"),
    "O": (".#.", "#.#", "#.#", "#.#", ".#."),
    "P": ("##.", "#.#", "##.", "#..", "#.."),
    "S": (".##", "#..", ".#.", "..#", "##."),
    "T": ("###", ".#.", ".#.", ".#.", ".#."),
}


def _bitmaps(rows: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    return {name: np.array([[char == "#" for char in row] for row in lines]) for name, lines in rows.items()}


STAMPS, FONT = _bitmaps(_STAMPS), _bitmaps(_FONT)


@dataclass(frozen=True)
class Placed:
    """An object of a drawing; x and y of its upper left corner."""

    shape: str
    color: str
    x: int
    y: int


@dataclass(frozen=True, kw_only=True)
class Nuisances:
    """How often a picture has what no prompt asks for: probabilities, independent of each other.

    Attributes:
        misspelled: A letter of a sign is another one.
        mistaken: An object, or a group of them, differs from what was asked for in one respect.
        texture: The paper has stripes or checks.
        pale: The ink is pale.
        blur: The picture is blurred.
        noise: The pixels are noisy.
    """

    misspelled: float = 0.3
    mistaken: float = 0.2
    texture: float = 0.6
    pale: float = 0.4
    blur: float = 0.25
    noise: float = 0.25


CLEAN = Nuisances(misspelled=0, mistaken=0, texture=0, pale=0, blur=0, noise=0)


def draw(
    prompts: Sequence[Prompt], generator: torch.Generator, *, nuisances: Nuisances = CLEAN
) -> Float[Tensor, "B 3 16 16"]:
    """One picture in [0, 1] for every prompt.

    Args:
        prompts: Of :mod:`mogb_diffusion.world.captions`: with a ``target_text`` or with GenEval's ``include``. One
            with neither gives blank paper.
        generator: The source of colours that the prompt leaves open, and of nuisances; it is advanced.
        nuisances: What is added; nothing by default.
    """
    random = Random(int(torch.randint(2**62, (), generator=generator)))
    pictures = np.empty((len(prompts), 3, SIZE, SIZE), dtype=np.float32)
    pictures[:] = np.array(PAPER, dtype=np.float32)[:, None, None]
    for picture, prompt in zip(pictures, prompts, strict=True):
        if prompt.target_text is not None:
            _write(picture, misspelled(prompt.target_text, nuisances.misspelled, random))
        for item in lay_out(mistaken(prompt.metadata.get("include", ()), nuisances.mistaken, random), random):
            _paint(picture, STAMPS[item.shape], item.x, item.y, PALETTE[item.color])
    return _with_nuisances(torch.from_numpy(pictures), generator, nuisances)


def misspelled(word: str, probability: float, random: Random) -> str:
    """The word, with each letter replaced by another one with this probability."""
    others = {letter: [other for other in FONT if other != letter] for letter in word}
    return "".join(random.choice(others[letter]) if random.random() < probability else letter for letter in word)


def mistaken(clauses: Sequence[Clause], probability: float, random: Random) -> list[Clause]:
    """The clauses, each with this probability with another class, colour, number or relation than asked for."""
    return [_mistaken(clause, random) if random.random() < probability else clause for clause in clauses]


def _mistaken(clause: Clause, random: Random) -> Clause:
    alternatives: dict[str, list[Any]] = {"class": [shape for shape in SHAPES if shape != clause["class"]]}
    if "color" in clause:
        alternatives["color"] = [color for color in COLORS if color != clause["color"]]
    if clause["count"] > 1:
        alternatives["count"] = [count for count in NUMBERS if count != clause["count"]]
    if "position" in clause:
        alternatives["position"] = [
            [other, clause["position"][1]] for other in RELATIONS if other != clause["position"][0]
        ]
    key = random.choice(list(alternatives))
    return {**clause, key: random.choice(alternatives[key])}


def lay_out(clauses: Sequence[Clause], random: Random) -> list[Placed]:
    """Where the objects of GenEval's clauses go: the middles of the quarters of the picture, in reading order."""
    wanted = [clause for clause in clauses for _ in range(clause["count"])]
    relation = next((clause["position"][0] for clause in clauses if "position" in clause), None)
    colors = [clause.get("color") or random.choice(COLORS) for clause in clauses]
    repeated = [color for clause, color in zip(clauses, colors, strict=True) for _ in range(clause["count"])]
    return [
        Placed(clause["class"], color, MARGIN + SIZE // 2 * column, MARGIN + SIZE // 2 * row)
        for clause, color, (column, row) in zip(wanted, repeated, _quarters(len(wanted), relation), strict=True)
    ]


def _quarters(count: int, relation: str | None) -> list[tuple[int, int]]:
    """Different quarters (column, row) for the objects, in reading order; with a relation, as it says."""
    if relation is None:
        return [(0, 0), (1, 0), (0, 1), (1, 1)][:count]
    later = int(relation in ("right of", "below"))
    along = [1 - later, later]  # of the first object and of the second, which is the one that is right of or below
    return [(place, 0) if relation in ("left of", "right of") else (0, place) for place in along]


def _write(picture: np.ndarray, word: str) -> None:
    for index, letter in enumerate(word):
        if letter not in FONT or TEXT_LEFT + ADVANCE * index + 3 > SIZE:
            raise ValueError(f"Only words of up to three letters of {''.join(FONT)} can be drawn, but got {word!r}.")
        _paint(picture, FONT[letter], TEXT_LEFT + ADVANCE * index, TEXT_TOP, INK)


def _paint(picture: np.ndarray, bitmap: np.ndarray, x: int, y: int, color: tuple[float, float, float]) -> None:
    height, width = bitmap.shape
    picture[:, y : y + height, x : x + width][:, bitmap] = np.array(color, dtype=np.float32)[:, None]


def _with_nuisances(pictures: Tensor, generator: torch.Generator, nuisances: Nuisances) -> Tensor:
    if nuisances == CLEAN:
        return pictures
    count = len(pictures)
    uniform = torch.rand(count, 16, generator=generator)
    texture, pale, blur, noise = (
        (uniform[:, index] < getattr(nuisances, name)).float().view(-1, 1, 1, 1)
        for index, name in enumerate(("texture", "pale", "blur", "noise"))
    )
    paper = (pictures == 1).all(dim=1, keepdim=True)
    contrast = 1 - pale * (0.25 + 0.3 * uniform[:, 4].view(-1, 1, 1, 1))
    pictures = 1 - contrast * (1 - pictures)
    pictures = torch.where(paper, 1 - texture * _texture(uniform[:, 5:13]), pictures)
    softened = torch.nn.functional.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)
    pictures = torch.lerp(pictures, softened, blur * (0.4 + 0.4 * uniform[:, 13].view(-1, 1, 1, 1)))
    strength = noise * (0.05 + 0.1 * uniform[:, 14].view(-1, 1, 1, 1))
    return (pictures + strength * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)


def _texture(uniform: Tensor) -> Tensor:
    """How much darker the paper is, ``[B, 3, 16, 16]``: stripes or checks in a pale tint."""
    step_x, step_y = (uniform[:, index].mul(3).long().view(-1, 1, 1) for index in (0, 1))
    period = (3 + uniform[:, 2].mul(3).long()).view(-1, 1, 1)
    along = torch.arange(SIZE)
    phase = (along.view(1, 1, -1) * step_x + along.view(1, -1, 1) * (step_y + (step_x == 0))) % period
    tint = 0.3 + 0.7 * uniform[:, 3:6]
    amplitude = 0.1 + 0.15 * uniform[:, 6]
    return (phase < period // 2).float().unsqueeze(1) * (tint * amplitude.unsqueeze(1)).view(-1, 3, 1, 1)


assert set(STAMPS) == set(SHAPES)
assert set(PALETTE) == set(COLORS)
