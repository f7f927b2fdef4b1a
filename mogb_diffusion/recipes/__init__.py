"""Runs by name. A recipe is a function that returns a complete configuration; a variant changes what differs."""

from collections.abc import Callable

from mogb_diffusion.checks import named
from mogb_diffusion.config import Run
from mogb_diffusion.recipes import sd35, tiny

RECIPES: dict[str, Callable[[], Run]] = {
    function.__name__: function for function in (tiny.tiny, tiny.tiny_smoke, tiny.tiny_weighted_sum, tiny.tiny_marble)
} | {variant.name: variant for variant in sd35.VARIANTS}


def recipe(name: str) -> Run:
    """The run of this name.

    Raises:
        InputError: There is none; the message lists what exists.
    """
    return named("recipe", name, RECIPES)()


def summary(name: str) -> str:
    """What a recipe is, in one line."""
    made = RECIPES[name]
    return made.summary if isinstance(made, sd35.Variant) else (made.__doc__ or "").strip()
