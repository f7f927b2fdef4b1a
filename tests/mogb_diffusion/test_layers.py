"""Who may import whom in mogb_diffusion. Everything points downwards, and heavy packages are imported where needed."""

import ast
import doctest
import importlib
import pathlib

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]

# Lowest first: a module imports only modules of earlier lines, and its own.
LINES = (
    ("errors", "checks"),
    ("seeds",),
    ("flow", "policy_schedule"),
    ("advantages", "sampling", "nft"),
    ("prompts", "config"),
    ("rewards.geneval", "rewards.ocr", "rewards", "world.vocabulary", "world"),
    ("world.captions", "world.drawing"),
    ("rewards.world", "models.tiny", "models"),
    ("recipes", "generate", "serving", "headers"),
    ("datasets", "clock", "distributed", "sharding", "models.sd3", "policy", "scoring", "checkpoint", "tracking",
     "comparison", "dry_run", "hub", "memory", "pictures", "readiness"),
    ("rollouts", "signals", "results", "trained"),
    ("evaluation", "balancing", "pretrain", "cards", "peers"),
    ("script",),
    ("trainer", "report"),
    ("report_runs",),
    ("commands",),
    ("cli",),
    ("__main__",),
)  # fmt: skip
# What is not installed with mogb itself may be needed only once a pipeline is.
HEAVY = {
    "diffusers": ("models.tiny", "pretrain"), "transformers": ("models.tiny", "pretrain"),
    "tokenizers": ("models.tiny",), "peft": (),
    "safetensors": (), "yaml": (), "PIL": (), "matplotlib": (), "wandb": (), "tensorboard": (),
}  # fmt: skip
PURE = ("flow", "nft", "advantages", "sampling", "policy_schedule", "seeds")  # torch and numpy alone


def level(name):
    fits = [
        (len(entry), number)
        for number, line in enumerate(LINES)
        for entry in line
        if name == entry or name.startswith(f"{entry}.")
    ]
    assert fits, f"{name} is in no line of the table: add it"
    return max(fits)[1]


def modules():
    for path in sorted((ROOT / "mogb_diffusion").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "mogb_diffusion").with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            yield pytest.param(name, path, id=name)


def imports(path):
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body} | {
        id(node) for block in tree.body if isinstance(block, ast.Try) for node in block.body
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module
            if base in ("mogb_diffusion", "mogb_diffusion.rewards", "mogb_diffusion.models"):
                folder = ROOT / base.replace(".", "/")
                for alias in node.names:
                    inner = (folder / f"{alias.name}.py").exists() or (folder / alias.name).is_dir()
                    yield (f"{base}.{alias.name}" if inner else base), id(node) in top
            else:
                yield base, id(node) in top


@pytest.mark.parametrize(("name", "path"), list(modules()))
def test_imports_point_downwards(name, path):
    for imported, at_top in imports(path):
        root, _, inner = imported.partition(".")
        if root == "mogb_diffusion":
            if inner and at_top:  # inside a function an import is a choice that is made when it runs
                assert level(inner) <= level(name), f"{name} may not import {imported}"
        elif root in HEAVY:
            assert not at_top or name in HEAVY[root], f"{name} must import {root} inside the function that needs it"
        elif name in PURE:
            assert root in ("mogb", "torch", "numpy", "jaxtyping", "math", "typing", "collections", "itertools",
                            "contextlib", "hashlib"), f"{name} may not import {root}"  # fmt: skip


@pytest.mark.parametrize("name", ["seeds", "prompts", "advantages", "policy_schedule"])
def test_docstring_examples_are_true(name, unchecked):
    module = importlib.import_module(f"mogb_diffusion.{name}")
    failed, tried = doctest.testmod(module, extraglobs={"torch": torch})
    assert (failed, tried > 0) == (0, True)
