"""``mogb-diffusion evaluate``."""

import argparse
import json
from pathlib import Path
from typing import Any

from mogb_diffusion.commands._shared import loaded, positive, run_arguments
from mogb_diffusion.errors import InputError

SUMMARY = "held-out rewards of a trained run and of the base model"
EXAMPLE = "mogb-diffusion evaluate runs/tiny --images 240"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, and on what."""
    run_arguments(parser)
    parser.add_argument("--images", metavar="N", type=positive, help="default: that of the configuration")
    parser.add_argument("--prompts", metavar="FILE", help="other prompts than the held-out ones")


def run(options: argparse.Namespace) -> int:
    """Draws, scores, prints a table and writes ``evaluation.json``."""
    from dataclasses import asdict

    from mogb_diffusion.datasets import evaluation_prompts, interleaved
    from mogb_diffusion.evaluation import evaluate
    from mogb_diffusion.prompts import read_prompts

    trainer = loaded(options)
    count = options.images or trainer.run.evaluation.images
    if options.prompts:
        prompts = interleaved([read_prompts(options.prompts)], count)
    elif not (prompts := evaluation_prompts(trainer.run, count)):
        raise InputError(f"{options.folder} has no held-out prompts: name some with --prompts.")
    results: dict[str, Any] = {}
    with trainer.policy.reference():
        results["base"], _ = evaluate(trainer.model, trainer.examiner, prompts, trainer.run, trainer.ranks)
    with trainer.averaged():
        results["trained"], _ = evaluate(trainer.model, trainer.examiner, prompts, trainer.run, trainer.ranks)
    trainer.close()
    print(f"{len(prompts)} pictures\n{'reward':24}{'base':>18}{'trained':>18}{'change':>10}")
    for name, before in results["base"].items():
        after = results["trained"][name]
        columns = [f"{score.mean:.3f} ± {score.error:.3f}" for score in (before, after)]
        print(f"{name:24}{columns[0]:>18}{columns[1]:>18}{after.mean - before.mean:>+10.3f}")
    written = {which: {name: asdict(score) for name, score in scores.items()} for which, scores in results.items()}
    path = Path(options.folder) / "evaluation.json"
    path.write_text(json.dumps({"pictures": len(prompts), "epoch": trainer.epoch} | written, indent=2) + "\n")
    return 0
