"""The loops of Accelerate and Lightning, balanced, end like a plain loop with the same data."""

import functools
import importlib
import json
import os
import pathlib
import sys

import pytest
import torch
from processes import launch

import mogb

FOLDER = pathlib.Path(__file__).parents[1] / "docs" / "examples"
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # theirs, not ours
    pytest.mark.usefixtures("unchecked"),
]


def load(name, package):
    pytest.importorskip(package, reason=f"the example needs {package}: pip install {package}")
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.reload(importlib.import_module(name))
    finally:
        sys.path.remove(str(FOLDER))


def in_order(module):
    """Frameworks draw their own random numbers to shuffle: take the samples as they come."""
    module.make_loader = functools.partial(module.make_loader, shuffle=False)


def plain_loop(module, epochs, batch_size=32, schedule=0):
    """The same training without a framework, with nothing but the README's call."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 16)
    aggregator = mogb.make("upgrad")
    for _ in range(epochs):
        for inputs, targets in module.make_loader(batch_size):
            optimizer.zero_grad()
            mogb.backward((net(inputs) - targets).square().mean(dim=0), net, aggregator)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            for _ in range(schedule):
                cosine.step()
    inputs, targets = module.make_data().tensors
    with torch.no_grad():
        errors = ((net(inputs) - targets) / module.SCALES).square().mean(dim=0)
    return dict(zip(module.TASKS, errors.tolist(), strict=True))


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_accelerate(tmp_path, capsys):
    module = load("accelerate_loop", "accelerate")
    in_order(module)
    found = module.main(["--epochs", "2", "--log", str(tmp_path / "m.jsonl")])
    assert found == pytest.approx(plain_loop(module, 2, schedule=1), rel=1e-4)
    assert steps_of(tmp_path / "m.jsonl") == list(range(32))
    assert "stationarity" in capsys.readouterr().out


def test_lightning(tmp_path, capsys):
    module = load("lightning_loop", "lightning")
    in_order(module)
    found = module.main(["--epochs", "2", "--log", str(tmp_path / "m.jsonl")])
    assert found == pytest.approx(plain_loop(module, 2), rel=1e-4)
    assert steps_of(tmp_path / "m.jsonl") == list(range(32))
    assert "stationarity" in capsys.readouterr().out


def test_lightning_checkpoints_hold_the_balancer(tmp_path):
    module = load("lightning_loop", "lightning")
    loader = torch.utils.data.DataLoader(module.make_data(64), batch_size=32)
    regression = module.Regression("marble")
    trainer = module.make_trainer(max_epochs=1)
    trainer.fit(regression, loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = module.Regression("marble")
    module.make_trainer(max_epochs=2).fit(again, loader, ckpt_path=str(tmp_path / "last.ckpt"))
    straight = module.Regression("marble")
    module.make_trainer(max_epochs=2).fit(straight, loader)
    assert again.balancer.step == straight.balancer.step == 4
    assert [record["step"] for record in again.monitor.records()] == [2, 3]
    for ours, expected in zip(again.net.parameters(), straight.net.parameters(), strict=True):
        assert torch.equal(ours, expected)


def accelerate_on_ranks(rank, world, folder):
    os.environ.update(ACCELERATE_USE_CPU="true", LOCAL_RANK=str(rank))
    sys.path.insert(0, str(FOLDER))
    module = importlib.import_module("accelerate_loop")
    in_order(module)
    found = module.main(["--epochs", "2", "--log", str(folder / "m.jsonl")])
    steps = steps_of(folder / "m.jsonl") if rank == 0 else []
    torch.save((found, steps), folder / f"{rank}.pt")


@pytest.mark.slow
def test_accelerate_on_two_processes():
    module = load("accelerate_loop", "accelerate")
    in_order(module)
    (first, steps), (second, _) = launch(2, accelerate_on_ranks)
    assert first == second
    assert steps == list(range(16))  # each step takes a batch of each process
    # Together they take batches of 64, and Accelerate steps the schedule once for each process.
    assert first == pytest.approx(plain_loop(module, 2, batch_size=64, schedule=2), rel=1e-4)
