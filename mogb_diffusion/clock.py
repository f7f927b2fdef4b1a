"""Where the time goes: seconds by phase, measured on the device that works."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Adds up the seconds of named phases.

    Args:
        device: Work that was only queued on an accelerator counts where it was queued if this is it.
        exact: Wait for the device at both ends of a phase; costs a little, so only benchmarks ask for it.
    """

    def __init__(self, device: torch.device | None = None, *, exact: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self._wait = exact and device is not None and device.type == "cuda"

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Within the block time counts for this phase."""
        start = self._now()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + self._now() - start

    def take(self) -> dict[str, float]:
        """The seconds so far; the clock starts anew."""
        taken, self.seconds = self.seconds, {}
        return taken

    def _now(self) -> float:
        if self._wait:
            torch.cuda.synchronize()
        return time.perf_counter()
