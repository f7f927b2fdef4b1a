"""Which method, for what you need: from the registry's promises and from what was measured.

Needs are facts of the registry (what a method reads, promises, keeps, asks of the losses); the order among those that
meet them is measured: the mean rank of each method over the toy problems, with its interval, from
``benchmarks/results/behaviour.json``, which is part of the package.

Shapes: K = objectives.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import log
from typing import Any

import torch

from mogb.aggregators import get, make, registered
from mogb.base import Aggregator, Promise, option_names

FEW, MANY = 4, 64  # numbers of objectives for which the small problems were timed


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What is asked for. Everything that is not asked for does not matter.

    Attributes:
        objectives: K, for which the time of the small problem is given.
        scale_free: Rescaling one loss must not turn the direction.
        conflict_free: No step may point against a gradient of its own mini-batch.
        cheap: One backward pass per step, not K.
        stateless: Nothing to save, no order of steps, no extra calls in the training loop.
        losses_may_be_negative: Methods that take logarithms or ratios of the losses are left out.
        jacobian_ok: K whole gradients may be kept at once; otherwise methods that read them are left out, which also
            cannot be amortized.
        preference: Some objectives may matter more than others.
        noisy: Order by conflicts with the exact gradients on stochastic problems, not by the distance to the front.
    """

    objectives: int | None = None
    scale_free: bool = False
    conflict_free: bool = False
    cheap: bool = False
    stateless: bool = False
    losses_may_be_negative: bool = False
    jacobian_ok: bool = False
    preference: bool = False
    noisy: bool = False

    def __post_init__(self) -> None:
        if self.objectives is not None and self.objectives < 1:
            raise ValueError(f"objectives must be at least 1, but got {self.objectives}.")


@dataclass(frozen=True)
class Facts:
    """What is known of one method.

    Attributes:
        name: As in the registry.
        reads: What an engine has to compute.
        promises: Of its default options.
        passes: Backward passes of a full step: ``"1"`` or ``"K"``.
        state: ``"none"``, ``"small"`` (numbers per objective) or ``"K gradients"``.
        phases: What it asks of the training loop.
        any_losses: Whether it takes negative losses.
        preference: Whether it has a preference.
        measured: The figures of ``behaviour.json``; empty if it was not measured.
    """

    name: str
    reads: str
    promises: tuple[str, ...]
    passes: str
    state: str
    phases: tuple[str, ...]
    any_losses: bool
    preference: bool
    measured: dict[str, Any]

    def microseconds(self, objectives: int) -> float | None:
        """About how long the small problem takes: a power of K through what was measured for 4 and 64."""
        few, many = (self.measured.get(f"microseconds_{size}") for size in (FEW, MANY))
        if few is None or many is None:
            return None
        slope = max(log(many / few) / log(MANY / FEW), 0.0)
        return few * (max(objectives, 1) / FEW) ** slope


@dataclass(frozen=True)
class Answer:
    """What fits.

    Attributes:
        needs: What was asked for.
        fitting: The methods that meet all needs, best first; those that were not measured come last.
        tied: How many of the first ones cannot be told apart from the best: their intervals overlap.
        left_out: How many methods each need leaves out on its own.
        hint: What else to try; empty if there is nothing.
    """

    needs: Needs
    fitting: tuple[Facts, ...]
    tied: int
    left_out: dict[str, int]
    hint: str


def recommend(needs: Needs) -> Answer:
    """The methods that meet all needs, in the measured order.

    Examples:
        >>> answer = recommend(Needs(conflict_free=True, scale_free=True))
        >>> sorted(facts.name for facts in answer.fitting)
        ['fairgrad', 'nash_mtl']
    """
    tests = _tests(needs)
    everyone = [facts_of(name) for name in registered()]
    fitting = [facts for facts in everyone if all(test(facts) for test in tests.values())]
    fitting.sort(key=lambda facts: _order(facts, needs))
    left_out = {name: sum(not test(facts) for facts in everyone) for name, test in tests.items()}
    return Answer(needs, tuple(fitting), _tied(fitting, needs), left_out, _hint(needs, fitting, everyone, tests))


