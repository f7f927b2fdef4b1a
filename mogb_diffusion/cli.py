"""The command line: ``mogb-diffusion train | evaluate | sample | export | report | recipes | doctor | prompts``.

Exit status: 0 done, 1 the work failed (a reward, the disk), 2 bad arguments, configuration or input, with one line on
stderr that says what to do, 130 interrupted.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mogb_diffusion.errors import CheckpointError, InputError, RewardFailure

if TYPE_CHECKING:
    from mogb_diffusion.prompts import Prompt

PROGRAM = "mogb-diffusion"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    options = _parser().parse_args(arguments)
    _quieten()
    try:
        status: int = options.command(options)
        return status
    except InputError as error:
        return _say(f"{PROGRAM} {options.name}: {error}", 2)
    except (RewardFailure, CheckpointError) as error:
        return _say(f"{PROGRAM} {options.name}: {error}", 1)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _say(f"{PROGRAM} {options.name}: {error}", 1)
    except KeyboardInterrupt:
        return _say(f"{PROGRAM} {options.name}: interrupted. The last checkpoint is kept: add --resume to go on.", 130)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Multi-reward reinforcement learning of diffusion models.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = _command(
        commands, "train", _train, "train a recipe or a YAML file",
        f"{PROGRAM} train tiny --out runs/tiny\n  {PROGRAM} train tiny --set balancing.mode=cagrad --set epochs=10\n"
        "  torchrun --standalone --nproc_per_node 2 -m mogb_diffusion train tiny --out runs/two --resume",
    )  # fmt: skip
    _recipe(command)
    command.add_argument("--out", metavar="DIR", help="folder of the run; default: runs/<name>")
    command.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint of --out")
    command.add_argument("--no-report", action="store_true", help="no report.html at the end")

    command = _command(
        commands, "evaluate", _evaluate, "held-out rewards of a trained run and of the base model",
        f"{PROGRAM} evaluate runs/tiny --images 240",
    )  # fmt: skip
    _run_folder(command)
    command.add_argument("--images", metavar="N", type=_positive, help="default: that of the configuration")
    command.add_argument("--prompts", metavar="FILE", help="other prompts than the held-out ones")

    command = _command(
        commands, "sample", _sample, "pictures of a prompt by a trained run",
        f"{PROGRAM} sample runs/tiny --prompt 'a photo of two red squares' --count 16 --out squares.png",
    )  # fmt: skip
    _run_folder(command)
    command.add_argument("--prompt", metavar="TEXT", action="append", required=True, help="may be given several times")
    command.add_argument("--count", metavar="N", type=_positive, default=8, help="pictures of each; default: 8")
    command.add_argument("--seed", metavar="N", type=int, default=0, help="of the noise; default: 0")
    command.add_argument("--base", action="store_true", help="by the base model, without the adapter")
    command.add_argument("--out", metavar="FILE", default="samples.png", help="default: %(default)s")

    command = _command(
        commands, "export", _export, "the trained weights of a run, for diffusers",
        f"{PROGRAM} export runs/tiny --out lora      then: pipe.load_lora_weights('lora')\n"
        f"  {PROGRAM} export runs/tiny --out pipeline --merge",
    )  # fmt: skip
    _run_folder(command)
    command.add_argument("--out", metavar="DIR", required=True, help="where to write")
    command.add_argument("--merge", action="store_true", help="a whole pipeline with the adapter merged into it")

    command = _command(commands, "report", _report, "write report.html and its figures", f"{PROGRAM} report runs/tiny")
    command.add_argument("folders", metavar="DIR", nargs="+", help="of a run, finished or not")

    command = _command(
        commands, "recipes", _recipes, "the recipes, or one of them in full as YAML",
        f"{PROGRAM} recipes tiny > mine.yaml",
    )  # fmt: skip
    command.add_argument("recipe", metavar="NAME", nargs="?", help="print this one")
    command.add_argument("--json", action="store_true", help="one JSON array")

    command = _command(
        commands, "doctor", _doctor, "what is installed, and whether a recipe can run here",
        f"{PROGRAM} doctor tiny --set batch.micro_batch=16",
    )  # fmt: skip
    command.add_argument("recipe", metavar="RECIPE|FILE", nargs="?", help="also check this one")
    command.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="as for train")

    command = _command(
        commands, "prompts", _prompts, "check a prompt file, or draw prompts",
        f"{PROGRAM} prompts train.jsonl\n"
        f"  {PROGRAM} prompts geneval --n 2000 --seed 0 --apart-from test_metadata.jsonl --out train_metadata.jsonl\n"
        f"  {PROGRAM} prompts ocr --n 2000 --out train.txt\n"
        f"  {PROGRAM} prompts --world 100 --kind text --out signs.jsonl",
    )  # fmt: skip
    command.add_argument(
        "file", metavar="FILE|geneval|ocr", nargs="?",
        help="text, GenEval or generic JSONL; or geneval (its metadata format) or ocr (text) to draw prompts",
    )  # fmt: skip
    command.add_argument("--n", metavar="N", type=_positive, default=1000, help="geneval, ocr: how many; default: 1000")
    command.add_argument("--apart-from", metavar="FILE", help="geneval, ocr: draw none of the prompts of this file")
    command.add_argument("--format", choices=("auto", "text", "geneval", "jsonl"), default="auto", help="default: auto")
    command.add_argument("--world", metavar="N", type=_positive, help="draw N prompts of the tiny world instead")
    command.add_argument("--kind", choices=("mixed", "text", "objects"), default="mixed", help="of the world's prompts")
    command.add_argument("--split", choices=("train", "held_out"), default="train", help="of the world's prompts")
    command.add_argument("--seed", metavar="N", type=int, default=0, help="of the draw; default: 0")
    command.add_argument("--out", metavar="FILE", help="write them as generic JSONL")
    return parser


def _command(
    commands: "argparse._SubParsersAction[_Parser]",
    name: str,
    function: Callable[[argparse.Namespace], int],
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=f"examples:\n  {example}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.set_defaults(command=function, name=name)
    return command


def _recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="RECIPE|FILE", help="see mogb-diffusion recipes; or a .yaml file")
    command.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="such as loss.beta=0.1; may be repeated"
    )


def _run_folder(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="DIR", help="of a run")
    command.add_argument(
        "--checkpoint", metavar="NAME", help="such as checkpoint-000040; default: the newest whole one"
    )
    command.add_argument("--device", metavar="NAME", help="another one than that of the configuration")


def _train(options: argparse.Namespace) -> int:
    from mogb_diffusion.config import load_run
    from mogb_diffusion.distributed import start_ranks, stop_ranks
    from mogb_diffusion.trainer import Trainer

    run = load_run(options.recipe, options.set)
    out = Path(options.out) if options.out else Path("runs") / run.name
    ranks = start_ranks(run.model.device)
    try:
        trainer = Trainer(run, out, ranks=ranks, tell=_tell)
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


def _evaluate(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from mogb_diffusion.datasets import evaluation_prompts, interleaved
    from mogb_diffusion.evaluation import evaluate
    from mogb_diffusion.prompts import read_prompts

    trainer = _loaded(options)
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


def _sample(options: argparse.Namespace) -> int:
    from mogb_diffusion.evaluation import draw_pictures, evaluation_sampling
    from mogb_diffusion.prompts import Prompt
    from mogb_diffusion.tracking import save_grid

    trainer = _loaded(options)
    prompts = [Prompt(text) for text in options.prompt for _ in range(options.count)]
    with trainer.policy.reference() if options.base else trainer.averaged():
        images = draw_pictures(trainer.model, prompts, evaluation_sampling(trainer.run), options.seed)
    trainer.close()
    save_grid(images, Path(options.out), columns=min(options.count, 12))
    print(options.out)
    return 0


def _export(options: argparse.Namespace) -> int:
    trainer = _loaded(options)
    out = Path(options.out)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty: name another --out.")
    out.mkdir(parents=True, exist_ok=True)
    trainer.export(out)
    is_lora = trainer.run.policy.kind == "lora"
    trainer.close()
    if options.merge:
        from mogb_diffusion.models.sd3 import load_model

        pipeline = load_model(trainer.run.model, trainer.model.device).pipeline
        if is_lora:
            pipeline.load_lora_weights(out)
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
        else:
            pipeline.transformer = type(pipeline.transformer).from_pretrained(out, subfolder="transformer")
        for path in out.glob("*.safetensors"):
            path.unlink()
        pipeline.save_pretrained(out)
        print(f"StableDiffusion3Pipeline.from_pretrained({str(out)!r})")
    elif is_lora:
        print(f"pipe.load_lora_weights({str(out)!r})")
    else:
        print(f"SD3Transformer2DModel.from_pretrained({str(out)!r}, subfolder='transformer')")
    return 0


def _report(options: argparse.Namespace) -> int:
    from mogb_diffusion.report import write_report

    for folder in options.folders:
        print(write_report(Path(folder)))
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from mogb_diffusion.config import to_plain, to_yaml
    from mogb_diffusion.recipes import RECIPES, recipe

    if options.recipe is not None:
        run = recipe(options.recipe)
        print(json.dumps(to_plain(run), indent=2) if options.json else to_yaml(run), end="\n" if options.json else "")
        return 0
    entries = [{"name": name, "summary": (make.__doc__ or "").strip()} for name, make in RECIPES.items()]
    if options.json:
        print(json.dumps(entries, indent=2))
    else:
        for entry in entries:
            print(f"{entry['name']:20} {entry['summary']}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
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

    run = load_run(options.recipe, options.set)
    print(f"{run.name}: {describe_batch(run, int(os.environ.get('WORLD_SIZE', '1')))}")
    print(f"  device {find_device(run.model.device)}, {run.model.dtype}")
    print(f"  {len(load_mixture(run))} training prompts, {len(evaluation_prompts(run))} evaluation pictures")
    scorer = make_scorer((*run.rewards, *run.evaluation.rewards), run.scoring)
    print(f"  rewards: {', '.join(scorer.rewards)}; specialists: {', '.join(sorted(scorer.special)) or 'none'}")
    return 0


def _prompts(options: argparse.Namespace) -> int:
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


def _loaded(options: argparse.Namespace) -> Any:
    """A trainer with the weights of a run."""
    from dataclasses import replace

    from mogb_diffusion import checkpoint
    from mogb_diffusion.config import from_yaml
    from mogb_diffusion.trainer import CONFIG, Trainer

    folder = Path(options.folder)
    if not (folder / CONFIG).exists():
        raise InputError(f"{folder} is no folder of a run: it has no {CONFIG}.")
    run = from_yaml((folder / CONFIG).read_text(), str(folder / CONFIG))
    if options.device:
        run = replace(run, model=replace(run.model, device=options.device))
    if options.checkpoint:
        if not (folder / options.checkpoint).is_dir():
            names = ", ".join(path.name for path in checkpoint.found(folder)) or "none"
            raise InputError(f"{folder} has no {options.checkpoint}. There are: {names}.")
        state = checkpoint.load(folder / options.checkpoint)
    elif (last := checkpoint.newest(folder, _tell)) is not None:
        state = last[1]
    else:
        raise InputError(f"{folder} has no whole checkpoint yet.")
    trainer = Trainer(run)
    trainer.load_state_dict(state)
    return trainer


def _quieten() -> None:
    """Notes of libraries about themselves, which no user can act on."""
    import logging

    for name in ("transformers", "diffusers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module=r"(transformers|diffusers|huggingface_hub)\b")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, not {text!r}")
    return value


def _tell(message: str) -> None:
    print(message, flush=True)


def _say(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status
