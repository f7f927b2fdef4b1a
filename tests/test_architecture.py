"""Who may import whom. This table is the one list of allowed arrows; everything points downwards."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Each layer names the layers of its own package that it may import, and the outside packages.
LAYERS = {
    "mogb.errors": ((), ()),
    "mogb.jacobian": ((), ("torch", "numpy", "scipy", "jaxtyping")),
    "mogb.options": (("mogb.errors",), ("torch", "numpy")),
    "mogb.learned": ((), ("torch", "numpy", "jaxtyping")),
    "mogb.base": (("mogb.errors", "mogb.jacobian", "mogb.learned", "mogb.options"), ("torch", "numpy", "jaxtyping")),
    "mogb.solvers": (("mogb.errors",), ("torch", "numpy", "scipy", "jaxtyping", "quadprog")),
    "mogb.wrappers": (("mogb.base", "mogb.errors", "mogb.jacobian"), ("torch", "numpy", "jaxtyping")),
    "mogb.aggregators": (
        ("mogb.base", "mogb.errors", "mogb.jacobian", "mogb.learned", "mogb.options", "mogb.solvers", "mogb.wrappers"),
        ("torch", "numpy", "scipy", "jaxtyping"),
    ),
    "mogb.engines": (("mogb.base", "mogb.errors", "mogb.jacobian"), ("torch", "numpy", "jaxtyping")),
    "mogb.noise": (("mogb.base", "mogb.engines", "mogb.jacobian"), ("torch", "numpy", "jaxtyping")),
    "mogb.problems": ((), ("torch", "numpy", "jaxtyping")),
    "mogb.metrics": (("mogb.solvers",), ("torch", "numpy", "scipy", "jaxtyping", "moocore")),
    "mogb.monitor": (
        ("mogb.engines", "mogb.solvers", "mogb.plotting"), ("torch", "numpy", "jaxtyping", "wandb"),
    ),
    "mogb.specs": (("mogb.base", "mogb.aggregators", "mogb.wrappers"), ()),
    "mogb.compare": (
        (
            "mogb", "mogb.base", "mogb.errors", "mogb.jacobian", "mogb.aggregators", "mogb.wrappers", "mogb.specs",
            "mogb.problems", "mogb.metrics",
        ),
        ("torch", "numpy", "scipy", "jaxtyping", "rich"),
    ),
    "mogb.catalog": (
        ("mogb.base", "mogb.aggregators", "mogb.wrappers", "mogb.problems", "mogb.compare"), (),
    ),
    "mogb.front": (
        (
            "mogb.base", "mogb.aggregators", "mogb.wrappers", "mogb.specs", "mogb.problems", "mogb.metrics",
            "mogb.compare", "mogb.plotting",
        ),
        ("torch", "numpy", "jaxtyping"),
    ),
    "mogb.recommend": (("mogb.base", "mogb.aggregators"), ("torch",)),
    "mogb.plotting": (
        ("mogb.compare", "mogb.front", "mogb.problems", "mogb.metrics"),
        ("torch", "numpy", "scipy", "jaxtyping", "matplotlib"),
    ),
    "mogb.report": (("mogb", "mogb.compare", "mogb.plotting", "mogb.aggregators", "mogb.specs"), ("numpy",)),
    "mogb.cli": (
        (
            "mogb", "mogb.base", "mogb.catalog", "mogb.compare", "mogb.front", "mogb.recommend", "mogb.report",
            "mogb.aggregators", "mogb.specs", "mogb.problems", "mogb.wrappers",
        ),
        ("rich",),
    ),
    "mogb.__main__": (("mogb.cli",), ()),
    "mogb.__init__": (
        ("mogb.monitor", "mogb.base", "mogb.errors", "mogb.aggregators", "mogb.engines", "mogb.solvers"),
        (),
    ),
}  # fmt: skip

# Heavy or optional packages are imported inside the function that needs them.
LAZY = {"wandb", "matplotlib", "moocore", "quadprog", "torchjd"}
STANDARD = set(__import__("sys").stdlib_module_names)


def modules(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name, path


def layer_of(name):
    matching = [layer for layer in LAYERS if name == layer or name.startswith(layer + ".")]
    return max(matching, key=len) if matching else None


def imports(path, name):
    """(imported module, whether it is at the top level of the file)."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for block in tree.body:
        if isinstance(block, ast.If) and ast.unparse(block.test) != "TYPE_CHECKING":  # that is never run
            top |= {id(node) for node in block.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} uses a relative import"
            yield node.module, id(node) in top


@pytest.mark.parametrize(
    ("name", "path"), list(modules("mogb")), ids=lambda value: value if isinstance(value, str) else ""
)
def test_imports_point_downwards(name, path):
    layer = layer_of(name)
    assert layer is not None, f"{name} is in no layer of the table: add it"
    inside, outside = LAYERS[layer]
    for imported, at_top in imports(path, name):
        root = imported.split(".")[0]
        if root == "mogb":
            allowed = any(
                imported == other or imported.startswith(other + ".") for other in (*inside, layer) if other != "mogb"
            )
            allowed = allowed or (imported == "mogb" and "mogb" in inside)
            assert allowed, f"{name} may not import {imported}"
        elif root not in STANDARD:
            assert root in outside, f"{name} may not import {root}"
            assert not (root in LAZY and at_top), f"{name} must import {root} inside the function that needs it"


def test_mogb_stands_alone():
    banned = {"mogb_diffusion", "diffusers", "peft", "transformers", "accelerate"}
    for name, path in modules("mogb"):
        found = {imported.split(".")[0] for imported, _ in imports(path, name)} & banned
        assert not found, f"{name} imports {found}"


def test_every_aggregator_file_holds_the_method_of_its_name():
    from mogb.aggregators import get, registered

    for name, _ in modules("mogb/aggregators"):
        stem = name.rsplit(".", 1)[1]
        if not stem.startswith("_"):
            assert stem in registered(), f"mogb/aggregators/{stem}.py registers no method {stem!r}"
            assert get(stem).__module__ == f"mogb.aggregators.{stem}"


def test_every_method_has_a_test_file():
    for name, _ in modules("mogb/aggregators"):
        stem = name.rsplit(".", 1)[1]
        if not stem.startswith("_"):
            assert (ROOT / "tests/mogb/aggregators" / f"test_{stem}.py").exists(), f"no test for {stem}"
