"""Prompts of the tiny world: the six kinds of GenEval, and signs with a word on them.

Some combinations and words are held out: neither pre-training nor reinforcement learning ever sees them.
"""

from collections.abc import Sequence
from functools import cache
from itertools import permutations, product
from typing import Any, Literal

import torch

from mogb_diffusion import checks
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.world.vocabulary import CARRIERS, COLORS, HELD_OUT_WORDS, NUMBERS, RELATIONS, SHAPES, WORDS

Kind = Literal["mixed", "text", "objects"]
Split = Literal["train", "held_out"]

_HELD_OUT_EVERY = 6  # of the combinations of one tag, in the order in which they are listed


def sample_prompts(
    count: int, generator: torch.Generator, *, kind: Kind = "mixed", split: Split = "train"
) -> list[Prompt]:
    """Draws prompts, with replacement: the world is small, and twenty different counting prompts do not exist.

    Args:
        count: How many.
        generator: The source of the draws; it is advanced.
        kind: ``"text"``: signs; ``"objects"``: GenEval's tags in equal shares (each tag's prompts are equally likely);
            ``"mixed"``: half of each, every second prompt a sign.
        split: ``"held_out"`` are words and combinations that ``"train"`` never draws. The three prompts of
            ``single_object`` are all in ``"train"``.
    """
    checks.choice("kind", kind, ("mixed", "text", "objects"))
    checks.choice("split", split, ("train", "held_out"))
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"count must be an integer >= 0, but got {count!r}.")
    signs, pools = sign_prompts(split), list(object_prompts(split).values())
    first, second = torch.rand(2, count, generator=generator, dtype=torch.float64).tolist() if count else ([], [])
    prompts = []
    for index, (u, v) in enumerate(zip(first, second, strict=True)):
        pool = signs if kind == "text" or (kind == "mixed" and index % 2 == 0) else pools[int(u * len(pools))]
        prompts.append(pool[int(v * len(pool))])
    return prompts


def sign_prompt(word: str, carrier: str = CARRIERS[0]) -> Prompt:
    """A sign, card, poster or label with a word on it."""
    return Prompt(text=f'a {carrier} that says "{word}"', target_text=word)


@cache
def sign_prompts(split: Split) -> tuple[Prompt, ...]:
    """Every word on everything that carries one."""
    words = HELD_OUT_WORDS if split == "held_out" else [word for word in WORDS if word not in HELD_OUT_WORDS]
    return tuple(sign_prompt(word, carrier) for word, carrier in product(words, CARRIERS))


@cache
def object_prompts(split: Split) -> dict[str, tuple[Prompt, ...]]:
    """The prompts of each tag of GenEval; one in six is held out, except where there are only three."""
    everything = {
        "single_object": [_objects("single_object", [_clause(shape)]) for shape in SHAPES],
        "colors": [_objects("colors", [_clause(shape, color)]) for color, shape in product(COLORS, SHAPES)],
        "counting": [
            _objects("counting", [_clause(shape, color, count)])
            for color, count, shape in product((None, *COLORS), NUMBERS, SHAPES)
        ],
        "two_object": [_objects("two_object", [_clause(a), _clause(b)]) for a, b in permutations(SHAPES, 2)],
        "color_attr": [
            _objects("color_attr", [_clause(a, color_a), _clause(b, color_b)])
            for (color_a, color_b), (a, b) in product(permutations(COLORS, 2), permutations(SHAPES, 2))
        ],
        "position": [
            _objects("position", [_clause(b, color_b), _clause(a, color_a, relation=relation)])
            for (color_a, color_b), (a, b), relation in product(
                ((None, None), *permutations(COLORS, 2)), permutations(SHAPES, 2), RELATIONS
            )
        ],
    }
    chosen = {}
    for tag, prompts in everything.items():
        held_out = [False] * len(prompts) if tag == "single_object" else _held_out(len(prompts))
        kept = tuple(prompt for prompt, out in zip(prompts, held_out, strict=True) if out == (split == "held_out"))
        if kept:
            chosen[tag] = kept
    return chosen


def _held_out(count: int) -> list[bool]:
    """One in six, in a scattered order, so that no colour, number or relation is missing from either side."""
    scattered = torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist()
    return [place % _HELD_OUT_EVERY == 0 for place in scattered]


def _clause(shape: str, color: str | None = None, count: int = 1, relation: str | None = None) -> dict[str, Any]:
    clause: dict[str, Any] = {"class": shape, "count": count}
    if color is not None:
        clause["color"] = color
    if relation is not None:
        clause["position"] = [relation, 0]
    return clause


def _objects(tag: str, include: Sequence[dict[str, Any]]) -> Prompt:
    metadata: dict[str, Any] = {"tag": tag, "include": list(include)}
    if tag == "counting":
        metadata["exclude"] = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
    names = [_name(clause) for clause in include]
    text = " and ".join(names)
    if tag == "position":  # "a cat right of a dog" lists the dog first: relations refer to earlier clauses
        text = f"{names[1]} {include[1]['position'][0]} {names[0]}"
    return Prompt(text=f"a photo of {text}", metadata=metadata)


def _name(clause: dict[str, Any]) -> str:
    count = clause["count"]
    words = ["a" if count == 1 else NUMBERS[count], clause.get("color"), clause["class"] + ("s" if count > 1 else "")]
    return " ".join(word for word in words if word)
