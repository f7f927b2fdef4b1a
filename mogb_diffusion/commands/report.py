"""``mogb-diffusion report``."""

import argparse
import sys
from pathlib import Path

from mogb_diffusion.errors import InputError

SUMMARY = "a page and figures of each run, and one page that compares several"
EXAMPLE = """
mogb-diffusion report runs/tiny
mogb-diffusion report runs/marble runs/weighted_sum base.json --out comparison
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which runs."""
    parser.add_argument(
        "targets", metavar="RUN|FILE", nargs="+",
        help="folders of runs, finished or not; with several, also other folders with evaluation.json, or such files",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="of the comparison of several; default: comparison")


def run(options: argparse.Namespace) -> int:
    """Writes report.html for each run, and comparison.html for several."""
    from mogb_diffusion.report import write_report
    from mogb_diffusion.report_runs import write_comparison
    from mogb_diffusion.tracking import METRICS

    targets = [Path(target) for target in options.targets]
    if len(targets) == 1 and options.out:
        raise InputError("--out is the folder of a comparison: name several runs, or leave it out.")
    if len(targets) == 1:
        print(write_report(targets[0]))
        return 0
    for target in targets:
        if (target / METRICS).is_file():
            try:
                print(write_report(target))
            except InputError as error:  # one that has just begun does not keep the others from their page
                print(error, file=sys.stderr)
    page, table = write_comparison(targets, Path(options.out or "comparison"))
    print(*filter(None, (table, page)), sep="\n")
    return 0