def facts_of(name: str) -> Facts:
    """What the registry and the measurements say of one method."""
    agg = make(name)
    measured = behaviour()["methods"].get(name, {})
    return Facts(
        name=name, reads=agg.reads, promises=tuple(sorted(promise.value for promise in agg.keeps)),
        passes="1" if agg.reads == "losses" else "K", state=_state(agg), phases=tuple(sorted(agg.phases)),
        any_losses=not (agg.needs_positive_losses or measured.get("refused_losses", False)),
        preference=bool({"preference", "references", "weights"} & set(option_names(get(name)))), measured=measured,
    )  # fmt: skip


@cache
def behaviour() -> dict[str, Any]:
    """The measured figures, with their provenance."""
    return json.loads((files("mogb") / "behaviour.json").read_text())


def _tests(needs: Needs) -> dict[str, Callable[[Facts], bool]]:
    """One per need that was asked for, by the name of its option."""
    tests: dict[str, Callable[[Facts], bool]] = {}
    if not needs.jacobian_ok:
        tests["jacobian_ok"] = lambda facts: facts.reads != "jacobian"
    by_promise = {"scale_free": Promise.SCALE_FREE, "conflict_free": Promise.NON_CONFLICTING}
    for name, promise in by_promise.items():
        if getattr(needs, name):
            tests[name] = lambda facts, promise=promise: promise.value in facts.promises
    if needs.cheap:
        tests["cheap"] = lambda facts: facts.passes == "1"
    if needs.stateless:
        tests["stateless"] = lambda facts: facts.state == "none" and not facts.phases
    if needs.losses_may_be_negative:
        tests["losses_may_be_negative"] = lambda facts: facts.any_losses
    if needs.preference:
        tests["preference"] = lambda facts: facts.preference
    return tests


def _order(facts: Facts, needs: Needs) -> tuple[float, float, str]:
    rank = facts.measured.get("rank", [float("inf")])[0]
    if needs.noisy:
        held_out = facts.measured.get("held_out_conflicts")
        return (float("inf") if held_out is None else held_out, rank, facts.name)
    return (rank, 0.0, facts.name)


def _tied(fitting: list[Facts], needs: Needs) -> int:
    ranks = [facts.measured["rank"] for facts in fitting if "rank" in facts.measured]
    if needs.noisy or not ranks:
        return 0
    return sum(low <= ranks[0][2] for _, low, _ in ranks)


def _state(agg: Aggregator) -> str:
    """What a step leaves behind, found by taking one."""
    before = agg.state_dict()
    agg(torch.eye(3, 5) + 0.1, torch.ones(3))  # of two, some methods have nothing to draw
    after = agg.state_dict()
    changed = [value for key, value in after.items() if key not in before or not _same(value, before[key])]
    if any(torch.is_tensor(value) and value.shape[-1:] == (5,) for value in changed):
        return "K gradients"
    return "small" if changed else "none"


def _same(one: Any, other: Any) -> bool:
    one, other = torch.as_tensor(one), torch.as_tensor(other)
    return one.shape == other.shape and torch.equal(one, other)


def _hint(needs: Needs, fitting: list[Facts], everyone: list[Facts], tests: dict[str, Callable[[Facts], bool]]) -> str:
    """A wrapper gives scale-freedom to any method that reads the Gramian; amortizing makes K passes rare."""
    if needs.scale_free:
        others = [test for name, test in tests.items() if name != "scale_free"]
        found = [
            facts for facts in everyone
            if "scale-free" not in facts.promises and facts.reads == "gramian" and all(test(facts) for test in others)
        ]  # fmt: skip
        found.sort(key=lambda facts: _order(facts, needs))
        if found:
            names = ", ".join(f"normalized({facts.name})" for facts in found[:3])
            return f"Worn by normalized(...), any method on the Gramian is scale-free: {names}."
    if needs.cheap:
        return "Any method that yields weights is nearly as cheap between refreshes: mogb.Balancer(refresh_every=10)."
    return "" if fitting else "No method meets all of this: ask for less, or look at the wrappers of mogb list."
