"""The command line: ``mogb list | show | cite | compare | report | front | recommend``.

Exit status: 0 done (also if some runs failed: they are rows of the table), 1 the work failed (every run failed, a disk
is full), 2 bad arguments or input, with one line on stderr that says what to do, 130 interrupted.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mogb import __version__
from mogb.aggregators import registered
from mogb.catalog import cite, describe, list_aggregators, list_problems, list_wrappers
from mogb.compare import DEFAULT_SEEDS, LAUNCH_METHODS, QUICK_PROBLEMS, InputError, Plan, run_plan
from mogb.compare.merge import merge_folders, read_summary
from mogb.compare.progress import Watch, duration
from mogb.compare.store import open_store
from mogb.compare.summary import Summary
from mogb.compare.tables import overall_table, percent
from mogb.front import FILES, Reached, Sweep, sweep_front, write_front
from mogb.problems import registered_problems
from mogb.recommend import Answer, Facts, Needs, behaviour, recommend
from mogb.report import check_figures, write_report
from mogb.specs import SpecError, parse_spec, parse_specs

COMPARE_EXAMPLES = """examples:
  mogb compare --quick --out runs/quick
  mogb compare --methods "mgda,cagrad(c=0.2),smoothed(mgda,decay=0.9)" --problems valley,zdt1 --out runs/three
  mogb compare --out runs/full --resume              complete an interrupted run
  mogb compare --out runs/part-1 --shard 1/4         a quarter; mogb report runs/part-* --out DIR merges
"""


FRONT_EXAMPLES = """examples:
  mogb front upgrad --problem zdt1 --quick --out runs/front
  mogb front "stch(mu=0.1)" --problem dtlz2 --points 21
  mogb front nash_mtl --problem fonseca_2d --points 20 --seeds 3     it has no preference: starting points
"""


RECOMMEND_EXAMPLES = """examples:
  mogb recommend --scale-free --conflict-free
  mogb recommend --cheap --losses-may-be-negative --objectives 5
  mogb recommend --noisy --stateless --json
