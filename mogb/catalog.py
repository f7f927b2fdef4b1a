"""What there is: methods, wrappers and problems, described for people and for machines."""

import inspect
from typing import Any

from mogb.aggregators import get, make, registered
from mogb.base import Aggregator, Reference, option_names
from mogb.compare.plan import InputError
from mogb.problems import make_problem, registered_problems
from mogb.wrappers import WRAPPERS


def list_aggregators() -> list[dict[str, Any]]:
    """Every registered method with what it reads, its promises, options and reference."""
    return [_aggregator(name) for name in registered()]


def list_problems() -> list[dict[str, Any]]:
    """Every registered problem with its sizes and its protocol."""
    return [_problem(name) for name in registered_problems()]


def list_wrappers() -> list[str]:
    """The names of the wrappers that a method can wear."""
    return sorted(WRAPPERS)


def cite(name: str) -> str:
    """The BibTeX entry of a method.

    Raises:
        InputError: An unknown name.
    """
    return _class(name, registered()).reference.bibtex(name)


def describe(name: str) -> str:
    """Documentation, options and promises of a method, a wrapper or a problem.

    Raises:
        InputError: An unknown name.
    """
    if name in registered_problems():
        return _describe_problem(name)
    cls = _class(name, (*registered(), *sorted(WRAPPERS)), also=registered_problems())
    parts = [f"{name}: {_module_text(cls)}", inspect.getdoc(cls) or ""]
    signature = inspect.signature(cls.__init__).parameters
    options = [f"  {option}" + _default(signature[option]) for option in option_names(cls)]
    parts.append("Options:\n" + ("\n".join(options) or "  none"))
    if name in registered():
        entry = _aggregator(name)
        parts.append(f"Reads: {entry['reads']}")
        parts.append(f"Promises: {', '.join(entry['promises']) or 'none'}")
        parts.append(f"Published in: {entry['citation']}")
    return "\n\n".join(part.strip() for part in parts)


def _class(name: str, known: tuple[str, ...], also: tuple[str, ...] = ()) -> type[Aggregator]:
    if name not in known:
        raise InputError(f"unknown name {name!r}. Known ones: {', '.join((*known, *also))}.")
    return WRAPPERS.get(name) or get(name)


def _aggregator(name: str) -> dict[str, Any]:
    cls = get(name)
    reference = cls.reference
    return {
        "name": name, "reads": make(name).reads, "promises": sorted(promise.value for promise in cls.promises),
        "options": list(option_names(cls)), "citation": _short(reference),
        "reference": {
            "authors": reference.authors, "title": reference.title, "venue": reference.venue, "year": reference.year,
            "arxiv": reference.arxiv, "url": reference.url, "code": reference.code,
        },
    }  # fmt: skip


def _problem(name: str) -> dict[str, Any]:
    problem = make_problem(name)
    settings = problem.settings
    return {
        "name": name, "objectives": problem.num_objectives, "dim": problem.dim, "starts": len(problem.starts()),
        "stochastic": problem.stochastic, "optimizer": settings.optimizer, "lr": settings.lr, "steps": settings.steps,
        "quick_steps": settings.quick_steps, "tolerance": settings.tolerance, "hard": settings.hard,
        "reference": problem.reference,
    }  # fmt: skip


def _describe_problem(name: str) -> str:
    entry, cls = _problem(name), type(make_problem(name))
    facts = "\n".join(f"  {key}: {value}" for key, value in entry.items() if key != "name" and value != "")
    return "\n\n".join([f"{name}: {_module_text(cls)}", inspect.getdoc(cls) or "", f"As registered:\n{facts}"])


def _module_text(cls: type) -> str:
    return (inspect.getdoc(inspect.getmodule(cls)) or "").strip()


def _default(parameter: inspect.Parameter) -> str:
    return " (required)" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}"


def _short(reference: Reference) -> str:
    first = reference.authors.replace(" and ", ", ").split(", ")[0].split()[-1]
    others = " et al." if reference.authors.count(",") + reference.authors.count(" and ") > 0 else ""
    arxiv = f", arXiv {reference.arxiv}" if reference.arxiv else ""
    return f"{first}{others}, {reference.venue or 'preprint'} {reference.year}{arxiv}"
