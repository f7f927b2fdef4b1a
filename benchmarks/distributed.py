"""Bytes that ranks send per balanced step, how far ranks are from one process, and how soon a dead rank is noticed.

``python benchmarks/distributed.py`` measures everything on gloo processes of this machine, and writes
``results/distributed.json`` and ``.md``; ``--quick`` takes a tenth of the numbers and few methods, ``--only bytes``,
``deviation`` or ``death`` takes one part.

**Bytes.** Every collective is wrapped, and what its algorithm sends is added up: (W-1)/W of a tensor for an all-to-all
and for an all-gather of it, twice that for an all-reduce in a ring. Beside that, the kernel's counter of the loopback
interface is read; run it as ``unshare -rn`` does, with an interface of its own, for a count of this program alone.
The baseline is what K all-reduces of N numbers send.
"""

import argparse
import pathlib
import subprocess
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "mogb"))

import distributed_cases as cases
from _common import provenance, table, write
from processes import launch

import mogb
from mogb.engines import shards

COUNTER = pathlib.Path("/proc/net/dev")
SEED = 0
SHAPES = ((2, 2_000_000), (5, 2_000_000), (16, 500_000), (64, 125_000))  # K, N
FORMS = (
    ("ddp", "rows"), ("ddp", "shards"), ("ddp accumulated", "auto"), ("fsdp", "auto"), ("fsdp tied", "auto"),
    ("fsdp accumulated", "auto"),
)  # fmt: skip


class Wire:
    """Adds up what this rank's collectives send while it is open."""

    def __init__(self) -> None:
        self.total = 0.0
        self.kinds: dict[str, float] = {}

    def __enter__(self) -> "Wire":
        size = dist.get_world_size()
        part = (size - 1) / size
        self._wrap(dist, "all_reduce", lambda tensor: 2 * part * _size(tensor))
        self._wrap(dist, "broadcast", lambda tensor: part * _size(tensor))  # a mean: a tree sends W - 1 copies
        self._wrap(dist, "all_to_all_single", lambda received, sent: part * _size(sent))
        self._wrap(shards, "_all_gather_single", lambda whole, mine: part * _size(whole))
        self._wrap(shards, "_reduce_scatter_single", lambda mine, sent: part * _size(sent))
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, original in self._originals:
            setattr(module, name, original)

    def _wrap(self, module: Any, name: str, count: Any) -> None:
        original = getattr(module, name)
        self._originals = [*getattr(self, "_originals", []), (module, name, original)]

        def counted(*args: Any, **kwargs: Any) -> Any:
            sent = count(*args)
            self.kinds[name.strip("_")] = self.kinds.get(name.strip("_"), 0.0) + sent
            self.total += sent
            return original(*args, **kwargs)

        setattr(module, name, counted)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def send(rank: int, world: int, folder: pathlib.Path, size: int, length: int) -> None:
    """One step of K losses on N parameters, by every form, and K all-reduces."""
    generator = torch.Generator().manual_seed(SEED + rank)
    param = torch.nn.Parameter(torch.randn(length, generator=generator))
    rows = torch.randn(size, length, generator=generator)
    found: dict[str, Any] = {}
    gradients = {}
    for form in ("rows", "shards"):
        method = mogb.make("mgda")
        param.grad = None
        mogb.backward(rows @ param, [param], method, exchange=form)  # warm-up: connections are made
        param.grad = None
        losses = rows @ param
        found[form] = _measured(lambda losses=losses, form=form, method=method: mogb.backward(
            losses, [param], method, exchange=form
        ))  # fmt: skip
        assert param.grad is not None
        gradients[form] = param.grad.clone()
    some = rows.clone()
    found["k all-reduces"] = _measured(lambda: [dist.all_reduce(row) for row in some])
    difference = (gradients["rows"] - gradients["shards"]).abs().max() / gradients["rows"].abs().max()
    found["difference"] = float(difference)
    torch.save(found, folder / f"{rank}.pt")


def _measured(call: Any) -> dict[str, Any]:
    _quiet()
    before, start = _sent_so_far(), time.perf_counter()
    with Wire() as wire:
        call()
    seconds = time.perf_counter() - start
    _quiet()
    return {"counted": wire.total, "kinds": wire.kinds, "interface": _sent_so_far() - before, "seconds": seconds}


def _quiet() -> None:
    """All ranks are here, and what they sent has arrived."""
    dist.barrier()
    time.sleep(0.1)
    dist.barrier()


def _sent_so_far() -> int:
    lines = COUNTER.read_text().splitlines() if COUNTER.exists() else []
    return next((int(line.split()[9]) for line in lines if line.strip().startswith("lo:")), 0)


def measure_bytes(quick: bool) -> list[dict[str, Any]]:
    """What every form sends, over K, N and the number of ranks."""
    found = []
    for world in (2,) if quick else (2, 4):
        for size, length in SHAPES:
            length = length // 10 if quick else length
            ranks = launch(world, send, size, length, seconds=400)
            row: dict[str, Any] = {"world": world, "K": size, "N": length, "difference": ranks[0]["difference"]}
            for form in ("rows", "shards", "k all-reduces"):
                row[form] = {
                    "counted": sum(rank[form]["counted"] for rank in ranks),
                    "interface": ranks[0][form]["interface"],  # of all ranks: they share it
                    "seconds": max(rank[form]["seconds"] for rank in ranks),
                }
            base = row["k all-reduces"]
            row["ratio"] = row["shards"]["counted"] / base["counted"]
            row["interface_ratio"] = row["shards"]["interface"] / base["interface"] if base["interface"] else None
            row["limit"] = (size + 1) / (2 * size) + 0.01
            found.append(row)
            print(f"W={world} K={size} N={length}: {row['ratio']:.4f}, interface {row['interface_ratio']}", flush=True)
    return found


