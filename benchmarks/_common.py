"""What every benchmark shares: timing, provenance, and results written as JSON beside a Markdown table."""

import json
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

RESULTS = pathlib.Path(__file__).parent / "results"


def provenance(seed: int) -> dict[str, Any]:
    """The command, commit, seed and machine of a result."""
    import scipy

    import mogb

    run = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(run, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    script = pathlib.Path(sys.argv[0]).name
    return {
        "command": f"python benchmarks/{script} {' '.join(sys.argv[1:])}".strip(),
        "commit": commit,
        "seed": seed,
        "machine": f"{_processor()}, {torch.get_num_threads()} thread(s), {platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "mogb": mogb.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
    }


def interleaved(calls: dict[str, Callable[[], object]], repeats: int, budget: float = 3.0) -> dict[str, float]:
    """The median seconds of each call, run in turn, A B C A B C ..., after one warm-up each.

    A call whose warm-up took longer than the budget is not repeated: its warm-up counts.
    """
    times: dict[str, list[float]] = {}
    for name, call in calls.items():
        first = _timed(call)
        times[name] = [first] if first > budget else []
    for _ in range(repeats):
        for name, call in calls.items():
            if sum(times[name]) < budget:
                times[name].append(_timed(call))
    return {name: float(np.median(values)) for name, values in times.items()}


def write(name: str, payload: dict[str, Any], markdown: str) -> None:
    """Writes ``results/NAME.json`` and ``results/NAME.md``, and prints the table."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(payload, indent=1) + "\n")
    meta = payload["provenance"]
    head = f"`{meta['command']}` at commit {meta['commit']}, seed {meta['seed']}, on {meta['machine']}.\n\n"
    (RESULTS / f"{name}.md").write_text(head + markdown + "\n")
    print(markdown)


def read(name: str) -> dict[str, Any] | None:
    """What :func:`write` wrote; None if there is nothing."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _processor() -> str:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()
