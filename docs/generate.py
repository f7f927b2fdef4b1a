"""Writes docs/methods.md and docs/problems.md from the registries; ``make docs`` runs it."""

import pathlib

from mogb.catalog import list_aggregators, list_problems

HERE = pathlib.Path(__file__).parent


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


if __name__ == "__main__":
    (HERE / "methods.md").write_text(methods())
    (HERE / "problems.md").write_text(problems())
