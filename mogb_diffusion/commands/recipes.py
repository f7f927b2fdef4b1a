"""``mogb-diffusion recipes``."""

import argparse
import json

SUMMARY = "the recipes, or one of them in full as YAML"
EXAMPLE = "mogb-diffusion recipes tiny > mine.yaml"


def arguments(parser: argparse.ArgumentParser) -> None:
    """All, or one."""
    parser.add_argument("recipe", metavar="NAME", nargs="?", help="print this one")
    parser.add_argument("--json", action="store_true", help="one JSON array")


def run(options: argparse.Namespace) -> int:
    """Prints them."""
    from mogb_diffusion.config import to_plain, to_yaml
    from mogb_diffusion.recipes import RECIPES, recipe, summary

    if options.recipe is not None:
        found = recipe(options.recipe)
        print(
            json.dumps(to_plain(found), indent=2) if options.json else to_yaml(found), end="\n" if options.json else ""
        )
        return 0
    entries = [{"name": name, "summary": summary(name)} for name in RECIPES]
    if options.json:
        print(json.dumps(entries, indent=2))
    else:
        for entry in entries:
            print(f"{entry['name']:26} {entry['summary']}")
    return 0
