"""A method is a file and its test: the example of the documentation, put into a copy of the package, is everywhere."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TEST = """
import torch

import mogb


def test_the_longest_gradient_is_followed():
    direction = mogb.make("longest")(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
    assert direction.tolist() == [0.0, 2.0]
"""


def example():
    """The file of docs/adding-a-method.md, registered, without what follows it."""
    page = (ROOT / "docs" / "adding-a-method.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1].split("\n\n\nimport torch\n")[0]
    found = re.sub(
        r"class Longest\(GramianAggregator\):  # .*", 'class Longest(GramianAggregator, name="longest"):', code
    )
    assert found != code
    return found + "\n"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("newcomer")
    for name in ("mogb", "tests", "docs", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "mogb" / "aggregators" / "longest.py").write_text(example())
    (folder / "tests" / "mogb" / "aggregators" / "test_longest.py").write_text(TEST)
    return folder


def run(folder, *arguments):
    environment = dict(os.environ, PYTHONPATH=str(folder), OMP_NUM_THREADS="1")
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


def test_the_commands_know_it(copy):
    script = (
        "from mogb.cli import main; import mogb; assert 'newcomer' in mogb.__file__; "
        "main(['list', '--json']); "
        "assert main(['compare', '--methods', 'longest,smoothed(longest)', '--problems', 'quadratic_convex', "
        "'--steps', '3', '--workers', '0', '--no-figures', '--out', 'out']) == 0; "
        "assert main(['recommend', '--all']) == 0; assert main(['show', 'longest']) == 0"
    )
    done = run(copy, "-c", script)
    assert done.returncode == 0, done.stderr
    listed, end = json.JSONDecoder().raw_decode(done.stdout)
    (entry,) = [entry for entry in listed if entry["name"] == "longest"]
    assert entry["reads"] == "gramian"
    assert entry["promises"] == ["homogeneous", "simplex weights"]
    assert re.search(r"longest +not measured", done.stdout[end:])
    assert "smoothed(longest)" in (copy / "out" / "summary.csv").read_text()


@pytest.mark.slow
def test_its_own_test_and_every_test_of_the_registry_pass(copy):
    tests = [
        "tests/mogb/aggregators/test_longest.py", "tests/mogb/test_contract.py", "tests/test_architecture.py",
        "tests/mogb/test_recommend.py", "tests/mogb/test_methods_compared.py", "tests/mogb/test_front.py",
    ]  # fmt: skip
    chosen = "longest or architecture or recommend or compared or swept"
    done = run(copy, "-m", "pytest", "-p", "no:cacheprovider", *tests, "-k", chosen)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed > 60
