"""Toy problems that know their own truth, one per file. Importing this package finds and imports every one of them.

Write ``from mogb.problems.valley import Valley`` for the class, or ``make_problem("valley")`` for the name.
"""

import dataclasses
import importlib
import pkgutil
from typing import Any

from mogb.problems.base import REGISTRY, PlotWindow, Problem, Settings

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["PlotWindow", "Problem", "Settings", "make_problem", "registered_problems"]


def registered_problems() -> tuple[str, ...]:
    """The names of all problems, sorted."""
    return tuple(sorted(REGISTRY))


def make_problem(name: str, **options: Any) -> Problem:
    """A problem by its name.

    Args:
        name: One of :func:`registered_problems`.
        **options: Fields of its class that should differ from what the name stands for.

    Raises:
        ValueError: An unknown name or option, or an impossible value; the message lists what exists.

    Examples:
        >>> make_problem("valley_scaled").num_objectives
        2
    """
    if name not in REGISTRY:
        raise ValueError(f"Unknown problem {name!r}. Known ones: {', '.join(registered_problems())}.")
    cls, preset = REGISTRY[name]
    known = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    if unknown := [option for option in options if option not in known]:
        names = ", ".join(known) or "none"
        raise ValueError(f"Problem {name!r} has no option {', '.join(map(repr, unknown))}. Its options: {names}.")
    problem = cls(**{**preset, **options})
    object.__setattr__(problem, "name", name)
    return problem
