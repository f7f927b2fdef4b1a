"""``summary.md``: findings and tables that read well on a terminal and on a code host."""

from mogb.compare.findings import findings
from mogb.compare.summary import Summary
from mogb.compare.tables import failure_table, overall_table, problem_table, solver_table


def to_markdown(summary: Summary) -> str:
    """The whole summary as Markdown."""
    tables = [overall_table(summary), failure_table(summary), solver_table(summary)]
    tables += [problem_table(summary, name) for name in summary.problems]
    parts = [
        "# Comparison of balancing methods\n",
        describe(summary) + "\n",
        "## Findings\n",
        "\n".join(f"- {sentence}" for sentence in findings(summary)) + "\n",
        *(table.markdown() for table in tables if table is not None),
    ]
    return "\n".join(parts)


def describe(summary: Summary) -> str:
    """What was run, in one sentence or two."""
    settings = summary.settings
    seeds = settings["seeds"]
    steps = (
        f"{settings['steps']} steps on every problem" if settings["steps"] is not None
        else "each problem's short number of steps" if settings["quick"] else "each problem's published number of steps"
    )  # fmt: skip
    return (
        f"{len(summary.methods)} methods on {len(summary.problems)} problems with {seeds} seed{'s' * (seeds > 1)}, "
        f"{steps}; mogb {settings['mogb']}. Seed 0 starts from the published points, every other seed from random "
        "ones, the same for all methods."
    )
