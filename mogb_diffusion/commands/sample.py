"""``mogb-diffusion sample``."""

import argparse
from pathlib import Path

from mogb_diffusion.commands._shared import loaded, positive, run_arguments

SUMMARY = "pictures of a prompt by a trained run"
EXAMPLE = "mogb-diffusion sample runs/tiny --prompt 'a photo of two red squares' --count 16 --out squares.png"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, and of what."""
    run_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT", action="append", required=True, help="may be given several times")
    parser.add_argument("--count", metavar="N", type=positive, default=8, help="pictures of each; default: 8")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the noise; default: 0")
    parser.add_argument("--base", action="store_true", help="by the base model, without the adapter")
    parser.add_argument("--out", metavar="FILE", default="samples.png", help="default: %(default)s")


def run(options: argparse.Namespace) -> int:
    """Draws a grid of pictures."""
    from mogb_diffusion.evaluation import draw_pictures, evaluation_sampling
    from mogb_diffusion.prompts import Prompt
    from mogb_diffusion.tracking import save_grid

    trainer = loaded(options)
    prompts = [Prompt(text) for text in options.prompt for _ in range(options.count)]
    with trainer.policy.reference() if options.base else trainer.averaged():
        images = draw_pictures(trainer.model, prompts, evaluation_sampling(trainer.run), options.seed)
    trainer.close()
    save_grid(images, Path(options.out), columns=min(options.count, 12))
    print(options.out)
    return 0
