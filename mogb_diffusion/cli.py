"""The command line: the parser, what goes wrong, and exit statuses. The commands are in ``mogb_diffusion.commands``.

Exit status: 0 done, 1 the work failed (a reward, the disk), 2 bad arguments, configuration or input, with one line on
stderr that says what to do, 130 interrupted.
"""

import argparse
import os
import sys
import textwrap
import warnings
from collections.abc import Sequence
from typing import NoReturn

from mogb_diffusion.commands import NAMES, command
from mogb_diffusion.errors import CheckpointError, InputError, RewardFailure

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
        return command(options.command).run(options)
    except InputError as error:
        return _say(f"{PROGRAM} {options.command}: {error}", 2)
    except (RewardFailure, CheckpointError) as error:
        return _say(f"{PROGRAM} {options.command}: {error}", 1)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _say(f"{PROGRAM} {options.command}: {error}", 1)
    except KeyboardInterrupt:
        return _say(
            f"{PROGRAM} {options.command}: interrupted. The last checkpoint is kept: add --resume to go on.", 130
        )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Multi-reward reinforcement learning of diffusion models.")
    parsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in NAMES:
        module = command(name)
        sub = parsers.add_parser(
            name, help=module.SUMMARY, description=module.SUMMARY[0].upper() + module.SUMMARY[1:] + ".",
            epilog=f"examples:\n{textwrap.indent(module.EXAMPLE.strip(), '  ')}\n",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.set_defaults(command=name)
        module.arguments(sub)
    return parser


def _quieten() -> None:
    """Notes of libraries about themselves, which no user can act on."""
    import logging

    for name in ("transformers", "diffusers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module=r"(transformers|diffusers|huggingface_hub)\b")


def _say(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status
