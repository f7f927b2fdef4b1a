"""Runs by name. A recipe is a function that returns a complete configuration; a variant changes what differs."""

import difflib
from collections.abc import Callable

from mogb_diffusion.config import Run
from mogb_diffusion.errors import InputError
from mogb_diffusion.recipes import sd35, tiny

RECIPES: dict[str, Callable[[], Run]] = {
    function.__name__: function
    for function in (
        tiny.tiny,
        tiny.tiny_smoke,
        tiny.tiny_weighted_sum,
        tiny.tiny_marble,
        sd35.sd35_marble,
        sd35.sd35_marble_exact,
        sd35.sd35_weighted_sum,
        sd35.sd35_fixed,
        sd35.sd35_every_step,
        sd35.sd35_script,
    )
}


def recipe(name: str) -> Run:
    """The run of this name.

    Raises:
        InputError: There is none; the message lists what exists.
    """
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Recipes: {', '.join(RECIPES)}."
        raise InputError(f"There is no recipe {name!r}. {hint}")
    return RECIPES[name]()
