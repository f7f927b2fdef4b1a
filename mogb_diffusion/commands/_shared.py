"""What several commands take and say."""

import argparse
from pathlib import Path
from typing import Any

from mogb_diffusion.errors import InputError


def recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe or a file, and changes of it."""
    parser.add_argument("recipe", metavar="RECIPE|FILE", help="see mogb-diffusion recipes; or a .yaml file")
    set_argument(parser)


def set_argument(parser: argparse.ArgumentParser) -> None:
    """Changes of a configuration."""
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="such as loss.beta=0.1; may be repeated"
    )


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """A folder of a run, and which state of it."""
    parser.add_argument("folder", metavar="DIR", help="of a run")
    parser.add_argument("--checkpoint", metavar="NAME", help="such as checkpoint-000040; default: the newest whole one")
    parser.add_argument("--device", metavar="NAME", help="another one than that of the configuration")


def loaded(options: argparse.Namespace) -> Any:
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
    elif (last := checkpoint.newest(folder, tell)) is not None:
        state = last[1]
    else:
        raise InputError(f"{folder} has no whole checkpoint yet.")
    trainer = Trainer(run)
    trainer.load_state_dict(state)
    return trainer


def positive(text: str) -> int:
    """A whole number >= 1, for ``argparse``."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, not {text!r}")
    return value


def tell(message: str) -> None:
    """To stdout, at once."""
    print(message, flush=True)
