"""Four measurements of diabetes patients, in SI units: errors whose scales differ by a factor of 10,000.

    pip install "mogb[plot]" scikit-learn
    python docs/examples/scaled_regression.py [--methods upgrad,imtl_g] [--seed 0] [--quick] [--out runs/regression]

From age, sex, body-mass index, cholesterol and triglycerides (scikit-learn's ``load_diabetes``), one small network
predicts blood pressure in pascals, the progression of the disease (a score), HDL cholesterol in mol/m³ and glucose in
kg/m³. Each loss is the mean absolute error in its own unit, so that the gradient of the blood pressure is 10,000 times
as long as that of the glucose. ``train`` is the loop to copy; what mogb changes in it is marked.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import mogb
from mogb.specs import parse_spec

UNITS = {"pressure": "Pa", "progression": "points", "HDL": "mol/m³", "glucose": "kg/m³"}
TASKS = tuple(UNITS)
METRICS = {task: f"mean absolute error, {unit}" for task, unit in UNITS.items()}
HIGHER_IS_BETTER = dict.fromkeys(TASKS, False)
STEPS, QUICK_STEPS, BATCH, LR = 200, 20, 64, 3e-3
METHOD_LR = 0.025  # of the parameters that some methods learn (uw, imtl_l)


class Patients:
    """442 patients: standardized inputs, targets in SI units, split at random."""

    def __init__(self, seed: int) -> None:
        from sklearn.datasets import load_diabetes

        table, progression = load_diabetes(return_X_y=True, scaled=False)
        age, sex, bmi, mmhg, total, _, hdl, _, triglycerides, glucose = table.T
        inputs = torch.from_numpy(np.stack([age, sex, bmi, total, triglycerides], 1)).float()
        # mmHg -> Pa; mg/dl of cholesterol (387 g/mol) -> mol/m³; mg/dl -> kg/m³
        targets = np.stack([mmhg * 133.322, progression, hdl / 38.67, glucose / 100], 1)
        self.targets = torch.from_numpy(targets).float()
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
        self.splits = dict(zip(("train", "validation", "test"), order.split((222, 100, 120)), strict=True))
        known = self.splits["train"]
        self.inputs = (inputs - inputs[known].mean(0)) / inputs[known].std(0)
        self.mean, self.std = self.targets[known].mean(0), self.targets[known].std(0)


class Regressor(nn.Module):
    """A narrow trunk that all tasks share, and one head each, which knows the mean and the spread of its target."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(3, 1) for task in TASKS})
        self.mean, self.std = mean, std

    def forward(self, inputs: Tensor, tasks: Sequence[str] = TASKS) -> dict[str, Tensor]:
        """Predictions in SI units."""
        hidden = self.trunk(inputs)
        return {
            task: self.mean[k] + self.std[k] * self.heads[task](hidden)[:, 0]
            for k, task in enumerate(TASKS)
            if task in tasks
        }


def losses_of(outputs: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
    """The mean absolute error of every task, in its own unit."""
    return {task: (output - targets[:, TASKS.index(task)]).abs().mean() for task, output in outputs.items()}


def train(
    aggregator: mogb.Aggregator, seed: int = 0, tasks: Sequence[str] = TASKS, steps: int = STEPS, lr: float = LR
) -> tuple[Regressor, list[mogb.Report]]:
    """Trains a fresh network on some of the tasks, and returns it with the report of every step."""
    torch.manual_seed(seed)
    data, generator = Patients(seed), torch.Generator().manual_seed(seed)
    model, pool = Regressor(data.mean, data.std), data.splits["train"]
    balancer = mogb.Balancer(aggregator)  # new: the trunk is balanced, the heads get their plain gradients
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    if learned := aggregator.parameters():  # new: a few methods learn their weights (uw, imtl_l)
        optimizer.add_param_group({"params": learned, "lr": METHOD_LR})
    reports = []
    for step in range(steps):
        batch = pool[torch.randint(len(pool), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        losses = losses_of(model(data.inputs[batch], tasks), data.targets[batch])
        reports.append(balancer.backward(losses))  # new: in place of sum(losses.values()).backward()
        optimizer.step()
        if "update" in aggregator.phases:  # new: a method of two phases (famo) looks at what the step did
            with torch.no_grad():
                aggregator.update(losses_of(model(data.inputs[batch], tasks), data.targets[batch]))
        if step % 25 == 24:
            aggregator.end_epoch()  # new: dwa and go4align compare epochs
    return model, reports


@torch.no_grad()
def evaluate(model: Regressor, seed: int = 0, split: str = "test", tasks: Sequence[str] = TASKS) -> dict[str, float]:
    """The mean absolute error of every task for unseen patients."""
    data = Patients(seed)
    rows = data.splits[split]
    return {task: loss.item() for task, loss in losses_of(model(data.inputs[rows], tasks), data.targets[rows]).items()}


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains with every method, and alone on every task, prints a table and draws a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="weighted_sum,mgda,imtl_g,upgrad,nash_mtl", help="see `mogb list`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    parser.add_argument("--out", type=Path, default=Path("runs/scaled_regression"))
    options = parser.parse_args(arguments)
    steps = QUICK_STEPS if options.quick else STEPS
    alone = {}
    for task in TASKS:
        model, _ = train(mogb.make("weighted_sum"), options.seed, (task,), steps)
        alone |= evaluate(model, options.seed, tasks=(task,))
    found = {"each task alone": alone}
    for method in options.methods.split(","):
        model, _ = train(parse_spec(method).build(options.seed), options.seed, steps=steps)
        found[method] = evaluate(model, options.seed)
    print_table(found)
    draw(found, options.seed, options.out)
    return found


def print_table(found: dict[str, dict[str, float]]) -> None:
    """One row per method: mean absolute errors of unseen patients."""
    print(" " * 18 + "".join(f"{f'{task} ({unit})':>24}" for task, unit in UNITS.items()))
    for method, metrics in found.items():
        print(f"{method:18}" + "".join(f"{metrics[task]:24.4g}" for task in TASKS))


def draw(found: dict[str, dict[str, float]], seed: int, folder: Path) -> None:
    """Writes ``scaled_regression.png``: every error over that of a network that predicts the mean for everybody."""
    from matplotlib.figure import Figure

    data = Patients(seed)
    rows = data.splits["test"]
    guess = (data.targets[rows] - data.mean).abs().mean(0).tolist()
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(found)
    for i, (method, metrics) in enumerate(found.items()):
        x = np.arange(len(TASKS)) + (i - (len(found) - 1) / 2) * width
        heights = [metrics[task] / guess[k] for k, task in enumerate(TASKS)]
        axis.bar(x, heights, width, label=method, color="#666666" if i == 0 else f"C{i - 1}")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(
        range(len(TASKS)), [f"{task}\nspread {data.std[k]:.3g} {UNITS[task]}" for k, task in enumerate(TASKS)]
    )
    axis.set_ylabel("mean absolute error / that of the mean")
    axis.set_title(f"Unseen patients, seed {seed}: 1 is what predicting the mean for everybody gives", fontsize=10)
    figure.legend(fontsize=8, ncols=len(found), loc="outside lower center", frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "scaled_regression.png", dpi=120)
    print(f"Picture: {folder / 'scaled_regression.png'}")


if __name__ == "__main__":
    main()
