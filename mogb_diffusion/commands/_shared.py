"""What several commands take and say."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mogb_diffusion.errors import InputError

if TYPE_CHECKING:
    from mogb_diffusion import config
    from mogb_diffusion.trained import Source


def recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe or a file, and changes of it."""
    parser.add_argument("recipe", metavar="RECIPE|FILE", help="see mogb-diffusion recipes; or a .yaml file")
    set_argument(parser)


def set_argument(parser: argparse.ArgumentParser) -> None:
    """Changes of a configuration."""
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="such as loss.beta=0.1; may be repeated"
    )


def source_arguments(parser: argparse.ArgumentParser) -> None:
    """Which state of a run, and which configuration of a LoRA."""
    parser.add_argument("--checkpoint", metavar="NAME", help="such as checkpoint-000040; default: the newest whole one")
    parser.add_argument("--recipe", metavar="RECIPE|FILE", help="of a LoRA that carries no configuration")
    parser.add_argument("--device", metavar="NAME", help="another one than that of the configuration")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[],
        help="such as evaluation.guidance=4.5 or model.source=FOLDER; may be repeated",
    )  # fmt: skip


def reward_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of rewards."""
    parser.add_argument(
        "--option", metavar="REWARD.KEY=VALUE", action="append", default=[],
        help="such as aesthetic.weights=FILE or pickscore.device=cuda; may be repeated",
    )  # fmt: skip


def find(options: argparse.Namespace, target: str, *, recipes: bool = False) -> "Source":
    """The run, LoRA or recipe that a word means."""
    from mogb_diffusion.trained import find_source

    return find_source(
        target, checkpoint=options.checkpoint, recipe=options.recipe, assignments=options.set, device=options.device,
        recipes=recipes,
    )  # fmt: skip


def chosen_rewards(
    names: str | None, known: "Sequence[config.Reward]", assignments: Sequence[str]
) -> "tuple[config.Reward, ...]":
    """Rewards by name: those of a configuration with its options, others from the registry.

    Args:
        names: Separated by commas; None takes all that are known.
        known: Of a configuration.
        assignments: ``reward.key=value``.

    Raises:
        InputError: A name twice, or an option of a reward that was not asked for.
    """
    from mogb_diffusion.config import Reward, parse_yaml

    specs = {spec.key: spec for spec in known}
    if names is not None:
        asked = [name.strip() for name in names.split(",") if name.strip()]
        if not asked or len(set(asked)) < len(asked):
            raise InputError(f"{names!r} must name rewards, each once, separated by commas.")
        specs = {spec.key: spec for spec in (specs.get(name) or Reward(name=name) for name in asked)}
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        reward, dot, key = path.rpartition(".")
        if not equals or not dot or reward not in specs:
            raise InputError(
                f"--option {assignment}: must have the form REWARD.KEY=VALUE, for one of {', '.join(specs) or 'none'}."
            )
        spec = specs[reward]
        specs[reward] = replace(spec, options=spec.options | {key: parse_yaml(value, f"--option {path}")})
    if not specs:
        raise InputError("Name rewards, separated by commas, such as pickscore,ocr.")
    return tuple(specs.values())


def benchmark_rule(spec: "config.Reward", assignments: Sequence[str]) -> "config.Reward":
    """GenEval by the rule of the benchmark (1 or 0), whatever it was trained on, unless an option says otherwise."""
    asked = any(assignment.startswith(f"{spec.key}.metric=") for assignment in assignments)
    if spec.name != "geneval" or asked:
        return spec
    return replace(spec, options=spec.options | {"metric": "correct"})


def empty_folder(name: str) -> Path:
    """A new folder, or one with nothing in it.

    Raises:
        InputError: There is something in it.
    """
    out = Path(name)
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise InputError(f"{out} is not empty: name another --out.")
    return out


def write_json(path: Path, value: Any) -> None:
    """Writes JSON that people can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Writes a text, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


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
