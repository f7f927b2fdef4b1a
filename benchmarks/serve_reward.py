"""A served reward under load: 32 honest clients, alone and among hostile, slow and failing ones.

The server is the real command in a process of its own; the clients are threads of this one. An honest request is four
pictures of 256 x 256 through the client reward ``remote``; it is lost if it has no rewards in the end, and wrong if
they differ from those of a local call by more than 1e-12. ``python benchmarks/serve_reward.py`` takes about a minute.
"""

import argparse
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _common import provenance, table, write
from _hostile import Hostile, hostile_requests

from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rewards.remote import Remote
from mogb_diffusion.rewards.throughput import examples

CLIENTS, PICTURES, SIDE = 32, 4, 256
TOKEN = "a-token-of-benchmarks"


class Load:
    """The mean of a picture. It takes 2 ms a picture, raises where the prompt says so, and dawdles where it says so."""

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
        time.sleep(0.002 * len(prompts))
        for prompt in prompts:
            if prompt.text == "raise":
                raise MemoryError("as asked")
            if "include" in prompt.metadata:
                raise ValueError("no such metadata")
            if prompt.text == "dawdle":
                time.sleep(0.3)
        if images.shape[2] == 17 or images.shape[3] == 17:
            raise ValueError("17 is no size")
        return images.double().mean((1, 2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20, help="of each client, in each phase")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        payload = measured(options.requests, options.seed, pathlib.Path(name))
    payload["provenance"] = provenance(options.seed)
    write("serve_reward", payload, as_markdown(payload))


def measured(requests: int, seed: int, folder: pathlib.Path) -> dict[str, Any]:
    """Three phases against one server: calm, storm, and calm again."""
    trace = folder / "executed"
    environment = os.environ | {
        "MOGB_REWARD_TOKEN": TOKEN, "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    command = [sys.executable, "-m", "mogb_diffusion", "serve-reward", "serve_reward:Load", "--port", "0"]
    server = subprocess.Popen([*command, "--queue", "256"], stdout=subprocess.PIPE, text=True, env=environment)
    assert server.stdout is not None
    try:
        url = server.stdout.readline().split(" at ")[1].split(",")[0]
        phases = {"calm": calm(url, requests, seed), "storm": storm(url, requests, seed, trace)}
        phases["calm again"] = calm(url, requests, seed)
        memory = peak_memory(server.pid)
        server.send_signal(signal.SIGTERM)
        told = server.communicate(timeout=60)[0]
    finally:
        server.kill()
        server.wait()
    return {
        "load_average": os.getloadavg()[0],
        "clients": CLIENTS, "pictures": PICTURES, "side": SIDE, "phases": phases, "executed": trace.exists(),
        "peak_memory_mib": memory, "exit_status": server.returncode, "server": told.splitlines()[-1],
    }  # fmt: skip


def calm(url: str, requests: int, seed: int) -> dict[str, Any]:
    """Honest clients alone."""
    prompts = [Prompt(f"picture {number}") for number in range(PICTURES)]
    pictures = [examples(prompts, SIDE, seed * CLIENTS + client) for client in range(CLIENTS)]
    truths = [images.double().mean((1, 2, 3)) for images in pictures]
    remotes = [Remote(url, token=TOKEN, retries=20, seed=client) for client in range(CLIENTS)]
    seconds: list[float] = []
    faults: Counter[str] = Counter()

    def client(number: int) -> None:
        for _ in range(requests):
            begun = time.perf_counter()
            try:
                found = remotes[number](pictures[number], prompts)
            except RuntimeError:
                faults["lost"] += 1
                continue
            seconds.append(time.perf_counter() - begun)
            faults["lost"] += int(found.isnan().any())
            faults["wrong"] += int(((found - truths[number]).abs() > 1e-12).any())

    begun = time.perf_counter()
    together([lambda number=number: client(number) for number in range(CLIENTS)])
    passed = time.perf_counter() - begun
    milliseconds = 1000 * np.array(seconds or [np.nan])
    return {
        "requests": CLIENTS * requests, "seconds": passed, "requests_per_second": len(seconds) / passed,
        "pictures_per_second": PICTURES * len(seconds) / passed,
        **{f"p{percent}_ms": float(np.percentile(milliseconds, percent)) for percent in (50, 99)},
        "lost": faults["lost"], "wrong": faults["wrong"], "retries": sum(r.counts["retries"] for r in remotes),
    }  # fmt: skip


def storm(url: str, requests: int, seed: int, trace: pathlib.Path) -> dict[str, Any]:
    """Honest clients among hostile ones, ones that drip, and ones whose prompts make the reward fail or dawdle."""
    over = threading.Event()
    hostile, unexpected, failing, dripping = Counter[str](), list[str](), Counter[str](), Counter[str]()
    cases = list(hostile_requests(trace, TOKEN))

    def attacker(first: int) -> None:
        number = first
        while not over.is_set():
            case = cases[number % len(cases)]
            status = send(url, case)
            hostile[str(status)] += 1
            if status not in (*case.statuses, 503, 0):  # refused connections are fine, too
                unexpected.append(f"{case.name}: {status}")
            number += 4

    def dripper() -> None:
        while not over.is_set():
            try:
                with socket.create_connection(address(url), timeout=5) as connection:
                    dripping["connections"] += 1
                    connection.sendall(b"POST /score HTTP/1.1\r\n")
                    while not over.wait(0.2):
                        connection.sendall(b"X")
            except OSError:  # noqa: PERF203 - given up, and begins again
                dripping["given up"] += 1

    def failer(text: str) -> None:
        remote = Remote(url, token=TOKEN, retries=0)
        while not over.wait(0.02):
            try:
                remote(torch.zeros(1, 3, SIDE, SIDE), [Prompt(text)])
                failing[f"{text}: answered"] += 1
            except RuntimeError as error:  # noqa: PERF203 - the kinds are counted
                failing[f"{text}: {getattr(error, 'status', None) or 'connection'}"] += 1

    jobs: list[Callable[[], None]] = [lambda first=first: attacker(first) for first in range(4)]
    jobs += [dripper] * 16 + [lambda: failer("raise"), lambda: failer("raise"), lambda: failer("dawdle")]
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    try:
        result = calm(url, requests, seed)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    for case in cases:  # each of them at least once, whatever the time
        status = send(url, case)
        hostile[str(status)] += 1
        if status not in case.statuses:
            unexpected.append(f"{case.name}: {status}")
    told = {"hostile": dict(hostile), "hostile_kinds": len(cases), "unexpected": unexpected}
    told |= {"failing": dict(failing), "dripping": dict(dripping)}
    return result | told


def send(url: str, case: Hostile) -> int:
    """The status of the answer to these bytes; 0 for a connection that is closed without one."""
    said = b""
    try:
        with socket.create_connection(address(url), timeout=30) as connection:
            try:
                connection.sendall(case.request)
                if not case.hold:
                    connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it may have answered already
            while part := connection.recv(65536):
                said += part
    except OSError:
        pass
    if not said.startswith(b"HTTP/"):
        return 400 if said else 0
    return int(said.split()[1])


def address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").rsplit(":", 1)
    return host, int(port)


def together(jobs: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def peak_memory(process: int) -> float | None:
    """In MiB, where the system tells."""
    try:
        lines = pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def as_markdown(payload: dict[str, Any]) -> str:
    """The table of the phases, and what became of the others."""
    header = ["phase", "requests", "requests/s", "pictures/s", "p50", "p99", "retries", "lost", "wrong"]
    rows = [
        [name, str(phase["requests"]), f"{phase['requests_per_second']:.1f}", f"{phase['pictures_per_second']:.0f}",
         f"{phase['p50_ms']:.0f} ms", f"{phase['p99_ms']:.0f} ms",
         *(str(phase[key]) for key in ("retries", "lost", "wrong"))]
        for name, phase in payload["phases"].items()
    ]  # fmt: skip
    met = payload["phases"]["storm"]

    def listed(counts: dict[str, int]) -> str:
        return ", ".join(f"{what}: {number}" for what, number in sorted(counts.items())) or "none"

    head = (
        f"{payload['clients']} honest clients, {payload['pictures']} pictures of {payload['side']} x {payload['side']} "
        f"a request; the load average of the machine was {payload['load_average']:.1f}, this benchmark included."
    )
    storm_told = (
        f"In the storm: {met['hostile_kinds']} kinds of hostile requests, answered with (0: closed) "
        f"{listed(met['hostile'])}; answers that were not right: {len(met['unexpected'])}. Clients that "
        f"drip headers: {listed(met['dripping'])}. Requests that make the reward fail or dawdle: "
        f"{listed(met['failing'])}."
    )
    end = (
        f"Code of a request executed: {'yes' if payload['executed'] else 'no'}. Peak memory of the server: "
        f"{payload['peak_memory_mib'] or 0:.0f} MiB. Exit status after SIGTERM: {payload['exit_status']}."
    )
    return "\n\n".join([head, table(header, rows), storm_told, end])


if __name__ == "__main__":
    main()