def measure_deviation(quick: bool) -> dict[str, Any]:
    """The largest difference of any number of the last gradient of two steps from that of one process."""
    names = ["mgda", "upgrad", "nash_mtl"] if quick else cases.gramian_methods()
    found: dict[str, Any] = {"methods": len(names), "forms": []}
    for world in (2,) if quick else (2, 4):
        forms = (*FORMS, ("hsdp", "auto")) if world == 4 else FORMS
        ranks = launch(world, cases.train, [(*form, names) for form in forms], seconds=900)
        for index, (form, exchange) in enumerate(forms):
            worst, by, same = 0.0, "", True
            for name in names:
                expected, _ = cases.alone(form, name, world)
                for rank in ranks:
                    gradient, weights = rank[index][name]
                    gap = float((gradient - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
                    same &= bool(torch.equal(weights, ranks[0][index][name][1]))
                    worst, by = (gap, name) if gap > worst else (worst, by)
            found["forms"].append(
                {"world": world, "form": form, "exchange": exchange, "largest": worst, "method": by, "same_bits": same}
            )
            print(found["forms"][-1], flush=True)
    return found


def die(rank: int, world: int, folder: pathlib.Path, seconds: float) -> None:
    """The second rank leaves without a word; the first one notices."""
    import os
    from datetime import timedelta

    group = dist.new_group(timeout=timedelta(seconds=seconds))
    net = cases.model()
    inputs, targets = cases.mine(rank, world)
    if rank == 1:
        os._exit(0)
    start = time.perf_counter()
    try:
        mogb.backward(cases.losses_of(net, inputs, targets), net, mogb.make("mgda"), process_group=group)
    except mogb.DistributedError as error:
        torch.save({"seconds": time.perf_counter() - start, "error": str(error)}, folder / "0.pt")
    os._exit(0)


def measure_death(timeout: float = 3.0) -> dict[str, Any]:
    """How soon the others learn of it, and in what words."""
    found = launch(2, die, timeout)[0]
    return {"timeout": timeout, **found}


def as_markdown(payload: dict[str, Any]) -> str:
    parts = []
    if "bytes" in payload:
        rows = [
            [str(r["world"]), str(r["K"]), f"{r['N']:,}", f"{r['k all-reduces']['counted'] / 1e6:.1f}",
             f"{r['rows']['counted'] / 1e6:.1f}", f"{r['shards']['counted'] / 1e6:.1f}", f"{r['ratio']:.4f}",
             f"{r['limit']:.4f}", "-" if r["interface_ratio"] is None else f"{r['interface_ratio']:.4f}",
             f"{r['difference']:.1e}"]
            for r in payload["bytes"]
        ]  # fmt: skip
        header = ["ranks", "K", "N", "K all-reduces, MB", "rows, MB", "shards, MB", "shards / K all-reduces"]
        header += ["limit (K+1)/2K + 0.01", "the same, by the interface's counter", "difference of directions"]
        parts.append("## Bytes sent per step, all ranks together\n\n" + table(header, rows))
    if "deviation" in payload:
        rows = [
            [str(f["world"]), f["form"], f["exchange"], f"{f['largest']:.1e}", f["method"], _yes(f["same_bits"])]
            for f in payload["deviation"]["forms"]
        ]  # fmt: skip
        header = ["ranks", "form", "exchange", "largest deviation", "of method", "weights equal to the bit"]
        methods = payload["deviation"]["methods"]
        title = f"## From one process on the whole batch, float32, {methods} methods that read Gramians"
        note = (
            "\n\nTwo steps on uneven batches; the largest difference of a gradient's number, over its largest number."
        )
        parts.append(title + note + "\n\n" + table(header, rows))
    if "death" in payload:
        death = payload["death"]
        parts.append(
            "## A rank that dies\n\n"
            f"The other one stops after {death['seconds']:.2f} s (the group's timeout is {death['timeout']:g} s):\n\n> "
            + death["error"]
        )
    return "\n\n".join(parts)


def _yes(flag: bool) -> str:
    return "yes" if flag else "NO"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the numbers, two ranks, three methods")
    parser.add_argument("--only", choices=("bytes", "deviation", "death"), help="one part, printed and not written")
    args = parser.parse_args()
    payload: dict[str, Any] = {"provenance": provenance(SEED)}
    if args.only in (None, "bytes"):
        payload["bytes"] = measure_bytes(args.quick)
    if args.only in (None, "deviation"):
        payload["deviation"] = measure_deviation(args.quick)
    if args.only in (None, "death"):
        payload["death"] = measure_death()
    if args.only is None and not args.quick:
        write("distributed", payload, as_markdown(payload))
    else:
        print(as_markdown(payload))


if __name__ == "__main__":
    if COUNTER.exists():
        subprocess.run(["ip", "link", "set", "lo", "up"], check=False, stderr=subprocess.DEVNULL)
    torch.set_num_threads(1)
    main()
