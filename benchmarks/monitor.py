"""What a :class:`mogb.Monitor` costs, as a share of a training step on the CPU.

``python benchmarks/monitor.py`` trains a transformer encoder of 0.8 million parameters with K objectives on one
core, and measures the CPU time of the whole step (forward, balanced backward, AdamW) and of ``monitor.log`` with it.
"""

import argparse
import pathlib
import tempfile
import time
from typing import Any

import numpy as np
import torch
from _common import provenance, table, write
from torch import nn

import mogb

SEED = 0


def make_step(size: int) -> Any:
    """A step of a small transformer encoder on sequences of 64, with K regression targets; returns its report."""
    torch.manual_seed(SEED)
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(128, size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    balancer = mogb.Balancer(mogb.make("upgrad"), model)
    inputs, targets = torch.randn(8, 64, 128), torch.randn(8, 64, size)

    def step() -> Any:
        optimizer.zero_grad()
        report = balancer.backward((model(inputs) - targets).square().mean(dim=(0, 1)))
        optimizer.step()
        return report

    return step


def cpu(call: Any) -> tuple[float, Any]:
    """CPU seconds of this process, and the answer: other programs on the machine do not count."""
    start = time.process_time()
    answer = call()
    return time.process_time() - start, answer


def measure(size: int, steps: int, folder: pathlib.Path) -> dict[str, Any]:
    """Medians over steps of the step and of the logging, in turn."""
    step = make_step(size)
    monitors = {"jsonl": mogb.Monitor(folder / f"{size}.jsonl")}
    try:
        monitors["jsonl and TensorBoard"] = mogb.Monitor(folder / f"b{size}.jsonl", tensorboard=folder / f"board{size}")
    except ImportError:
        print("TensorBoard is not installed: not measured")
    times: dict[str, list[float]] = {"step": [], **{name: [] for name in monitors}}
    step()
    for _ in range(steps):
        seconds, report = cpu(step)
        times["step"].append(seconds)
        for name, monitor in monitors.items():
            times[name].append(cpu(lambda monitor=monitor, report=report: monitor.log(report))[0])
    medians = {name: float(np.median(values)) for name, values in times.items()}
    shares = {name: medians[name] / medians["step"] for name in monitors}
    return {"K": size, "seconds": medians, "shares": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        found = [measure(size, args.steps, pathlib.Path(name)) for size in (2, 5, 16)]
    rows = [
        [str(f["K"]), f"{f['seconds']['step'] * 1e3:.1f}"]
        + [text for n in f["shares"] for text in (f"{f['seconds'][n] * 1e3:.2f}", f"{100 * f['shares'][n]:.2f} %")]
        for f in found
    ]
    header = ["K", "step, ms"] + [text for n in found[0]["shares"] for text in (f"{n}, ms", "share")]
    text = "CPU time, medians; a transformer encoder of 4 layers, 512 tokens a step, one core.\n\n" + table(
        header, rows
    )
    write("monitor", {"provenance": provenance(SEED), "results": found}, text)


if __name__ == "__main__":
    main()
