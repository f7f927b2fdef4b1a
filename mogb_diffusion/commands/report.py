"""``mogb-diffusion report``."""

import argparse
from pathlib import Path

SUMMARY = "write report.html and its figures"
EXAMPLE = "mogb-diffusion report runs/tiny"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which runs."""
    parser.add_argument("folders", metavar="DIR", nargs="+", help="of a run, finished or not")


def run(options: argparse.Namespace) -> int:
    """Writes a page for each."""
    from mogb_diffusion.report import write_report

    for folder in options.folders:
        print(write_report(Path(folder)))
    return 0
