"""Two overlaid digits, three tasks, one small CNN: the MultiMNIST construction on scikit-learn's ``load_digits``.

    pip install "mogb[plot]" scikit-learn
    python docs/examples/multi_digits.py [--methods upgrad,nash_mtl] [--seed 0] [--quick] [--out runs/multi_digits]

One digit is drawn at the top left, another one over it at the bottom right. The tasks: the class of each digit
(cross-entropy), and their sum (squared error). The losses have different units and the tasks compete for one trunk.
``train`` is the loop to copy; what mogb changes in it is marked.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mogb
from mogb.specs import parse_spec

TASKS = ("top left", "bottom right", "sum")
METRICS = {"top left": "accuracy, %", "bottom right": "accuracy, %", "sum": "mean absolute error"}
HIGHER_IS_BETTER = {"top left": True, "bottom right": True, "sum": False}
STEPS, QUICK_STEPS, BATCH, LR = 200, 20, 64, 1e-2
METHOD_LR = 0.025  # of the parameters that some methods learn (uw, imtl_l)
SHIFT = 3  # pixels between the two digits, of 8
PAIRS = 2000  # to evaluate on


class TwoDigits(nn.Module):
    """A trunk that all tasks share, and one head each."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 3 * 3, 64), nn.ReLU(),
        )  # fmt: skip
        sizes = {"top left": 10, "bottom right": 10, "sum": 1}
        self.heads = nn.ModuleDict({task: nn.Linear(64, size) for task, size in sizes.items()})
        nn.init.constant_(self.heads["sum"].bias, 9.0)  # the mean of two digits' sum

    def forward(self, images: Tensor, tasks: Sequence[str] = TASKS) -> dict[str, Tensor]:
        """The outputs of some of the tasks."""
        hidden = self.trunk(images)
        return {task: self.heads[task](hidden) for task in tasks}