"""
NEEDS = {
    "scale_free": "rescaling one loss must not turn the direction",
    "conflict_free": "no step may point against a gradient of its mini-batch",
    "cheap": "one backward pass per step, not one per objective",
    "stateless": "nothing to save, no extra calls in the training loop",
    "losses_may_be_negative": "leave out methods that take logarithms or ratios of losses",
    "jacobian_ok": "all gradients may be kept at once, whole",
    "preference": "some objectives may matter more than others",
    "noisy": "order by conflicts with exact gradients on noisy problems",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (InputError, SpecError) as error:
        return _say(f"mogb {options.name}: {error}", 2)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _say(f"mogb {options.name}: {error}. Nothing that was finished is lost.", 1)
    except KeyboardInterrupt:
        return _say(f"mogb {options.name}: interrupted. Finished runs are kept: add --resume to go on.", 130)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mogb", description="Multi-objective gradient balancing: methods, problems, comparisons.")
    parser.add_argument("--version", action="version", version=f"mogb {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = _command(commands, "list", _list, "the registered methods or problems", "mogb list problems --json")
    command.add_argument(
        "what", nargs="?", default="aggregators", choices=("aggregators", "problems"), help="default: aggregators"
    )
    command.add_argument("--json", action="store_true", help="one JSON array")

    command = _command(commands, "show", _show, "what a method, wrapper or problem does", "mogb show cagrad")
    command.add_argument("thing", metavar="NAME", help="of a method, a wrapper or a problem")

    command = _command(commands, "cite", _cite, "how to cite methods, as BibTeX", "mogb cite mgda nash_mtl > refs.bib")
    command.add_argument("names", metavar="NAME", nargs="+", help="of a method")

    command = _command(commands, "compare", _compare, "run methods on problems with several seeds", COMPARE_EXAMPLES)
    _compare_options(command)

    command = _command(
        commands, "report", _report, "write tables, figures and report from results",
        "mogb report runs/part-1 runs/part-2 --out runs/full",
    )  # fmt: skip
    command.add_argument("folders", metavar="DIR", nargs="+", help="written by mogb compare; several parts are merged")
    command.add_argument("--out", metavar="DIR", help="where to write; default: the one DIR given")
    command.add_argument("--overwrite", action="store_true", help="replace what an earlier report left in --out")
    _shared_options(command)

    command = _command(commands, "front", _front, "sweep a method's preferences or starting points", FRONT_EXAMPLES)
    _front_options(command)

    command = _command(
        commands, "recommend", _recommend, "which methods meet your needs, best first", RECOMMEND_EXAMPLES
    )  # fmt: skip
    _recommend_options(command)
    return parser


def _command(
    commands: "argparse._SubParsersAction[_Parser]",
    name: str,
    function: Callable[[argparse.Namespace], int],
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    text = example if "\n" in example else f"example:\n  {example}\n"
    command = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.set_defaults(command=function, name=name)
    return command


def _shared_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers",
        metavar="N",
        type=_count,
        default=_cores(),
        help="processes, 0 for none beside this one; default: one per core (%(default)s)",
    )
    command.add_argument("--no-figures", action="store_true", help="tables only; needs no matplotlib")


def _compare_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--methods",
        metavar="LIST",
        help="with commas between, options and wrappers in parentheses; default: the 14 classics",
    )
    command.add_argument(
        "--problems", metavar="LIST", help="with commas between; default: all, or a dozen with --quick"
    )
    command.add_argument(
        "--seeds", metavar="N", type=_positive,
        help="0 is the published starts, others random; default: {full}, {quick} with --quick".format(**DEFAULT_SEEDS),
    )  # fmt: skip
    command.add_argument("--steps", metavar="N", type=_positive, help="default: each problem's published number")
    command.add_argument("--out", metavar="DIR", default="runs/compare", help="default: %(default)s")
    command.add_argument("--quick", action="store_true", help="few problems, few steps: two minutes on two cores")
    command.add_argument("--resume", action="store_true", help="keep the finished runs of --out and do the rest")
    command.add_argument("--overwrite", action="store_true", help="replace what an earlier comparison left in --out")
    command.add_argument(
        "--shard", metavar="i/n", type=_shard, default=(1, 1), help="do the i-th of n parts only, i from 1"
    )
    _shared_options(command)


def _front_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("method", metavar="METHOD", help="as in mogb compare, options and wrappers in parentheses")
    command.add_argument("--problem", metavar="NAME", required=True, help="one of mogb list problems")
    command.add_argument(
        "--points", metavar="N", type=_positive, help="runs per seed; default: 11, 15 or 2 K for K = 2, 3 or more"
    )
    command.add_argument(
        "--seeds", metavar="N", type=_positive, default=1,
        help="0 is the published starts, others random; default: %(default)s",
    )  # fmt: skip
    command.add_argument("--steps", metavar="N", type=_positive, help="default: the problem's published number")
    command.add_argument("--quick", action="store_true", help="the problem's short number of steps")
    command.add_argument("--out", metavar="DIR", default="runs/front", help="default: %(default)s")
    command.add_argument("--overwrite", action="store_true", help="replace what an earlier sweep left in --out")
    command.add_argument("--no-figures", action="store_true", help="no front.png; needs no matplotlib")


def _recommend_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--objectives", metavar="K", type=_positive, help="how many, for the time of a solve; default: 4"
    )
    for name, text in NEEDS.items():
        command.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    command.add_argument("--all", action="store_true", help="every method that fits, not only the first ten")
    command.add_argument("--json", action="store_true", help="everything that is known, as JSON")


def _list(options: argparse.Namespace) -> int:
    entries = list_aggregators() if options.what == "aggregators" else list_problems()
    if options.json:
        print(json.dumps(entries, indent=2))
        return 0
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ("name", "reads", "promises", "citation") if options.what == "aggregators" else (
        "name", "objectives", "dim", "starts", "optimizer", "steps", "reference")  # fmt: skip
    for column in columns:
        table.add_column(column, no_wrap=column == "name")
    for entry in entries:
        table.add_row(*(", ".join(value) if isinstance(value := entry[key], list) else str(value) for key in columns))
    _console().print(table, highlight=False)
    if options.what == "aggregators":
        print(f"Wrappers that a method can wear, as in smoothed(mgda,decay=0.9): {', '.join(list_wrappers())}.")
    return 0


def _show(options: argparse.Namespace) -> int:
    print(describe(options.thing))
    return 0


def _cite(options: argparse.Namespace) -> int:
    print("\n\n".join(cite(name) for name in options.names))
    return 0


def _compare(options: argparse.Namespace) -> int:
    if options.resume and options.overwrite:
        raise InputError("--resume keeps what is there and --overwrite removes it: give one of the two.")
    plan = _plan(options)
    check_figures(not options.no_figures)
    console, folder = Console(stderr=True), Path(options.out)
    with open_store(folder, plan, resume=options.resume, overwrite=options.overwrite) as store:
        left = [run for run in plan.mine() if run.key not in store.done]
        if store.torn:
            console.print(
                f"The last line of {folder}/results.jsonl was unfinished: its run is done again.", highlight=False
            )
        if options.resume:
            console.print(f"{len(store.done)} runs are finished, {len(left)} are left.", highlight=False)
        with Watch(plan, left, console) as watch:
            run_plan(plan, store, options.workers, watch)
    if left:
        console.print(f"{len(left)} runs took {duration(watch.elapsed)}.", highlight=False)
    return _finish(read_summary(folder), folder, options, whole=plan.shard == (1, 1))


def _report(options: argparse.Namespace) -> int:
    check_figures(not options.no_figures)
    summary, folder = merge_folders(options.folders, options.out, overwrite=options.overwrite)
    if summary.missing:
        _say(f"mogb report: {len(summary.missing)} planned runs have no result yet, such as {summary.missing[0]!r}.", 0)
    return _finish(summary, folder, options, whole=True)


def _recommend(options: argparse.Namespace) -> int:
    needs = Needs(objectives=options.objectives, **{name: getattr(options, name) for name in NEEDS})
    answer = recommend(needs)
    if options.json:
        print(json.dumps(asdict(answer), indent=2))
        return 0
    objectives = needs.objectives or 4
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("method", "rank [95 %]", "arrived", "conflicts", "held out", "passes", f"µs, K = {objectives}",
                   "state", "asks for"):  # fmt: skip
        table.add_column(column, no_wrap=True)
    shown = answer.fitting if options.all else answer.fitting[:10]
    for facts in shown:
        table.add_row(*_known(facts, objectives))
    if shown:
        _console().print(table, highlight=False)
    for sentence in _sentences(answer, len(shown)):
        print(sentence)
    return 0


def _known(facts: Facts, objectives: int) -> list[str]:
    rank, solve = facts.measured.get("rank"), facts.microseconds(objectives)
    return [
        facts.name, "not measured" if rank is None else f"{rank[0]:.1f} [{rank[1]:.1f}, {rank[2]:.1f}]",
        *(percent(facts.measured.get(name)) for name in ("arrived", "conflicts", "held_out_conflicts")),
        facts.passes, "-" if solve is None else f"{solve:.0f}", facts.state, ", ".join(facts.phases) or "nothing",
    ]  # fmt: skip


def _sentences(answer: Answer, shown: int) -> Iterator[str]:
    count, total = len(answer.fitting), len(registered())
    yield f"{count} of {total} methods fit{f', the first {shown} are shown' if shown < count else ''}."
    if answer.left_out:
        label = {"jacobian_ok": "no --jacobian-ok"}
        parts = [f"{label.get(name, '--' + name.replace('_', '-'))} {n}" for name, n in answer.left_out.items()]
        yield f"Left out, each on its own: {', '.join(parts)}."
    if answer.tied > 1:
        yield f"The first {answer.tied} cannot be told apart: their intervals overlap."
    if answer.hint:
        yield answer.hint
    measured = behaviour()["comparison"]
    yield (
        f"Measured on {len(measured['problems'])} toy problems: rank by distance to the front, held out against exact "
        "gradients. Compare on yours: mogb compare."
    )


def _front(options: argparse.Namespace) -> int:
    sweep = Sweep(
        method=str(parse_spec(options.method)), problem=options.problem, points=options.points, seeds=options.seeds,
        steps=options.steps, quick=options.quick,
    )  # fmt: skip
    folder = Path(options.out)
    if not options.overwrite and any((folder / name).exists() for name in FILES):
        raise InputError(f"out: {folder} holds an earlier sweep. Give another --out, or --overwrite.")
    check_figures(not options.no_figures)
    with _bar(f"{sweep.method} on {sweep.problem}") as progress:
        reached = sweep_front(sweep, progress)
    for seed, found in enumerate(reached.figures):
        if found.error:
            _say(f"mogb front: seed {seed} failed: {found.error}", 0)
    if all(found.error for found in reached.figures):
        return _say("mogb front: every seed failed; nothing is written.", 1)
    files = write_front(reached, folder, figures=not options.no_figures)
    print(f"{len(reached.losses[0])} {reached.swept}, {sweep.seeds} seeds. {_front_figures(reached)}")
    print(f"Written to {folder}: {', '.join(path.name for path in files)}.")
    return 0


def _front_figures(reached: Reached) -> str:
    parts = []
    for name, label, form in (
        ("hypervolume_share", "Hypervolume, of the true one", "{:.1%}"), ("igd_plus", "IGD+", "{:.4g}"),
        ("arrived", "On the front", "{:.0%}"), ("non_dominated", "Not dominated", "{:.3g}"),
    ):  # fmt: skip
        found = reached.spread(name)
        if found is not None:
            mean, low, high = (form.format(value) for value in found)
            parts.append(f"{label}: {mean}" + (f" ({low} to {high})." if low != high else "."))
    return " ".join(parts)


@contextmanager
def _bar(label: str) -> Iterator[Callable[[float], None]]:
    """A bar with the time left on a terminal, nothing in a log."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), console=console,
    ) as progress:  # fmt: skip
        task = progress.add_task(label, total=1.0)
        yield lambda done: progress.update(task, completed=done)


