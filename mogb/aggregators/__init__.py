"""One method per file. Importing this package finds and imports every one of them.

Write ``from mogb.aggregators.cagrad import CAGrad`` for the class, or ``make("cagrad", c=0.4)`` for the name.
"""

import importlib
import pkgutil
from typing import Any

from mogb.base import _REGISTRY, Aggregator, option_names

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")


def registered() -> tuple[str, ...]:
    """The names of all methods, sorted."""
    return tuple(sorted(_REGISTRY))


def get(name: str) -> type[Aggregator]:
    """The class behind a name.

    Raises:
        ValueError: An unknown name; the message lists the known ones.
    """
    if name not in _REGISTRY:
        raise ValueError(f"Unknown aggregator {name!r}. Known ones: {', '.join(registered())}.")
    return _REGISTRY[name]


def make(name: str, **options: Any) -> Aggregator:
    """A method by its name.

    Args:
        name: One of :func:`registered`.
        **options: The options of its class.

    Raises:
        ValueError: An unknown name or option, or an impossible value; the message lists what exists.
        TypeError: A value of the wrong type.

    Examples:
        >>> make("cagrad", c=0.4).reads
        'gramian'
    """
    cls = get(name)
    if unknown := [option for option in options if option not in option_names(cls)]:
        known = ", ".join(option_names(cls)) or "none"
        raise ValueError(f"{name!r} has no option {', '.join(map(repr, unknown))}. Its options: {known}.")
    return cls(**options)
