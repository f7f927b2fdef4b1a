"""Writes docs/methods.md, docs/problems.md and the tables of docs/choosing.md; ``make docs`` runs it."""

import pathlib

from mogb.catalog import list_aggregators, list_problems
from mogb.recommend import Facts, Needs, recommend

HERE = pathlib.Path(__file__).parent
# Of docs/choosing.md: what somebody wants, and how to ask for it.
QUESTIONS = {
    "Nothing in particular": Needs(),
    "Losses of unrelated scales": Needs(scale_free=True),
    "No objective may get worse at any step": Needs(conflict_free=True),
    "Both": Needs(scale_free=True, conflict_free=True),
    "One backward pass per step": Needs(cheap=True),
    "One backward pass, losses of unrelated scales": Needs(cheap=True, scale_free=True),
    "Losses below zero, nothing to save": Needs(losses_may_be_negative=True, stateless=True),
    "Some objectives matter more": Needs(preference=True),
    "Noisy gradients, by conflicts held out": Needs(noisy=True),
}
SHOWN = 6


def methods() -> str:
    """Every registered method: what it reads, promises, takes, and where it was published."""
    lines = ["# Methods", "", "Generated from the registry. Weights are on the raw gradients throughout.", ""]
    lines += ["| name | reads | promises | options | published in |", "|---|---|---|---|---|"]
    for entry in list_aggregators():
        promises, options = ", ".join(entry["promises"]) or "none", ", ".join(entry["options"]) or "none"
        lines.append(f"| `{entry['name']}` | {entry['reads']} | {promises} | {options} | {entry['citation']} |")
    for entry in list_aggregators():
        lines += ["", f"## `{entry['name']}`", "", f"::: mogb.aggregators.{entry['name']}"]
    return "\n".join(lines) + "\n"


def problems() -> str:
    """Every registered problem with its protocol."""
    lines = ["# Toy problems", ""]
    lines += ["| name | objectives | dimensions | starts | protocol | from |", "|---|---|---|---|---|---|"]
    for entry in list_problems():
        protocol = f"{entry['optimizer']}, lr {entry['lr']:g}, {entry['steps']} steps"
        sizes = f"{entry['objectives']} | {entry['dim']} | {entry['starts']}"
        lines.append(f"| `{entry['name']}` | {sizes} | {protocol} | {entry['reference']} |")
    return "\n".join(lines) + "\n"


def choosing() -> str:
    """The computed part of docs/choosing.md."""
    parts = ["| you have | methods that fit | cannot be told apart from the first |", "|---|---|---|"]
    for question, needs in QUESTIONS.items():
        answer = recommend(needs)
        fitting = [facts for facts in answer.fitting if facts.measured]  # a new method waits for its measurement
        names = ", ".join(f"`{facts.name}`" for facts in fitting[:SHOWN])
        more = len(fitting) - SHOWN
        tied = "by another order" if needs.noisy else str(max(answer.tied - 1, 0))
        parts.append(f"| {question} | {names}{f' and {more} more' if more > 0 else ''} | {tied} |")
    parts += ["", "Every method, best first:", ""]
    parts += ["| method | rank | arrived | conflicts | held out | passes | µs, K = 4 | state | asks for | losses |"]
    parts += ["|---|---|---|---|---|---|---|---|---|---|"]
    parts += [_row(facts) for facts in recommend(Needs(jacobian_ok=True)).fitting if facts.measured]
    return "\n".join(parts)


def _row(facts: Facts) -> str:
    rank, solve = facts.measured.get("rank"), facts.microseconds(4)
    cells = [
        f"`{facts.name}`", "-" if rank is None else f"{rank[0]:.1f} [{rank[1]:.1f}, {rank[2]:.1f}]",
        *(_percent(facts.measured.get(name)) for name in ("arrived", "conflicts", "held_out_conflicts")),
        facts.passes, "-" if solve is None else f"{solve:.0f}", facts.state, ", ".join(facts.phases) or "nothing",
        "any" if facts.any_losses else "positive",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def fronts() -> str:
    """The table of benchmarks/results/front.md."""
    text = (HERE.parent / "benchmarks" / "results" / "front.md").read_text()
    return "\n".join(line for line in text.splitlines() if line.startswith("|"))


def with_computed(page: str) -> str:
    """The page with its computed parts brought up to date."""
    for name, part in (("computed", choosing()), ("front", fronts())):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        head, rest = page.split(begin)
        page = f"{head}{begin}\n{part}\n{end}{rest.split(end)[1]}"
    return page


if __name__ == "__main__":
    choosing_page = HERE / "choosing.md"
    choosing_page.write_text(with_computed(choosing_page.read_text()))
    (HERE / "methods.md").write_text(methods())
    (HERE / "problems.md").write_text(problems())
