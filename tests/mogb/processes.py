"""Work on several gloo processes, for tests: a rank that fails, dies or hangs is a failed test, never a stuck one."""

import os
import pathlib
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def launch(world: int, work: Callable[..., None], *args: Any, seconds: float = 120.0) -> list[Any]:
    """Runs ``work(rank, world, folder, *args)`` on every rank; what each saved as ``folder/RANK.pt`` comes back.

    A rank that saved nothing gives None.

    Raises:
        AssertionError: A rank raised (its traceback is shown), or did not end in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        context = mp.get_context("spawn")
        ranks = [
            context.Process(target=_start, args=(rank, world, port, work, folder, args), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        _wait(ranks, folder, time.monotonic() + seconds)
        return [_load(folder / f"{rank}.pt") for rank in range(world)]


def _wait(ranks: list[Any], folder: pathlib.Path, deadline: float) -> None:
    while any(process.is_alive() for process in ranks):
        late = time.monotonic() > deadline
        errors = sorted(folder.glob("*.error"))
        if late or errors:
            for process in ranks:
                process.kill()
            told = [path.read_text() for path in errors]
            raise AssertionError("\n".join(told) or f"ranks {[p.is_alive() for p in ranks]} did not end in time")
        time.sleep(0.02)
    errors = sorted(folder.glob("*.error"))
    assert not errors, "\n".join(path.read_text() for path in errors)


def _load(path: pathlib.Path) -> Any:
    return torch.load(path, weights_only=True) if path.exists() else None


def _start(rank: int, world: int, port: int, work: Callable[..., None], folder: pathlib.Path, args: Any) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", RANK=str(rank), WORLD_SIZE=str(world)
    )
    torch.set_num_threads(1)
    status = 1
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world)
        work(rank, world, folder, *args)
        _meet(rank, world, folder)
        status = 0
    except BaseException:
        unfinished = folder / f"{rank}.unfinished"
        unfinished.write_text(f"rank {rank}: {traceback.format_exc()}")
        unfinished.rename(folder / f"{rank}.error")
    finally:
        # No destructor runs: a DistributedDataParallel that dies after its group can wait for a gloo thread that
        # itself waits for the interpreter (PyTorch 2.13: Reducer frees ProcessGroupGloo without releasing the GIL).
        os._exit(status)


def _meet(rank: int, world: int, folder: pathlib.Path) -> None:
    """Waits for the others, so that nobody leaves while another one still receives."""
    (folder / f"{rank}.done").touch()
    deadline = time.monotonic() + 20
    while len(list(folder.glob("*.done"))) < world and time.monotonic() < deadline:
        time.sleep(0.005)
