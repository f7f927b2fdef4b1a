"""What is to be run: methods × problems × seeds, in one order that every machine agrees on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mogb.problems import registered_problems
from mogb.problems.base import Problem
from mogb.specs import SpecError, parse_spec

LAUNCH_METHODS = (
    "weighted_sum", "mgda", "marble", "pcgrad", "nash_mtl", "cagrad", "imtl_g",
    "aligned_mtl", "upgrad", "dualproj", "config", "fairgrad", "graddrop", "rlw",
)  # fmt: skip
QUICK_PROBLEMS = (
    "valley", "valley_scaled", "quadratic_elementwise", "quadratic_convex", "quadratic_scaled", "fonseca_2d",
    "zdt1", "zdt3", "dtlz2", "bowls_2d", "bowls_noisy", "multitask", "specialists",
)  # fmt: skip
DEFAULT_SEEDS = {"quick": 1, "full": 2}
FORMAT = 1


class InputError(ValueError):
    """What was asked for cannot be done: one line that names the argument, its value and the remedy."""


@dataclass(frozen=True)
class Run:
    """One method on one problem with one seed, from all of the problem's starting points."""

    method: str
    problem: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.problem}/{self.seed}/{self.method}"


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
        methods: Specifications in normal form, see :mod:`mogb.specs`.
        problems: Names of problems.
        seeds: How many, from 0.
        steps: For every problem; None means each problem's published number.
        quick: Whether to take each problem's short number of steps.
        shard: Which part (from 1) of how many.
    """

    methods: tuple[str, ...]
    problems: tuple[str, ...]
    seeds: int = 1
    steps: int | None = None
    quick: bool = False
    shard: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        for method in self.methods:
            _check_method(method)
        for problem in self.problems:
            if problem not in registered_problems():
                raise InputError(
                    f"problems: unknown problem {problem!r}. Known ones: {', '.join(registered_problems())}."
                )
        _check_unique("methods", self.methods)
        _check_unique("problems", self.problems)
        _check_positive("seeds", self.seeds)
        if self.steps is not None:
            _check_positive("steps", self.steps)
        part, parts = self.shard
        if not 1 <= part <= parts:
            raise InputError(f"shard must be i/n with i from 1 to n, such as 1/4, but got {part}/{parts}.")

    def runs(self) -> tuple[Run, ...]:
        """Every run of the comparison, in its canonical order."""
        return tuple(
            Run(method, problem, seed)
            for problem in self.problems
            for seed in range(self.seeds)
            for method in self.methods
        )

    def mine(self) -> tuple[Run, ...]:
        """The runs of this shard: dealt out like cards, so that the parts take about equally long."""
        part, parts = self.shard
        return self.runs()[part - 1 :: parts]

    def steps_of(self, problem: Problem) -> int:
        """How many steps a run on this problem takes."""
        if self.steps is not None:
            return self.steps
        return problem.settings.quick_steps if self.quick else problem.settings.steps

    def settings(self) -> dict[str, Any]:
        """What ``settings.json`` records, and what ``--resume`` compares."""
        from mogb import __version__

        return {
            "format": FORMAT, "mogb": __version__, "methods": list(self.methods), "problems": list(self.problems),
            "seeds": self.seeds, "steps": self.steps, "quick": self.quick, "shard": f"{self.shard[0]}/{self.shard[1]}",
        }  # fmt: skip


def derived_seed(*parts: object) -> int:
    """A seed that depends on nothing but these parts, the same on every machine and in every process."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _check_method(method: str) -> None:
    try:
        parse_spec(method).build()
    except SpecError as error:
        raise InputError(f"methods: {error}") from error


def _check_unique(argument: str, names: Sequence[str]) -> None:
    if not names:
        raise InputError(f"{argument} is empty: name at least one.")
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise InputError(f"{argument} names {twice[0]!r} twice. Name each one once.")


def _check_positive(argument: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{argument} must be a whole number of at least 1, but got {value!r}.")
