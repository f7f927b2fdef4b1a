"""A run that is killed at any moment and resumed is the run that was never killed, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from tiny_run import SMALL, metrics, same_tensors

from mogb_diffusion import checkpoint

EPOCHS = 12


def start(folder, *extra):
    words = [word for assignment in SMALL for word in ("--set", assignment)]
    command = [
        sys.executable, "-m", "mogb_diffusion", "train", "tiny_smoke", *words, "--set", f"epochs={EPOCHS}",
        "--set", "balancing={mode: marble, refresh_every: 3}", "--set", "policy.ema=0.9", "--no-report",
        "--out", str(folder), *extra,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_five_kills_leave_no_trace(tmp_path):
    whole = start(tmp_path / "whole")
    begun, first_line = time.monotonic(), None
    while whole.poll() is None:
        if first_line is None and (tmp_path / "whole" / "metrics.jsonl").exists():
            first_line = time.monotonic() - begun
        time.sleep(0.05)
    told = whole.communicate()[0]
    assert whole.returncode == 0, told
    assert first_line is not None
    length = time.monotonic() - begun - first_line
    generator = random.Random(0)
    kills = 0
    for _ in range(40):
        if kills == 5:
            break
        process = start(tmp_path / "killed", "--resume")
        lines = tmp_path / "killed" / "metrics.jsonl"
        before = lines.stat().st_mtime_ns if lines.exists() else 0
        while process.poll() is None and not (lines.exists() and lines.stat().st_mtime_ns > before):
            time.sleep(0.02)
        time.sleep(generator.uniform(0, length / 3))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        process.stdout.close()
    process = start(tmp_path / "killed", "--resume")
    told = process.communicate()[0]
    assert process.returncode == 0, told
    assert kills == 5
    name = f"checkpoint-{2 * EPOCHS:06d}"
    assert same_tensors(checkpoint.load(tmp_path / "killed" / name), checkpoint.load(tmp_path / "whole" / name))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
