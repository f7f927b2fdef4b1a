"""Prompts without a download: GenEval's six kinds over COCO's classes, and pictures that show a text.

GenEval's own test prompts are for measuring. Training prompts of the same form can be drawn here, apart from a given
test file: no prompt of that file is drawn.
"""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from mogb_diffusion.checks import whole_number
from mogb_diffusion.errors import InputError
from mogb_diffusion.rewards.detection import CLASSES
from mogb_diffusion.rewards.geneval import COLORS, RELATIONS

KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBERS = {2: "two", 3: "three", 4: "four"}
THINGS = tuple(name for name in CLASSES if name != "person")  # people have no colour
IRREGULAR = {"person": "people", "sheep": "sheep", "mouse": "mice", "knife": "knives", "skis": "skis",
             "scissors": "scissors", "broccoli": "broccoli", "bus": "buses", "couch": "couches", "bench": "benches",
             "sandwich": "sandwiches", "toothbrush": "toothbrushes", "wine glass": "wine glasses",
             "computer mouse": "computer mice", "hair drier": "hair driers"}  # fmt: skip
PATIENCE = 1000  # draws without a new prompt before it is said that there are no more

SCENES = (
    'A storefront with the words "{}" above the door',
    'A hand-painted wooden sign that reads "{}"',
    'A neon sign that says "{}" on a brick wall at night',
    'A birthday cake with "{}" written in icing',
    'A book cover with the title "{}"',
    'A street sign that says "{}" under a cloudy sky',
    'A t-shirt with "{}" printed on the chest',
    'A chalkboard in a cafe with "{}" written on it',
    'A coffee mug with the text "{}"',
    'A train station display that shows "{}"',
    'A postcard with "{}" in large letters',
    'A rocket with "{}" painted on its side',
    'A newspaper with the headline "{}"',
    'A museum label that reads "{}"',
    'A road with "{}" painted on the asphalt',
    'A balloon with the word "{}" on it',
)
FIRST = ("Open", "Fresh", "Grand", "Quiet", "Happy", "Summer", "Winter", "Golden", "Daily", "Lucky", "Secret", "Far",
         "Royal", "Silver", "Green", "Hidden", "Midnight", "Morning", "Northern", "Modern")  # fmt: skip
SECOND = ("Bakery", "Garden", "Market", "Journey", "Harbor", "Station", "Library", "Coffee", "Theater", "Museum", "Sun",
          "Sale", "Birthday", "Festival", "Kitchen", "Studio", "River", "Express", "Hotel", "Adventure")  # fmt: skip


def geneval_prompts(
    count: int, seed: int = 0, *, kinds: Collection[str] = KINDS, apart_from: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Lines of GenEval's metadata format, all different, its kinds in turn.

    Args:
        count: How many.
        seed: Of the draws.
        kinds: Which of GenEval's kinds.
        apart_from: Prompts that must not be drawn.

    Raises:
        InputError: An unknown kind, or more prompts than there are.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise InputError(f"kinds must be some of {', '.join(KINDS)}, but got {', '.join(unknown) or 'none'}.")
    makers = [(kind, _MAKERS[kind]) for kind in KINDS if kind in kinds]
    draw = _Draw(seed)

    def one(number: int) -> dict[str, Any]:
        kind, maker = makers[number % len(makers)]
        return {"tag": kind, **maker(draw)}

    return _distinct(count, one, lambda line: str(line["prompt"]), apart_from)


def ocr_prompts(count: int, seed: int = 0, *, apart_from: Collection[str] = ()) -> list[str]:
    """Prompts whose text in double quotes is to be shown, all different.

    Raises:
        InputError: More prompts than there are.
    """
    draw = _Draw(seed)

    def one(number: int) -> str:
        words = f"{draw.of(FIRST)} {draw.of(SECOND)}"
        if draw.below(4) == 0:
            words = words.upper()
        if draw.below(4) == 0:
            words = f"{words} {1 + draw.below(99)}"
        return draw.of(SCENES).format(words)

    return _distinct(count, one, str, apart_from)


def write_geneval(path: str | Path, lines: list[dict[str, Any]]) -> None:
    """Writes a metadata file as GenEval has them."""
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_text(path: str | Path, lines: list[str]) -> None:
    """Writes one prompt a line."""
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


class _Draw:
    """Choices from one generator."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def below(self, limit: int) -> int:
        return int(torch.randint(limit, (), generator=self._generator))

    def of(self, items: Any) -> Any:
        return items[self.below(len(items))]

    def two(self, items: Any) -> tuple[Any, Any]:
        first = self.below(len(items))
        second = (first + 1 + self.below(len(items) - 1)) % len(items)
        return items[first], items[second]


def _distinct(
    count: int, one: Callable[[int], Any], key: Callable[[Any], str], apart_from: Collection[str]
) -> list[Any]:
    whole_number("count", count)
    seen, idle = set(apart_from), 0
    found: list[Any] = []
    while len(found) < count:
        line = one(len(found) + idle)
        idle += 1
        if key(line) not in seen:
            seen.add(key(line))
            found.append(line)
            idle = 0
        elif idle > PATIENCE:
            raise InputError(
                f"count={count} prompts were asked for, but no more than {len(found)} different ones were found."
            )
    return found


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _many(name: str) -> str:
    return IRREGULAR.get(name, f"{name}s")


def _single(draw: _Draw) -> dict[str, Any]:
    name = draw.of(CLASSES)
    return {"include": [{"class": name, "count": 1}], "prompt": f"a photo of {_a(name)}"}


def _two(draw: _Draw) -> dict[str, Any]:
    first, second = draw.two(CLASSES)
    clauses = [{"class": name, "count": 1} for name in (first, second)]
    return {"include": clauses, "prompt": f"a photo of {_a(first)} and {_a(second)}"}


def _counting(draw: _Draw) -> dict[str, Any]:
    name, number = draw.of(CLASSES), draw.of(tuple(NUMBERS))
    return {
        "include": [{"class": name, "count": number}],
        "exclude": [{"class": name, "count": number + 1}],
        "prompt": f"a photo of {NUMBERS[number]} {_many(name)}",
    }


def _colors(draw: _Draw) -> dict[str, Any]:
    name, color = draw.of(THINGS), draw.of(COLORS)
    return {"include": [{"class": name, "count": 1, "color": color}], "prompt": f"a photo of {_a(f'{color} {name}')}"}


def _position(draw: _Draw) -> dict[str, Any]:
    first, second = draw.two(CLASSES)
    relation = draw.of(RELATIONS)
    clauses = [{"class": second, "count": 1}, {"class": first, "count": 1, "position": [relation, 0]}]
    return {"include": clauses, "prompt": f"a photo of {_a(first)} {relation} {_a(second)}"}


def _color_attr(draw: _Draw) -> dict[str, Any]:
    pairs = list(zip(draw.two(THINGS), draw.two(COLORS), strict=True))
    clauses = [{"class": name, "count": 1, "color": color} for name, color in pairs]
    words = [_a(f"{color} {name}") for name, color in pairs]
    return {"include": clauses, "prompt": f"a photo of {words[0]} and {words[1]}"}


_MAKERS: dict[str, Callable[[_Draw], dict[str, Any]]] = {
    "single_object": _single,
    "two_object": _two,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}
