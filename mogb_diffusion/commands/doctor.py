"""``mogb-diffusion doctor``."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mogb_diffusion.commands._shared import set_argument

if TYPE_CHECKING:
    from mogb_diffusion.config import Run
    from mogb_diffusion.memory import Estimate, Shape
    from mogb_diffusion.readiness import Weights
    from mogb_diffusion.recipes.presets import Preset

SUMMARY = "what is installed, and whether a recipe can run here; status 1 if something is missing"
EXAMPLE = """
mogb-diffusion doctor
mogb-diffusion doctor tiny --set batch.micro_batch=16
mogb-diffusion doctor sd35_marble --preset 8x80gb --dry-run
"""
GIB = 2**30


def arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe, or none."""
    parser.add_argument("recipe", metavar="RECIPE|FILE", nargs="?", help="also check this one")
    set_argument(parser)
    parser.add_argument("--preset", metavar="NAME", help="hardware: 1x24gb, 1x80gb, 8x80gb or 2x8x80gb")
    parser.add_argument(
        "--dry-run", action="store_true", help="train the recipe in miniature, on the tiny model and its rewards"
    )
    parser.add_argument("--out", metavar="DIR", default="runs", help="where runs go, for its free disk; default: runs")


def run(options: argparse.Namespace) -> int:
    """Prints what is there and what is missing, with what to do about it."""
    from mogb_diffusion.config import load_run
    from mogb_diffusion.errors import InputError

    if options.recipe is None:
        if options.dry_run or options.preset:
            raise InputError("--dry-run and --preset belong to a recipe: name one.")
        _packages()
        return 0
    wanted = load_run(options.recipe, options.set, options.preset)
    missing = [*_packages(), *_hardware(wanted, options.preset, Path(options.out))]
    missing += [*_weights(wanted), *_prompts(wanted), *_main_memory(wanted, options.preset), *_rewards(wanted)]
    if options.dry_run:
        _dry_run(wanted)
    names = list(dict.fromkeys(missing))
    if not names:
        print(f"ready: {_command(wanted, options)}")
        return 0
    print(f"not ready, {len(names)} missing: {', '.join(names)}")
    return 1


def _command(wanted: "Run", options: argparse.Namespace) -> str:
    if options.preset:
        from mogb_diffusion.recipes.presets import preset

        return preset(options.preset).launch(options.recipe)
    return f"mogb-diffusion train {options.recipe}"


def _packages() -> list[str]:
    import torch

    missing = []
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} CPU cores, torch {torch.__version__}")
    for package, extra, is_needed in (
        ("diffusers", "diffusion", True), ("transformers", "diffusion", True), ("peft", "diffusion", True),
        ("accelerate", "diffusion", True), ("safetensors", "diffusion", True), ("pyyaml", "diffusion", True),
        ("pillow", "diffusion", True), ("rapidocr", "ocr", False), ("matplotlib", "plot", False),
        ("tensorboard", "tensorboard", False), ("wandb", "wandb", False),
    ):  # fmt: skip
        version, hint = _version(package), f"missing: pip install 'mogb[{extra}]'"
        print(f"  {package:14} {version or hint}")
        missing += [package] if is_needed and not version else []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        print(f"  cuda:{index} {torch.cuda.get_device_name(index)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free")
    if not torch.cuda.is_available():
        print("  no GPU: everything runs on the CPU")
    return missing


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _hardware(wanted: "Run", name: str | None, out: Path) -> list[str]:
    """Batch arithmetic, memory and disk."""
    from mogb_diffusion import memory, readiness
    from mogb_diffusion.models.sd3 import find_device
    from mogb_diffusion.recipes.presets import preset
    from mogb_diffusion.rollouts import describe_batch

    chosen = None if name is None else preset(name)
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if chosen is None else chosen.ranks
    print(f"{wanted.name}: {describe_batch(wanted, ranks)}")
    print(f"  device {find_device(wanted.model.device)}, {wanted.model.dtype}")
    if chosen is not None:
        print(f"  {chosen.launch(wanted.name)}")
    shape = _shape(wanted)
    if shape is None:
        print("memory: a small model, or one whose shape is not known here: no estimate")
        needs_none = readiness.pipeline_weights(wanted.model) is None or wanted.model.device == "cpu"
        return [*([] if needs_none else _gpus(wanted, None, chosen)), *_disk(wanted, None, out)]
    estimate = memory.estimate(wanted, shape, ranks=ranks)
    _print_estimate(estimate, shape)
    return [*_gpus(wanted, estimate, chosen), *_disk(wanted, shape, out)]


