"""A loop of Accelerate, balanced: one line differs from the loop that you have.

Three outputs of one network are learned, whose scales differ by a factor of 1000. In place of
``accelerator.backward(loss)`` stands ``balancer.backward(losses)``: devices, wrapping, clipping, schedules and
checkpoints stay Accelerate's.

    python docs/examples/accelerate_loop.py
    accelerate launch --cpu --num_processes 2 docs/examples/accelerate_loop.py
"""

import argparse
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mogb

TASKS = ("small", "medium", "large")
SCALES = torch.tensor([0.03, 1.0, 30.0])


def make_data(samples: int = 512) -> TensorDataset:
    """Inputs, and three smooth functions of them at three scales."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 6, generator=generator)
    mixing = torch.randn(6, 3, generator=generator)
    return TensorDataset(inputs, torch.tanh(inputs @ mixing) * SCALES)


def make_loader(batch_size: int = 32, *, shuffle: bool = True) -> DataLoader:
    """Batches of it."""
    generator = torch.Generator().manual_seed(1)
    return DataLoader(make_data(), batch_size=batch_size, shuffle=shuffle, generator=generator)


def make_model() -> nn.Module:
    """A small network with three outputs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3))


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Trains, and returns the mean squared errors in units of each task's scale."""
    parser = argparse.ArgumentParser(description="A balanced training loop of Accelerate.")
    parser.add_argument("--method", default="upgrad", help="of mogb list")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--log", help="where to write a line for every step")
    args = parser.parse_args(arguments)

    accelerator = Accelerator(cpu=True)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * 16)
    loader = make_loader()
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    balancer = mogb.Balancer(mogb.make(args.method), model)
    monitor = mogb.Monitor(args.log, names=TASKS)
    for _ in range(args.epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            losses = (model(inputs) - targets).square().mean(dim=0)  # [3]
            report = balancer.backward(losses, scaler=accelerator.scaler)  # was: accelerator.backward(losses.mean())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            monitor.log(report)
    accelerator.print(monitor)

    inputs, targets = make_data().tensors
    with torch.no_grad():
        errors = ((accelerator.unwrap_model(model)(inputs) - targets) / SCALES).square().mean(dim=0)
    accelerator.print(
        "relative errors:", ", ".join(f"{t} {e:.3g}" for t, e in zip(TASKS, errors.tolist(), strict=True))
    )
    return dict(zip(TASKS, errors.tolist(), strict=True))


if __name__ == "__main__":
    main()
