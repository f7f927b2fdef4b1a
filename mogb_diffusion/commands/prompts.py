"""``mogb-diffusion prompts``."""

import argparse
from typing import TYPE_CHECKING

from mogb_diffusion.commands._shared import positive
from mogb_diffusion.errors import InputError

if TYPE_CHECKING:
    from mogb_diffusion.prompts import Prompt

SUMMARY = "check a prompt file, or draw prompts"
EXAMPLE = """
mogb-diffusion prompts train.jsonl
mogb-diffusion prompts geneval --n 2000 --seed 0 --apart-from test_metadata.jsonl --out train_metadata.jsonl
mogb-diffusion prompts ocr --n 2000 --out train.txt
mogb-diffusion prompts --world 100 --kind text --out signs.jsonl
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """A file, or what to draw."""
    parser.add_argument(
        "file", metavar="FILE|geneval|ocr", nargs="?",
        help="text, GenEval or generic JSONL; or geneval (its metadata format) or ocr (text) to draw prompts",
    )  # fmt: skip
    parser.add_argument("--n", metavar="N", type=positive, default=1000, help="geneval, ocr: how many; default: 1000")
    parser.add_argument("--apart-from", metavar="FILE", help="geneval, ocr: draw none of the prompts of this file")
    parser.add_argument("--format", choices=("auto", "text", "geneval", "jsonl"), default="auto", help="default: auto")
    parser.add_argument("--world", metavar="N", type=positive, help="draw N prompts of the tiny world instead")
    parser.add_argument("--kind", choices=("mixed", "text", "objects"), default="mixed", help="of the world's prompts")
    parser.add_argument("--split", choices=("train", "held_out"), default="train", help="of the world's prompts")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the draw; default: 0")
    parser.add_argument("--out", metavar="FILE", help="write them as generic JSONL")


def run(options: argparse.Namespace) -> int:
    """Reads or draws prompts, counts them, and writes them where asked."""
    from mogb_diffusion.prompts import read_prompts, write_prompts

    if (options.file is None) == (options.world is None):
        raise InputError("name a file, or ask for prompts of the tiny world with --world N.")
    if options.file in ("geneval", "ocr"):
        prompts = _drawn(options)
    else:
        if options.world is None:
            prompts = read_prompts(options.file, options.format)
        else:
            from mogb_diffusion.seeds import keyed_generator
            from mogb_diffusion.world.captions import sample_prompts

            generator = keyed_generator(options.seed, "prompts")
            prompts = sample_prompts(options.world, generator, kind=options.kind, split=options.split)
        if options.out:
            write_prompts(prompts, options.out)
    signs = sum(prompt.target_text is not None for prompt in prompts)
    tags: dict[str, int] = {}
    for prompt in prompts:
        if "tag" in prompt.metadata:
            tags[prompt.metadata["tag"]] = tags.get(prompt.metadata["tag"], 0) + 1
    print(f"{len(prompts)} prompts, {len({prompt.text for prompt in prompts})} different; {signs} with a text to show")
    for tag, count in sorted(tags.items()):
        print(f"  {tag}: {count}")
    for prompt in prompts[:5]:
        print(f"  {prompt.text}")
    return 0


def _drawn(options: argparse.Namespace) -> "list[Prompt]":
    """Prompts in the form of GenEval's or of OCR's files, written in that form."""
    from mogb_diffusion.generate import geneval_prompts, ocr_prompts, write_geneval, write_text
    from mogb_diffusion.prompts import read_prompts

    if not options.out:
        raise InputError(f"prompts {options.file} writes a file: say where with --out FILE.")
    known = [prompt.text for prompt in read_prompts(options.apart_from)] if options.apart_from else []
    try:
        if options.file == "geneval":
            write_geneval(options.out, geneval_prompts(options.n, options.seed, apart_from=known))
        else:
            write_text(options.out, ocr_prompts(options.n, options.seed, apart_from=known))
    except OSError as error:
        raise InputError(f"--out {options.out} cannot be written: {error.strerror}.") from error
    return read_prompts(options.out, "geneval" if options.file == "geneval" else "text")