def _finish(summary: Summary, folder: Path, options: argparse.Namespace, *, whole: bool) -> int:
    """Writes the report, prints the main table, and decides on the exit status."""
    files = write_report(summary, folder, figures=whole and not options.no_figures, workers=options.workers)
    failed = summary.failures
    if failed and len(failed) == len(summary.records):
        return _say(f"mogb: every run failed, the first with: {failed[0]['error']}", 1)
    if whole:
        _print_overall(summary)
    else:
        print("A part: merge all of them with `mogb report DIR...` for ranks and figures.")
    if failed:
        _say(f"{len(failed)} of {len(summary.records)} runs failed; {folder / 'summary.md'} says why.", 0)
    names = [path.name for path in files if path.suffix != ".png"]
    print(f"Written to {folder}: results.jsonl, {', '.join(names)}, {len(files) - len(names)} figures (PNG).")
    if whole:
        print(f"Open {folder / 'report.html'} in a browser.")
    return 0


def _print_overall(summary: Summary) -> None:
    found = overall_table(summary)
    if found is None:
        return
    table = Table(title=found.title, header_style="bold")
    for i, column in enumerate(found.header):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in found.rows:
        table.add_row(*row)
    _console().print(table, highlight=False)


def _plan(options: argparse.Namespace) -> Plan:
    try:
        methods = tuple(map(str, parse_specs(options.methods))) if options.methods is not None else LAUNCH_METHODS
    except SpecError as error:
        raise InputError(f"methods: {error}") from error
    problems = QUICK_PROBLEMS if options.quick else registered_problems()
    if options.problems is not None:
        problems = tuple(name.strip() for name in options.problems.split(","))
    seeds = options.seeds if options.seeds is not None else DEFAULT_SEEDS["quick" if options.quick else "full"]
    return Plan(methods, problems, seeds, options.steps, options.quick, options.shard)


def _positive(text: str) -> int:
    return _whole(text, 1)


def _count(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, but got {text!r}")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"must be i/n with i from 1 to n, such as 1/4, but got {text!r}")
    return int(part), int(parts)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _console() -> Console:
    """Standard output; wide where it is no terminal, so that nothing is wrapped."""
    return Console() if sys.stdout.isatty() else Console(width=240)


def _say(message: str, status: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return status
