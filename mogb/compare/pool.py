"""Runs jobs in fresh processes of one thread each, and outlives any of them.

A worker that dies (out of memory, say) fails its own job only, and only if it dies twice. When the parent dies, even
by SIGKILL, its workers notice and end.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

ATTEMPTS = 2  # of a job whose worker dies

Progress = Callable[[float], None]
Work = Callable[[Any, Progress], Any]


@dataclass(frozen=True)
class Event:
    """What a worker said about job number ``index``.

    Attributes:
        kind: ``"progress"`` (value: a fraction), ``"done"`` (value: the result) or ``"lost"`` (value: why).
    """

    index: int
    kind: str
    value: Any


class _Worker:
    def __init__(self, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.job: int | None = None

    def give(self, index: int, job: Any) -> None:
        self.job = index
        with contextlib.suppress(OSError):  # already dead: the pipe will say so when it is read
            self.pipe.send(job)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run_jobs(work: Work, jobs: Sequence[Any], workers: int) -> Iterator[Event]:
    """Yields what happens, as it happens. Closing the iterator ends the workers.

    Args:
        work: A function of a module, called as ``work(job, progress)`` in another process.
        jobs: Picklable arguments.
        workers: How many processes.
    """
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    waiting, deaths = list(range(len(jobs)))[::-1], [0] * len(jobs)
    crew: list[_Worker] = []
    try:
        while waiting or any(worker.job is not None for worker in crew):
            while waiting and len(crew) < workers:
                crew.append(_Worker(work))
            for worker in crew:
                if waiting and worker.job is None:
                    worker.give(index := waiting.pop(), jobs[index])
            busy = {worker.pipe: worker for worker in crew if worker.job is not None}
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                event = _hear(worker)
                if event.kind != "progress":
                    worker.job = None
                if event.kind == "lost":
                    worker.end()
                    crew.remove(worker)
                    deaths[event.index] += 1
                    if deaths[event.index] < ATTEMPTS:
                        waiting.append(event.index)
                        event = Event(event.index, "progress", 0.0)
                yield event
    finally:
        for worker in crew:
            worker.end()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _hear(worker: _Worker) -> Event:
    assert worker.job is not None
    try:
        kind, value = worker.pipe.recv()
    except (EOFError, ConnectionError):
        worker.process.join()
        code = worker.process.exitcode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with status {code}"
        return Event(worker.job, "lost", f"its process ended {how}, {ATTEMPTS} times: out of memory, or killed.")
    if kind == "broken":
        raise RuntimeError(f"a worker failed outside of its run:\n{value}")
    return Event(worker.job, kind, value)


def _serve(work: Work, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        import torch

        torch.set_num_threads(1)
        while True:
            job = pipe.recv()
            pipe.send(("done", work(job, lambda fraction: pipe.send(("progress", fraction)))))
    except EOFError:
        return
    except Exception:
        pipe.send(("broken", traceback.format_exc()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