def _shape(wanted: "Run") -> "Shape | None":
    """That of the transformer, where it is known, or lies in the hub's cache."""
    from mogb_diffusion import memory, readiness

    weights = readiness.pipeline_weights(wanted.model)
    for source in (wanted.model.source, weights.where if weights else ""):
        if source and (architecture := memory.known_architecture(source)) is not None:
            return memory.shape_of(wanted, architecture)
    return None


def _print_estimate(estimate: "Estimate", shape: "Shape") -> None:
    print(
        f"memory of a GPU, estimated from shapes ({shape.parameters / 1e9:.2f} billion weights, "
        f"{shape.trained / 1e6:.1f} million in training):"
    )
    for part in estimate.parts:
        print(f"  {part.size / GIB:6.1f} GiB  {part.name}{'' if part.when == 'always' else f' ({part.when})'}")
    phases = ", ".join(f"{name} {estimate.phase(name) / GIB:.1f}" for name in ("training", "sampling", "encoding"))
    print(f"  {estimate.peak / GIB:6.1f} GiB  at most: {phases}; libraries take about a tenth on top")
    if estimate.unknown:
        print(f"  not counted: the networks of {', '.join(estimate.unknown)}")


def _gpus(wanted: "Run", estimate: "Estimate | None", chosen: "Preset | None") -> list[str]:
    import torch

    needed = 1 if chosen is None else chosen.gpus
    there = torch.cuda.device_count() if wanted.model.device != "cpu" else 0
    if there < needed:
        print(f"  missing: GPUs; this needs {needed} on a machine, and here are {there or 'none'}")
        return ["GPU"]
    least = min(torch.cuda.mem_get_info(index)[1] for index in range(there))
    if estimate is not None and estimate.peak > 0.95 * least:
        spread = "" if wanted.policy.kind == "lora" or wanted.model.shard else ", model.shard=true on several GPUs"
        print(f"  missing: memory; a GPU here has {least / GIB:.1f} GiB. Try --preset, a smaller batch.micro_batch, "
              f"model.gradient_checkpointing=true{spread} or model.text_encoders=offload")  # fmt: skip
        return ["GPU memory"]
    return []


def _disk(wanted: "Run", shape: "Shape | None", out: Path) -> list[str]:
    from mogb_diffusion import readiness

    listed = {weights.source: weights for weights in _listed(wanted)}
    fetched = sum(weights.size for weights in listed.values() if not weights.where)
    needs = [("weights to fetch", fetched, readiness.hub_cache())]
    if shape is not None:
        needs.append(("checkpoints", readiness.checkpoint_bytes(wanted, shape.trained), out))
    missing = []
    for what, need, folder in needs:
        free = readiness.free_bytes(folder)
        short = need > free
        print(f"disk: {need / GIB:.1f} GiB of {what}, {free / GIB:.0f} GiB free{': too little' if short else ''}")
        missing += ["disk"] if short else []
    if shape is None:
        print(f"disk: checkpoints of a size that is not known here, {readiness.free_bytes(out) / GIB:.0f} GiB free")
    return missing


