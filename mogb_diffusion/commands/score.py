"""``mogb-diffusion score``."""

import argparse
import csv
import io
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mogb_diffusion.commands._shared import (
    benchmark_rule,
    chosen_rewards,
    positive,
    reward_arguments,
    write_json,
    write_text,
)
from mogb_diffusion.errors import InputError, RewardFailure

if TYPE_CHECKING:
    from torch import Tensor

    from mogb_diffusion.config import Reward
    from mogb_diffusion.evaluation import Measured
    from mogb_diffusion.pictures import Picture
    from mogb_diffusion.scoring import Scorer

SUMMARY = "rewards of a folder of pictures, of whatever model"
EXAMPLE = """
mogb-diffusion score pictures --rewards pickscore,clip --prompts prompts.jsonl
mogb-diffusion score geneval_outputs --rewards geneval --option geneval.device=cuda
mogb-diffusion score pictures --rewards aesthetic --option aesthetic.weights=sac+logos+ava1-l14-linearMSE.pth
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which pictures, by which rewards."""
    parser.add_argument(
        "folder", metavar="DIR", help="pictures with prompts: a .txt beside each, prompts.jsonl or prompts.csv "
        "(file_name, prompt), or GenEval's folders with metadata.jsonl and samples/",
    )  # fmt: skip
    parser.add_argument("--rewards", metavar="A,B", required=True, help="see mogb-diffusion recipes, or module:Class")
    reward_arguments(parser)
    parser.add_argument("--prompts", metavar="FILE", help="a .jsonl or .csv with a line per picture: file_name, prompt")
    parser.add_argument("--batch", metavar="N", type=positive, default=16, help="pictures at once; default: 16")
    parser.add_argument("--timeout", metavar="S", type=float, default=600.0, help="seconds for a call; default: 600")
    parser.add_argument("--json", metavar="FILE", help="default: scores.json in DIR")
    parser.add_argument("--csv", metavar="FILE", help="a line per picture; default: scores.csv in DIR")


def run(options: argparse.Namespace) -> int:
    """Reads, scores, prints a table and writes it."""
    from mogb_diffusion.config import ConfigError, Scoring
    from mogb_diffusion.evaluation import measure
    from mogb_diffusion.pictures import find_pictures, read_in_batches
    from mogb_diffusion.scoring import make_scorer

    try:
        settings = Scoring(timeout=options.timeout)
    except ConfigError as error:
        raise InputError(f"--{error}") from None
    folder = Path(options.folder)
    pictures = find_pictures(folder, Path(options.prompts) if options.prompts else None)
    specs = tuple(benchmark_rule(spec, options.option) for spec in chosen_rewards(options.rewards, (), options.option))
    scorer = make_scorer(specs, settings)
    damaged: dict[str, str] = {}
    whole: list[Picture] = []

    def batches() -> "Any":
        for images, part in read_in_batches(pictures, options.batch, damaged):
            whole.extend(part)
            yield images, [picture.prompt for picture in part]

    try:
        found = measure(scorer, batches())
    finally:
        scorer.close()
    for message in (*damaged.values(), *dict.fromkeys(found.messages)):
        print(message, file=sys.stderr)
    if not whole:
        raise InputError(f"none of the {len(pictures)} pictures of {folder} can be read.")
    summary = _summary(found, specs, scorer, whole) | {"damaged": sorted(damaged)}
    write_json(Path(options.json) if options.json else folder / "scores.json", summary)
    table = _table(found.rewards, specs, whole, damaged)
    write_text(Path(options.csv) if options.csv else folder / "scores.csv", table)
    _say(summary, specs)
    broken = [name for name, counts in found.failures.items() if counts.keys() & {"errors", "timeouts"}]
    if broken:
        raise RewardFailure(f"{', '.join(broken)} failed on some pictures, which are in no mean: see above.")
    return 0


def _summary(
    found: "Measured", specs: "tuple[Reward, ...]", scorer: "Scorer", whole: "list[Picture]"
) -> dict[str, Any]:
    from mogb_diffusion.evaluation import scores_of
    from mogb_diffusion.results import versions

    scores = scores_of(found, specs, scorer, [picture.prompt for picture in whole])
    return {"pictures": len(whole), "scores": scores, "failures": found.failures, "versions": versions()}


def _table(rewards: "Tensor", specs: "tuple[Reward, ...]", whole: "list[Picture]", damaged: dict[str, str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file_name", "prompt", *(spec.key for spec in specs), "problem"])
    for picture, values in zip(whole, rewards.mT.tolist(), strict=True):
        numbers = ["" if math.isnan(value) else value for value in values]
        writer.writerow([picture.name, picture.prompt.text, *numbers, ""])
    for name, problem in sorted(damaged.items()):
        writer.writerow([name, "", *("" for _ in specs), problem])
    return text.getvalue()


def _say(summary: dict[str, Any], specs: "tuple[Reward, ...]") -> None:
    damaged = f", {len(summary['damaged'])} damaged" if summary["damaged"] else ""
    width = max(24, *(len(spec.key) + 2 for spec in specs))
    print(f"{summary['pictures']} pictures{damaged}\n{'reward':{width}}{'mean':>12}{'error':>12}{'pictures':>10}")
    for name, score in summary["scores"].items():
        for label, part in {name: score, **{f"  {tag}": p for tag, p in score.get("categories", {}).items()}}.items():
            numbers = ["-" if part[key] is None else f"{part[key]:.4f}" for key in ("mean", "error")]
            print(f"{label:{width}}{numbers[0]:>12}{numbers[1]:>12}{part['count']:>10}")