class Digits:
    """Single digits, split before they are paired, so that no digit of the test set was ever trained on."""

    def __init__(self, seed: int) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        self.images = torch.from_numpy(images).float().reshape(-1, 8, 8) / 16
        self.labels = torch.from_numpy(labels)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        self.splits = dict(zip(("train", "validation", "test"), order.split((1000, 300, 497)), strict=True))

    def draw(self, split: str, count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Random pairs of one split: images ``[count, 1, 11, 11]`` and the targets of the tasks."""
        pool = self.splits[split]
        first, second = pool[torch.randint(len(pool), (2, count), generator=generator)]
        canvas = torch.zeros(2, count, 8 + SHIFT, 8 + SHIFT)
        canvas[0, :, :8, :8] = self.images[first]
        canvas[1, :, SHIFT:, SHIFT:] = self.images[second]
        a, b = self.labels[first], self.labels[second]
        return canvas.amax(0)[:, None], {"top left": a, "bottom right": b, "sum": (a + b).float()[:, None]}


def losses_of(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """One loss per task."""
    kinds = {"top left": F.cross_entropy, "bottom right": F.cross_entropy, "sum": F.mse_loss}
    return {task: kinds[task](output, targets[task]) for task, output in outputs.items()}


def train(
    aggregator: mogb.Aggregator, seed: int = 0, tasks: Sequence[str] = TASKS, steps: int = STEPS, lr: float = LR
) -> tuple[TwoDigits, list[mogb.Report]]:
    """Trains a fresh network on some of the tasks, and returns it with the report of every step."""
    torch.manual_seed(seed)
    data, generator, model = Digits(seed), torch.Generator().manual_seed(seed), TwoDigits()
    balancer = mogb.Balancer(aggregator)  # new: the trunk is balanced, the heads get their plain gradients
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    if learned := aggregator.parameters():  # new: a few methods learn their weights (uw, imtl_l)
        optimizer.add_param_group({"params": learned, "lr": METHOD_LR})
    reports = []
    for step in range(steps):
        images, targets = data.draw("train", BATCH, generator)
        optimizer.zero_grad()
        losses = losses_of(model(images, tasks), targets)
        reports.append(balancer.backward(losses))  # new: in place of sum(losses.values()).backward()
        optimizer.step()
        if "update" in aggregator.phases:  # new: a method of two phases (famo) looks at what the step did
            with torch.no_grad():
                aggregator.update(losses_of(model(images, tasks), targets))
        if step % 25 == 24:
            aggregator.end_epoch()  # new: dwa and go4align compare epochs
    return model, reports


@torch.no_grad()
def evaluate(model: TwoDigits, seed: int = 0, split: str = "test", tasks: Sequence[str] = TASKS) -> dict[str, float]:
    """The metric of every task on pairs of unseen digits."""
    images, targets = Digits(seed).draw(split, PAIRS, torch.Generator().manual_seed(seed + 1_000_000))
    return {
        task: 100 * (output.argmax(1) == targets[task]).double().mean().item()
        if HIGHER_IS_BETTER[task]
        else (output - targets[task]).abs().double().mean().item()
        for task, output in model(images, tasks).items()
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains with every method, and alone on every task, prints a table and draws a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="weighted_sum,mgda,upgrad,nash_mtl", help="see `mogb list`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    parser.add_argument("--out", type=Path, default=Path("runs/multi_digits"))
    options = parser.parse_args(arguments)
    steps = QUICK_STEPS if options.quick else STEPS
    alone = {}
    for task in TASKS:
        model, _ = train(mogb.make("weighted_sum"), options.seed, (task,), steps)
        alone |= evaluate(model, options.seed, tasks=(task,))
    found, networks = {"each task alone": alone}, {}
    for method in options.methods.split(","):
        networks[method], _ = train(parse_spec(method).build(options.seed), options.seed, steps=steps)
        found[method] = evaluate(networks[method], options.seed)
    print_table(found)
    draw(found, networks, options.seed, options.out)
    return found


def print_table(found: dict[str, dict[str, float]]) -> None:
    """One row per method."""
    print(" " * 18 + "".join(f"{f'{task} ({METRICS[task]})':>34}" for task in TASKS))
    for method, metrics in found.items():
        print(f"{method:18}" + "".join(f"{metrics[task]:34.2f}" for task in TASKS))


def draw(found: dict[str, dict[str, float]], networks: dict[str, TwoDigits], seed: int, folder: Path) -> None:
    """Writes ``multi_digits.png``: some test images with what a network says, and the metrics of every method."""
    from matplotlib.figure import Figure

    images, targets = Digits(seed).draw("test", 8, torch.Generator().manual_seed(seed + 1_000_000))
    name, model = list(networks.items())[-1]
    with torch.no_grad():
        said = model(images)
    figure = Figure(figsize=(10, 5), layout="constrained")
    upper, lower = figure.subfigures(2, 1)
    upper.suptitle(f"Unseen digits: what is there, and what {name} says (red: wrong)", fontsize=10)
    for i, axis in enumerate(upper.subplots(1, 8)):
        axis.imshow(images[i, 0].numpy(), cmap="gray_r")
        pair = [(int(said[task][i].argmax()), int(targets[task][i])) for task in TASKS[:2]]
        text = f"{pair[0][1]} and {pair[1][1]}\n{pair[0][0]} and {pair[1][0]}, sum {float(said['sum'][i]):.1f}"
        axis.set_title(text, fontsize=8, color="black" if all(a == b for a, b in pair) else "#D55E00")
        axis.axis("off")
    for task, axis in zip(TASKS, lower.subplots(1, 3, sharey=True), strict=True):
        better = "right" if HIGHER_IS_BETTER[task] else "left"
        values = [metrics[task] for metrics in found.values()]
        axis.scatter(values, list(found), color=["#666666"] + ["#0072B2"] * (len(values) - 1))
        axis.axvline(values[0], color="#666666", linewidth=0.8, linestyle="--")
        axis.set_title(f"{task}: {METRICS[task]} ({better} is better)", fontsize=9)
        axis.grid(axis="x", color="#DDDDDD")
    lower.axes[0].invert_yaxis()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "multi_digits.png", dpi=120)
    print(f"Picture: {folder / 'multi_digits.png'}")


if __name__ == "__main__":
    main()
