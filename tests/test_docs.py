"""Every Python block of the README and the docs runs, and every docstring example is true."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import pytest
import torch

import mogb

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```python(?P<flags>[^\n]*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def blocks():
    for page in PAGES:
        for match in BLOCK.finditer(page.read_text()):
            line = page.read_text()[: match.start()].count("\n") + 2
            yield pytest.param(page, line, match["code"], id=f"{page.relative_to(ROOT)}:{line}")


@pytest.mark.parametrize(("page", "line", "code"), list(blocks()))
def test_the_block_runs(page, line, code, tmp_path, monkeypatch, unchecked):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), {"__name__": "__main__"})


def test_the_readme_shows_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text
    assert "```python" in text


MODULES = sorted(
    module.name for module in pkgutil.walk_packages(mogb.__path__, "mogb.") if "__main__" not in module.name
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_are_true(name, unchecked):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
