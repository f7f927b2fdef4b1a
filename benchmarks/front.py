"""How much of a front every method with a preference reaches when the preference is swept, from one starting point.

``python benchmarks/front.py`` takes about two minutes on one core.
"""

import argparse
from typing import Any

import torch
from _common import provenance, table, write

import mogb
from mogb.front import Sweep, sweep_front, takes_preference
from mogb.specs import parse_spec

PROBLEMS = ("bowls_2d", "fonseca_2d", "zdt1")
WITHOUT = ("mgda", "imtl_g", "marble")  # for comparison: as many starting points


def figures(method: str, problem: str, points: int) -> dict[str, Any]:
    """Of one sweep with the problem's short protocol."""
    reached = sweep_front(Sweep(method=method, problem=problem, points=points, quick=True))
    return {"swept": reached.swept, **vars(reached.figures[0])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=11, help="preferences (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    methods = [name for name in mogb.registered() if takes_preference(parse_spec(name))]
    found = {
        method: {problem: figures(method, problem, options.points) for problem in PROBLEMS}
        for method in (*methods, *WITHOUT)
    }
    payload = {"provenance": provenance(0), "points": options.points, "methods": found}
    write("front", payload, _text(found))


def _text(found: dict[str, Any]) -> str:
    rows = []
    for method, by_problem in found.items():
        cells = []
        for problem in PROBLEMS:
            one = by_problem[problem]
            share = one["hypervolume_share"]
            cells.append("failed" if one["error"] else f"{share:.0%} ({one['arrived']:.0%}, {one['non_dominated']})")
        rows.append([f"`{method}`", by_problem[PROBLEMS[0]]["swept"], *cells])
    return "\n\n".join([
        "# Fronts",
        "Hypervolume of the points reached, as a share of that of the front; in parentheses the share of the points "
        "that arrived on the front, and how many are not dominated. Preferences are swept from one starting point.",
        table(["method", "swept", *PROBLEMS], rows),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
