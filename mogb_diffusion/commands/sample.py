"""``mogb-diffusion sample``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mogb_diffusion.commands._shared import find, positive, source_arguments, tell
from mogb_diffusion.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from mogb_diffusion.prompts import Prompt
    from mogb_diffusion.trained import Trained

SUMMARY = "pictures of prompts by a run, a LoRA or a base model"
EXAMPLE = """
mogb-diffusion sample runs/tiny --prompt 'a photo of two red squares' --count 16 --out squares.png
mogb-diffusion sample runs/tiny --prompts test.txt --count 4 --before-after --out both.png
mogb-diffusion sample lora --prompts test_metadata.jsonl --each pictures     then: mogb-diffusion score pictures
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and of what."""
    parser.add_argument("target", metavar="RUN|LORA|RECIPE", help="as for evaluate")
    source_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="a file of prompts")
    parser.add_argument("--count", metavar="N", type=positive, default=8, help="pictures of each; default: 8")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the noise; default: 0")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--base", action="store_true", help="by the base model, without the adapter")
    which.add_argument(
        "--before-after", action="store_true", help="both: of each prompt a row by the base model, and below it a "
        "row with the same noise by the trained one",
    )  # fmt: skip
    parser.add_argument("--columns", metavar="N", type=positive, help="of the grid; default: --count, at most 12")
    parser.add_argument("--out", metavar="FILE", default="samples.png", help="the grid; default: %(default)s")
    parser.add_argument("--each", metavar="DIR", help="also every picture as a file, with prompts.jsonl, for score")


def run(options: argparse.Namespace) -> int:
    """Draws, and writes a grid."""
    from mogb_diffusion.tracking import save_grid

    texts = _texts(options)
    source = find(options, options.target, recipes=True)
    trained = source.load(tell=tell)
    if options.before_after and not trained.changed:
        raise InputError(f"{options.target} is a base model: there is nothing before or after.")
    prompts = [prompt for prompt in texts for _ in range(options.count)]
    drawn = _drawn(trained, prompts, options)
    columns = min(options.columns or min(options.count, 12), options.count)
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_grid(_arranged(list(drawn.values()), options.count, columns), out, columns=columns)
    print(out)
    if options.each:
        for which, images in drawn.items():
            folder = Path(options.each) / which if len(drawn) > 1 else Path(options.each)
            _save(images, prompts, folder)
            print(folder)
    return 0


def _texts(options: argparse.Namespace) -> "list[Prompt]":
    from mogb_diffusion.prompts import Prompt, read_prompts

    found = [Prompt(text) for text in options.prompt]
    found += read_prompts(options.prompts) if options.prompts else []
    if not found:
        raise InputError("name a prompt with --prompt TEXT, or a file of them with --prompts FILE.")
    return found


def _drawn(trained: "Trained", prompts: "list[Prompt]", options: argparse.Namespace) -> "dict[str, Tensor]":
    from mogb_diffusion.evaluation import draw_pictures, evaluation_sampling

    how, batch = evaluation_sampling(trained.run), trained.run.evaluation.batch
    wanted = {"before": trained.base, "after": trained.weights}
    if not options.before_after:
        wanted.pop("after" if options.base else "before")
    drawn = {}
    for which, active in wanted.items():
        with active():
            drawn[which] = draw_pictures(trained.model, prompts, how, options.seed, batch=batch)
    return drawn


def _arranged(grids: "list[Tensor]", count: int, columns: int) -> "Tensor":
    """Rows of one prompt by each model, below each other; white pictures fill up the last row of a prompt."""
    import torch

    rows = -(-count // columns)
    blank = torch.ones(rows * columns - count, *grids[0].shape[1:])
    parts = []
    for start in range(0, len(grids[0]), count):
        groups = [torch.cat([grid[start : start + count], blank]).split(columns) for grid in grids]
        parts += [group[row] for row in range(rows) for group in groups]
    return torch.cat(parts)


def _save(images: "Tensor", prompts: "list[Prompt]", folder: Path) -> None:
    from PIL import Image

    from mogb_diffusion.pictures import MAPPING, as_line, to_bytes

    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        name = f"{number:05d}.png"
        Image.fromarray(to_bytes(image)).save(folder / name)
        lines.append(as_line(name, prompt))
    (folder / MAPPING).write_text("\n".join(lines) + "\n", encoding="utf-8")
