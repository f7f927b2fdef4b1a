"""``mogb-diffusion train``."""

import argparse
from pathlib import Path

from mogb_diffusion.commands._shared import recipe_arguments, tell
from mogb_diffusion.errors import InputError

SUMMARY = "train a recipe or a YAML file"
EXAMPLE = """
mogb-diffusion train tiny --out runs/tiny
mogb-diffusion train tiny --set balancing.mode=cagrad --set epochs=10
torchrun --standalone --nproc_per_node 2 -m mogb_diffusion train tiny --out runs/two --resume
torchrun --standalone --nproc_per_node 8 -m mogb_diffusion train sd35_marble --preset 8x80gb
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which configuration, and where to."""
    recipe_arguments(parser)
    parser.add_argument("--preset", metavar="NAME", help="hardware: 1x24gb, 1x80gb, 8x80gb or 2x8x80gb")
    parser.add_argument("--out", metavar="DIR", help="folder of the run; default: runs/<name>")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint of --out")
    parser.add_argument("--no-report", action="store_true", help="no report.html at the end")


def run(options: argparse.Namespace) -> int:
    """Trains."""
    from mogb_diffusion.config import load_run
    from mogb_diffusion.distributed import start_ranks, stop_ranks
    from mogb_diffusion.trainer import Trainer

    configuration = load_run(options.recipe, options.set, options.preset)
    out = Path(options.out) if options.out else Path("runs") / configuration.name
    ranks = start_ranks(configuration.model.device)
    try:
        trainer = Trainer(configuration, out, ranks=ranks, tell=tell)
        trainer.train(resume=options.resume)
    finally:
        stop_ranks()
    if ranks.first and not options.no_report:
        from mogb_diffusion.report import write_report

        try:
            print(f"Everything on one page: {write_report(out)}")
        except InputError as error:  # the run is fine; its page needs matplotlib
            print(f"No report: {error}")
    return 0
