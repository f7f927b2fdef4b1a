"""The command lines of the pages about commands: some are run, all are understood."""

import pathlib
import re
import shlex

import pytest

from mogb_diffusion.cli import _parser, main
from mogb_diffusion.commands import NAMES, command

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGES = ("commands.md", "launching.md")
BLOCK = re.compile(r"(?P<mark><!-- executed -->\n)?^```(?:sh|bash)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def lines(page, executed=False):
    """The calls of mogb-diffusion, as lists of words."""
    for match in BLOCK.finditer((DOCS / page).read_text()):
        if executed and not match["mark"]:
            continue
        for line in match["code"].replace("\\\n", " ").splitlines():
            for start in ("mogb-diffusion ", "-m mogb_diffusion "):
                if start in line:
                    yield shlex.split(line.partition(start)[2].rstrip("'"), comments=True)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_is_understood(page):
    found = list(lines(page))
    assert len(found) >= 4
    for words in found:
        assert _parser().parse_args(words).command == words[0]


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_help_are_understood(name):
    for line in command(name).EXAMPLE.strip().splitlines():
        for start in ("mogb-diffusion ", "-m mogb_diffusion "):
            if start in line:  # two spaces begin a remark
                words = shlex.split(line.partition(start)[2].split("   ")[0].split(" > ")[0])
                assert _parser().parse_args(words).command == words[0]


def test_every_command_has_its_section():
    text = (DOCS / "commands.md").read_text()
    headings = " ".join(re.findall(r"^## (.*)$", text, re.MULTILINE))
    assert [name for name in NAMES if name not in headings] == []


@pytest.mark.slow
def test_what_the_page_runs_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done = 0
    for words in lines("commands.md", executed=True):
        assert main(words) == 0, f"{' '.join(words)}\n{capsys.readouterr().err}"
        done += 1
    assert done >= 18
    made = {path.name for path in tmp_path.iterdir()}
    assert {"runs", "table.md", "table.csv", "scores.json", "squares.png", "both.png", "lora", "comparison"} <= made
    assert (tmp_path / "runs" / "a" / "evaluation.md").exists()
    assert (tmp_path / "comparison" / "comparison.html").exists()
    assert "| base with guidance |" in (tmp_path / "comparison" / "comparison.md").read_text()