def _main_memory(wanted: "Run", name: str | None) -> list[str]:
    """What prompts take in the main memory of a machine, where the text encoders are not resident."""
    from mogb_diffusion import memory, readiness
    from mogb_diffusion.datasets import evaluation_prompts, load_mixture
    from mogb_diffusion.recipes.presets import preset

    shape = _shape(wanted)
    if wanted.model.text_encoders == "resident" or shape is None:
        return []
    if readiness.missing_prompts((*wanted.prompts, *wanted.evaluation.prompts)):
        size = memory.embedding_bytes(wanted, shape) / 1e6
        print(f"main memory: {size:.1f} MB for each prompt and process; how many prompts there are is not known yet")
        return []
    texts = {"", *(prompt.text for prompt in (*load_mixture(wanted).rows, *evaluation_prompts(wanted)))}
    processes = readiness.local_ranks() if name is None else preset(name).gpus
    parts, free = memory.main_memory(wanted, shape, len(texts), processes), readiness.free_main_memory()
    print("main memory of a machine, with the text encoders elsewhere than on the GPU:")
    for part in parts:
        print(f"  {part.size / GIB:6.1f} GiB  {part.name}")
    need = sum(part.size for part in parts)
    if free is None or need <= free:
        print(f"  {need / GIB:6.1f} GiB  at most{'' if free is None else f'; {free / GIB:.0f} GiB are free'}")
        return []
    remedy = "model.text_encoders=offload, or fewer processes" if wanted.model.text_encoders == "precompute" else (
        "model.text_encoders=resident, or fewer processes"
    )  # fmt: skip
    print(f"  missing: main memory; this needs {need / GIB:.1f} GiB, and {free / GIB:.1f} are free. Try {remedy}")
    return ["main memory"]


def _listed(wanted: "Run") -> "list[Weights]":
    """Everything published that the run reads."""
    from mogb_diffusion import readiness

    pipeline = readiness.pipeline_weights(wanted.model)
    rewards = (*wanted.rewards, *wanted.evaluation.rewards)
    return [*([] if pipeline is None else [pipeline]),
            *(weights for reward in rewards for weights in readiness.reward_weights(reward))]  # fmt: skip


def _weights(wanted: "Run") -> list[str]:
    listed = _listed(wanted)
    if listed:
        print("weights:")
    missing = []
    for weights in dict.fromkeys(listed):
        licence = f", licence: {weights.licence}" if weights.licence else ""
        print(f"  {weights.purpose}: {weights.source}{licence}")
        if where := weights.where:
            print(f"    here: {where}")
        else:
            print(f"    missing: {weights.remedy}")
            missing.append(f"{weights.source} {weights.file}".strip())
    return missing


def _prompts(wanted: "Run") -> list[str]:
    from mogb_diffusion import readiness
    from mogb_diffusion.datasets import evaluation_prompts, load_mixture

    absent = readiness.missing_prompts((*wanted.prompts, *wanted.evaluation.prompts))
    for path, remedy in absent:
        print(f"prompts: {path} is missing: {remedy}")
    if not any(source.path in dict(absent) for source in wanted.prompts):
        print(f"prompts: {len(load_mixture(wanted))} for training")
    if not any(source.path in dict(absent) for source in wanted.evaluation.prompts):
        print(f"prompts: {len(evaluation_prompts(wanted))} pictures for evaluation")
    return [path for path, _ in absent]


def _rewards(wanted: "Run") -> list[str]:
    from mogb_diffusion import readiness

    print("rewards:")
    found = [readiness.try_reward(reward) for reward in (*wanted.rewards, *wanted.evaluation.rewards)]
    for tried in found:
        print(f"  {tried.name}: {tried.report}")
    print(f"  specialists: {', '.join(sorted(tried.name for tried in found if tried.specialist)) or 'none'}")
    return [f"reward {tried.name}" for tried in found if tried.fails]


def _dry_run(wanted: "Run") -> None:
    from mogb_diffusion.dry_run import dry_run
    from mogb_diffusion.rollouts import describe_batch

    done = dry_run(wanted)
    changed = [f"{new.key} by {new.name}" for old, new in zip(wanted.rewards, done.run.rewards, strict=True)
               if old.name != new.name]  # fmt: skip
    print(f"dry run on the tiny model with random weights: {describe_batch(done.run, 1)}")
    if changed:
        print(f"  rewards that judge photographs are replaced: {', '.join(changed)}")
    if not done.run.epochs:
        print(f"  measured, as the recipe trains nothing; {done.seconds:.1f} s")
        return
    shares = ", ".join(f"{name} {share:.2f}" for name, share in done.shares.items())
    print(f"  {done.updates} optimizer steps, {done.solved} of them solved, {done.skipped} skipped; "
          f"alpha at the end: {shares}; {done.seconds:.1f} s")  # fmt: skip
