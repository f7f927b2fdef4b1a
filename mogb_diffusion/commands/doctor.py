"""``mogb-diffusion doctor``."""

import argparse
import os
import sys

from mogb_diffusion.commands._shared import set_argument

SUMMARY = "what is installed, and whether a recipe can run here"
EXAMPLE = "mogb-diffusion doctor tiny --set batch.micro_batch=16"


def arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe, or none."""
    parser.add_argument("recipe", metavar="RECIPE|FILE", nargs="?", help="also check this one")
    set_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Prints what is there."""
    import importlib.metadata

    import torch

    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} CPU cores, torch {torch.__version__}")
    for package, extra in (
        ("diffusers", "diffusion"), ("transformers", "diffusion"), ("peft", "diffusion"), ("accelerate", "diffusion"),
        ("safetensors", "diffusion"), ("pyyaml", "diffusion"), ("pillow", "diffusion"), ("matplotlib", "plot"),
        ("tensorboard", "tensorboard"), ("wandb", "wandb"),
    ):  # fmt: skip
        try:
            print(f"  {package:14} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:  # noqa: PERF203 - ten packages
            print(f"  {package:14} missing: pip install 'mogb[{extra}]'")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        print(f"  cuda:{index} {torch.cuda.get_device_name(index)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    if not torch.cuda.is_available():
        print("  no GPU: everything runs on the CPU")
    if options.recipe is None:
        return 0
    from mogb_diffusion.config import load_run
    from mogb_diffusion.datasets import evaluation_prompts, load_mixture
    from mogb_diffusion.models.sd3 import find_device
    from mogb_diffusion.rollouts import describe_batch
    from mogb_diffusion.scoring import make_scorer

    wanted = load_run(options.recipe, options.set)
    print(f"{wanted.name}: {describe_batch(wanted, int(os.environ.get('WORLD_SIZE', '1')))}")
    print(f"  device {find_device(wanted.model.device)}, {wanted.model.dtype}")
    print(f"  {len(load_mixture(wanted))} training prompts, {len(evaluation_prompts(wanted))} evaluation pictures")
    scorer = make_scorer((*wanted.rewards, *wanted.evaluation.rewards), wanted.scoring)
    print(f"  rewards: {', '.join(scorer.rewards)}; specialists: {', '.join(sorted(scorer.special)) or 'none'}")
    return 0
