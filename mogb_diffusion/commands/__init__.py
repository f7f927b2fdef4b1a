"""The commands of ``mogb-diffusion``, one module each; :data:`NAMES` is the one list of them.

A module ``commands/<name>.py`` (an underscore where the name has a hyphen) has:

- ``SUMMARY``: one phrase, for the list of commands; the first sentence of its help.
- ``EXAMPLE``: one or more lines, each a whole command line.
- ``arguments(parser)``: adds its arguments to an ``argparse`` parser.
- ``run(options) -> int``: does the work and returns the exit status. It prints results to stdout, and raises
  :class:`~mogb_diffusion.errors.InputError` for what the user can mend (status 2).

All of them are imported for ``--help``: torch and everything that needs it is imported inside functions.
"""

import argparse
import importlib
from typing import Protocol, cast

NAMES = (
    "train",
    "evaluate",
    "sample",
    "score",
    "export",
    "import-peer",
    "report",
    "recipes",
    "doctor",
    "prompts",
    "serve-reward",
)


class Command(Protocol):
    """What the module of a command has."""

    SUMMARY: str
    EXAMPLE: str

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the arguments of the command."""

    def run(self, options: argparse.Namespace) -> int:
        """Does the work; returns the exit status."""


def command(name: str) -> Command:
    """The module of a command."""
    return cast(Command, importlib.import_module(f"mogb_diffusion.commands.{name.replace('-', '_')}"))
