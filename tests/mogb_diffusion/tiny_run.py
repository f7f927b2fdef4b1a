"""Runs on the tiny pipeline with random weights, for tests: seconds each."""

import json
import math
import threading

import torch

from mogb_diffusion.config import load_run
from mogb_diffusion.trainer import Trainer

SMALL = (
    "batch.groups=2", "batch.images_per_prompt=3", "batch.micro_batch=3", "evaluation.images=4", "policy.rank=2",
    "tracking.samples=4", "prompts.0.count=16", "prompts.1.count=16",
    "rewards=[{name: world_preference, label: preference}, {name: world_aesthetic, label: aesthetic}, "
    "{name: world_alignment, label: alignment}]",
)  # fmt: skip


def small_run(*assignments):
    return load_run("tiny_smoke", [*SMALL, *assignments])


def train(out=None, *assignments, resume=False, tell=None, epochs=2):
    trainer = Trainer(small_run(f"epochs={epochs}", *assignments), out, tell=tell)
    trainer.train(resume=resume)
    return trainer


def metrics(folder):
    """The lines of a run, without wall times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds", None)
    return rows


def same_tensors(first, second):
    """Whether two states are equal to the bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second) or (
            (first.isnan() == second.isnan()).all() and torch.equal(first.nan_to_num(), second.nan_to_num())
        )
    if isinstance(first, dict):
        return set(first) == set(second) and all(same_tensors(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same_tensors, first, second))
    if isinstance(first, float) and math.isnan(first):
        return math.isnan(second)
    return first == second


class EverySeventh:
    """Raises at every seventh call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, images, prompts):
        self.calls += 1
        if self.calls % 7 == 0:
            raise RuntimeError("the seventh call")
        return images.mean(dim=(1, 2, 3))


def undefined(images, prompts):
    """NaN for every second picture."""
    values = images.std(dim=(1, 2, 3))
    values[::2] = math.nan
    return values


class Sleepy:
    """Takes too long at its second call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, images, prompts):
        self.calls += 1
        if self.calls == 2:
            threading.Event().wait(30)
        return images[:, 0].mean(dim=(1, 2))


def broken(images, prompts):
    raise ConnectionError("no answer")
