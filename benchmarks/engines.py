"""Time and peak memory of the engines, relative to one plain backward pass of a weighted loss.

    python benchmarks/engines.py [--models mlp,cnn,encoder,lora,lora+checkpoint] [--sizes 2,5,16,64]
                                 [--repeats 7] [--seed 0] [--clock wall|cpu] [--quick]

K losses are linear in two terms per sample, as in clipped or two-sided policy gradients. ``two`` terms are the general
case; ``parallel`` ones send the same cotangent into the network, up to its length. Every engine leaves the mean
gradient in ``.grad``; those of mogb form the Gramian as well, TorchJD's backward does not (its aggregator is the mean).
The forward pass is not timed. All engines run in turn, repetition by repetition, and times are divided by the plain
backward pass's in the same run. Memory is the peak of live tensor bytes over forward and backward, counted at every
operation. The error is the largest deviation of a direction from that of the plain backward pass, relative.

Engines that do not look into the losses do not care whether terms are parallel: they run with two terms only. An engine
that took longer than the limit for one K is not run for a larger one. A step of training is made of many things
besides: the ratios are of backward passes, not of steps. Results of models that are not named stay as they are.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _common import provenance, read, table, write
from _models import Case, Encoder, make_case, two_terms
from rich.progress import track
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import mogb
from mogb.base import GramianAggregator, Solution
from mogb.engines.per_sample import PerSample

MODELS = ("mlp", "cnn", "encoder", "lora", "lora+checkpoint")
SIZES = (2, 5, 16, 64)
TOO_LONG = 8.0  # seconds
BUDGET = 1.5  # seconds of repetitions for one engine and K
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, after every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


@dataclass(frozen=True)
class MeanAfterGramian(GramianAggregator):
    """The mean, of a method that insists on a Gramian: what an engine costs, without any solver."""

    def _weights(self, gramian: np.ndarray) -> Solution:
        return Solution(np.full(len(gramian), 1 / len(gramian)))


@dataclass(frozen=True, eq=False)
class Way:
    """A forward pass, which is not timed, a backward pass, and the hooks that both need."""

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], object]
    hooks: str = ""


@dataclass(eq=False)
class Bench:
    """One model with K objectives, and the ways to their mean gradient."""

    case: Case
    count: int
    parallel: bool
    recompute: bool
    seed: int

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.call_blocks("plainly")
        with torch.no_grad():
            output = self.case.model(self.case.inputs)
        self.old = output + torch.randn(output.shape, generator=generator)
        self.target = torch.randn(output.shape, generator=generator)
        share = torch.rand(self.count, len(output), generator=generator, dtype=torch.float64)
        self.coefficients = torch.stack([share, 1 - share], 2) / len(output)
        self.engine = PerSample(self.case.model, self_check="off")

    def ways(self) -> dict[str, Way]:
        """Every engine by its name, the plain backward pass first."""
        ways: dict[str, Way] = {
            "plain": Way(self.losses, lambda losses: losses.mean().backward()),
            "sequential": Way(self.losses, lambda losses: self.together(losses, "sequential")),
            "batched": Way(self.losses, lambda losses: self.together(losses, "batched")),
            "streaming": Way(self.losses, lambda losses: self.together(losses, "streaming")),
            "per_sample": Way(self.terms, lambda terms: self.balance(terms, "auto"), "per_sample"),
            "per_sample, rows": Way(self.terms, lambda terms: self.balance(terms, "keep"), "per_sample"),
            "per_sample, Gramian": Way(self.terms, lambda terms: self.balance(terms, "drop"), "per_sample"),
            "autojac, vmap": Way(self.losses, lambda losses: self.autojac(losses, None)),
            "autojac, loop": Way(self.losses, lambda losses: self.autojac(losses, 1)),
            "autogram": Way(self.losses, self.autogram, "autogram"),
        }
        if self.recompute:  # hooks of TorchJD's engines see every recomputation as a call of its own
            ways = {name: way for name, way in ways.items() if not name.startswith("auto")}
        if self.parallel:
            ways = {name: way for name, way in ways.items() if name == "plain" or name.startswith("per_sample")}
        return ways

    def terms(self) -> Tensor:
        output = self.case.model(self.case.inputs)
        return two_terms(output, output.detach() if self.parallel else self.old, self.target)

    def losses(self) -> Tensor:
        return torch.einsum("kbj,bj->k", self.coefficients.float(), self.terms())

    def together(self, losses: Tensor, engine: Any) -> None:
        mogb.backward(losses, self.case.trained, MeanAfterGramian(), engine=engine)

    def balance(self, terms: Tensor, rows: str) -> None:
        self.engine.backward(terms, self.coefficients, MeanAfterGramian(), rows=rows)

    def autojac(self, losses: Tensor, chunk: int | None) -> None:
        from torchjd.aggregation import Mean
        from torchjd.autojac import backward, jac_to_grad

        backward(losses, inputs=self.case.trained, parallel_chunk_size=chunk)
        jac_to_grad(self.case.trained, Mean())

    def autogram(self, losses: Tensor) -> None:
        self.gramians.compute_gramian(losses)
        losses.backward(torch.full((self.count,), 1 / self.count))

    def hook(self, kind: str) -> Callable[[], None]:
        """Prepares the model for a kind of engine; undone by what is returned."""
        if kind == "per_sample":
            self.engine.attach()
            self.call_blocks("taped" if self.recompute else "plainly")
            return self.engine.detach
        self.call_blocks("checkpointed" if self.recompute else "plainly")
        if kind == "autogram":
            from torchjd.autogram import Engine

            self.gramians = Engine(self.case.model, batch_dim=None)
            return lambda: delattr(self, "gramians")  # its hooks go with it
        return lambda: None

    def call_blocks(self, how: str) -> None:
        """Says how an encoder runs its blocks."""
        if isinstance(self.case.model, Encoder):
            self.case.model.call = {
                "plainly": lambda block, x: block(x),
                "checkpointed": lambda block, x: checkpoint(block, x, use_reentrant=False),
                "taped": lambda block, x: self.engine.checkpoint(block, x),
            }[how]


def run_once(bench: Bench, way: Way, clock: Callable[[], float]) -> float:
    """The time of the backward pass."""
    with prepared(bench, way):
        output = way.forward()
        start = clock()
        way.backward(output)
        return clock() - start


def look_at(bench: Bench, way: Way) -> tuple[int, Tensor]:
    """The largest number of live tensor bytes during one forward and backward pass, and the direction."""
    with prepared(bench, way), LiveBytes() as live:
        way.backward(way.forward())
    return live.peak, torch.cat([param.grad.flatten() for param in bench.case.trained if param.grad is not None])


@contextmanager
def prepared(bench: Bench, way: Way) -> Iterator[None]:
    """A model without gradients, with the hooks of a way."""
    for param in bench.case.trained:
        param.grad = None
    undo = bench.hook(way.hooks)
    try:
        yield
    finally:
        undo()


def measure(bench: Bench, repeats: int, clock: Callable[[], float], skip: set[str]) -> dict[str, dict[str, Any]]:
    """Seconds, peak bytes and error of every way that is not skipped; adds those that took too long to ``skip``."""
    ways = {name: way for name, way in bench.ways().items() if name not in skip}
    found: dict[str, dict[str, Any]] = {}
    truth = None
    for name, way in ways.items():
        try:
            peak, direction = look_at(bench, way)
        except Exception as error:  # a peer that can't do this model: its cell says so
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:200]}
            continue
        truth = direction if name == "plain" else truth
        assert truth is not None
        found[name] = {"error": float((direction - truth).abs().max() / truth.abs().max()), "peak_bytes": peak}
    times: dict[str, list[float]] = {name: [] for name in found if "failed" not in found[name]}
    for _ in range(repeats):
        for name, values in times.items():
            if sum(values) < BUDGET:
                values.append(run_once(bench, ways[name], clock))
    for name, values in times.items():
        found[name] |= {"seconds": statistics.median(values), "runs": len(values)}
        if max(values) > TOO_LONG:
            skip.add(name)
    return found


def cells(records: list[dict[str, Any]], value: Callable[[dict[str, Any]], str]) -> str:
    """A table with a row per model, terms and K."""
    names = list(dict.fromkeys(name for record in records for name in record["engines"]))
    rows = []
    for record in records:
        known = record["engines"]
        row = [record["model"], record["terms"], str(record["objectives"])]
        rows.append(row + [value(known[name] | {"plain": known["plain"]}) if name in known else "" for name in names])
    return table(["model", "terms", "K", *names], rows)


def as_markdown(records: list[dict[str, Any]], labels: dict[str, str]) -> str:
    """Three tables: time, memory and error."""

    def failed_or(show: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
        return lambda cell: "fails" if "failed" in cell else show(cell)

    parts = [
        "\n".join(f"- {name}: {label}" for name, label in labels.items()),
        "Backward time, in plain backward passes:",
        cells(records, failed_or(lambda cell: f"{cell['seconds'] / cell['plain']['seconds']:.2f}")),
        "Peak of live tensors over forward and backward, in those of a plain pass:",
        cells(records, failed_or(lambda cell: f"{cell['peak_bytes'] / cell['plain']['peak_bytes']:.2f}")),
        "Largest deviation from the plain backward pass of the same mean, relative:",
        cells(records, failed_or(lambda cell: f"{cell['error']:.0e}")),
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process, on a busy machine")
    parser.add_argument("--quick", action="store_true", help="tiny models: to see that everything runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    stem, wanted = "engines-quick" if given.quick else "engines", given.models.split(",")
    before = read(stem) or {"models": {}, "records": []}
    labels = {model: label for model, label in before["models"].items() if model not in wanted}
    records = [record for record in before["records"] if record["model"] not in wanted]
    source = provenance(given.seed) | {"clock": given.clock}
    for name in wanted:
        case = make_case(name.removesuffix("+checkpoint"), given.quick, given.seed)
        labels[name] = case.label + (", blocks checkpointed" if name.endswith("+checkpoint") else "")
        for parallel in (False, True):
            skip: set[str] = set()
            for count in track([int(size) for size in given.sizes.split(",")], f"{name}, parallel: {parallel}"):
                bench = Bench(case, count, parallel, name.endswith("+checkpoint"), given.seed)
                engines = measure(bench, given.repeats, CLOCKS[given.clock], skip)
                terms = "parallel" if parallel else "two"
                records.append(
                    {"model": name, "terms": terms, "objectives": count, "commit": source["commit"], "engines": engines}
                )
        records.sort(key=lambda record: MODELS.index(record["model"]))
        labels = {model: labels[model] for model in MODELS if model in labels}
        write(stem, {"provenance": source, "models": labels, "records": records}, as_markdown(records, labels))


if __name__ == "__main__":
    main()
