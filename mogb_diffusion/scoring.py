"""K rewards over pictures, in the background while sampling goes on.

Each reward has a thread of its own, which gets its batches in order. A call that raises is tried again; one that takes
too long is given up, with its thread. Such a call, and NaN or Inf where a reward applies, costs its pictures the signal
of that reward (NaN) and nothing else; it is counted. After so many failed calls of one reward in a row,
:attr:`Scorer.broken` says so, and the trainer stops.

Shapes: K = rewards, B = pictures.
"""

import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from mogb_diffusion import config
from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import Prompt, in_batches
from mogb_diffusion.rewards import Reward, load


@dataclass(eq=False)
class _Job:
    """One call of one reward."""

    images: Tensor
    prompts: list[Prompt]
    columns: list[int]  # of the pictures in the result
    done: threading.Event = field(default_factory=threading.Event)
    started: float = 0.0  # of the present attempt; 0 before it
    answer: Tensor | None = None
    error: str = ""
    errors: int = 1  # calls that failed, if there is one
    retries: int = 0
    seconds: float = 0.0


class _Worker(threading.Thread):
    """Calls one reward, job after job. A daemon: one that hangs does not keep the program alive."""

    def __init__(self, reward: Reward, jobs: "queue.SimpleQueue[_Job | None]", retries: int) -> None:
        super().__init__(daemon=True, name="reward")
        self.reward, self.jobs, self.retries = reward, jobs, retries
        self.retired = False

    def run(self) -> None:
        while not self.retired and (job := self.jobs.get()) is not None:
            begun = time.monotonic()
            for attempt in range(self.retries + 1):
                job.retries, job.started = attempt, time.monotonic()
                try:
                    with torch.no_grad():
                        job.answer = _checked(self.reward(job.images, job.prompts), len(job.prompts))
                    job.error = ""
                    break
                except BaseException as error:  # a reward may fail in any way, and the run goes on
                    job.error = _told(error)
                if self.retired:
                    return
            job.seconds = time.monotonic() - begun
            job.done.set()


class Scorer:
    """Scores pictures with K rewards.

    Args:
        rewards: By name, in the order of the rows of the result.
        settings: Timeout, retries, and how many failures in a row are too many.
        batch_sizes: Pictures per call, by name; None or no entry gives a whole submission at once.
        specialists: Names of rewards that apply to some prompts only; NaN from one without ``applies`` is no failure.

    Attributes:
        special: Names of the specialists.
        counts: What went wrong since :meth:`collect` was called last, by reward: errors, timeouts, nan, inf, retries.
        messages: What to tell, since then.
        seconds: Spent in rewards, since then, summed over their threads.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        settings: config.Scoring | None = None,
        *,
        batch_sizes: Mapping[str, int | None] | None = None,
        specialists: Sequence[str] = (),
    ) -> None:
        self.rewards = dict(rewards)
        self.settings = settings or config.Scoring()
        self.batch_sizes = dict(batch_sizes or {})
        self.special = frozenset(specialists)
        self.counts: dict[str, Counter[str]] = {}
        self.messages: list[str] = []
        self.seconds = 0.0
        self._in_a_row = dict.fromkeys(self.rewards, 0)
        self._last: dict[str, str] = {}
        self._queues: dict[str, queue.SimpleQueue[_Job | None]] = {name: queue.SimpleQueue() for name in self.rewards}
        self._workers: dict[str, _Worker] = {}
        self._jobs: list[tuple[str, _Job]] = []
        self._size = 0

    @property
    def broken(self) -> str:
        """Why the run must stop; empty if it need not."""
        for name, failures in self._in_a_row.items():
            if failures >= self.settings.max_failures:
                return (
                    f"The reward {name!r} failed {failures} times in a row "
                    f"(scoring.max_failures: {self.settings.max_failures}). Last: {self._last.get(name, '')}"
                )
        return ""

    def submit(self, images: Tensor, prompts: Sequence[Prompt]) -> None:
        """Hands over pictures ``[B, 3, H, W]`` and goes on.

        A reward whose ``applies`` raises has failed at these pictures, once in a row, however many they are.
        """
        for name, reward in self.rewards.items():
            chosen, failed, error = _choose(name, reward, prompts)
            if failed:
                columns = [self._size + n for n in failed]
                job = _Job(images[:0], [prompts[n] for n in failed], columns, error=error, errors=len(failed))
                job.done.set()
                self._jobs.append((name, job))
            for part in in_batches(chosen, self.batch_sizes.get(name) or max(1, len(chosen))):
                job = _Job(images[list(part)], [prompts[n] for n in part], [self._size + n for n in part])
                self._jobs.append((name, job))
                self._worker(name)
                self._queues[name].put(job)
        self._size += len(prompts)

    def collect(self) -> Float64[Tensor, "K B"]:
        """Waits for everything that was submitted; NaN where a reward does not apply, or failed."""
        self.counts, self.messages, self.seconds = {name: Counter() for name in self.rewards}, [], 0.0
        result = torch.full((len(self.rewards), self._size), math.nan, dtype=torch.float64)
        rows = {name: row for row, name in enumerate(self.rewards)}
        for name, job in self._jobs:
            values = self._wait(name, job)
            if values is not None:
                result[rows[name], job.columns] = values
        self._jobs, self._size = [], 0
        return result

    def close(self) -> None:
        """Ends the threads."""
        for name in self._workers:
            self._queues[name].put(None)
        self._workers = {}

    def _wait(self, name: str, job: _Job) -> Tensor | None:
        counts, timeout = self.counts[name], self.settings.timeout
        while not job.done.is_set():
            waited = time.monotonic() - job.started if job.started else 0.0
            if waited >= timeout:
                self._replace(name)
                counts["timeouts"] += 1
                self._failed(name, f"took longer than {timeout:g} s (scoring.timeout)", job)
                return None
            job.done.wait(timeout - waited if job.started else min(timeout, 0.05))
        self.seconds += job.seconds
        counts["retries"] += job.retries
        if job.answer is None:
            counts["errors"] += job.errors
            self._failed(name, job.error, job)
            return None
        return self._cleaned(name, job, job.answer)

    def _cleaned(self, name: str, job: _Job, values: Tensor) -> Tensor | None:
        counts = self.counts[name]
        infinite = int(values.isinf().sum())
        missing = int(values.isnan().sum())
        counts["inf"] += infinite
        if hasattr(self.rewards[name], "applies") or name not in self.special:
            counts["nan"] += missing
            if infinite + missing == len(values):
                self._failed(name, "gave NaN or Inf for every picture", job)
                return None
        self._in_a_row[name] = 0
        return torch.where(values.isinf(), torch.full_like(values, math.nan), values)

    def _failed(self, name: str, reason: str, job: _Job) -> None:
        self._in_a_row[name] += 1
        self._last[name] = reason
        self.messages.append(f"reward {name}: {reason}; {len(job.prompts)} pictures have no signal from it")

    def _worker(self, name: str) -> None:
        if name not in self._workers:
            self._workers[name] = _Worker(self.rewards[name], self._queues[name], self.settings.retries)
            self._workers[name].start()

    def _replace(self, name: str) -> None:
        """Leaves a thread that hangs to itself; another one takes its queue."""
        self._workers.pop(name).retired = True
        self._worker(name)


def make_scorer(
    rewards: Sequence[config.Reward], settings: config.Scoring, device: torch.device | None = None
) -> Scorer:
    """The rewards of a configuration, loaded.

    Raises:
        InputError: A reward that cannot be loaded.
    """
    loaded: dict[str, Reward] = {spec.key: load(spec.name, **spec.options) for spec in rewards}
    for reward in loaded.values():
        if device is not None and isinstance(reward, torch.nn.Module):
            reward.to(device)
    return Scorer(
        loaded, settings, batch_sizes={spec.key: spec.batch_size for spec in rewards},
        specialists=[spec.key for spec in rewards if is_specialist(spec, loaded[spec.key])],
    )  # fmt: skip


def is_specialist(spec: config.Reward, reward: Any) -> bool:
    """Whether a reward applies to some prompts only: as the configuration says, or else the reward.

    Raises:
        InputError: The reward fails to say so.
    """
    if spec.specialist is not None:
        return spec.specialist
    try:
        return bool(getattr(reward, "specialist", False))
    except Exception as error:  # it is code of somebody's own
        raise InputError(
            f"The reward {spec.key!r} does not tell whether it is a specialist, but raises {_told(error)}. Say it in "
            "the configuration: specialist: true, or false."
        ) from error


def _choose(name: str, reward: Any, prompts: Sequence[Prompt]) -> tuple[list[int], list[int], str]:
    """The prompts that a reward applies to, those where it failed to say so, and why."""
    answers = [_applies(name, reward, prompt) for prompt in prompts]
    chosen = [n for n, answer in enumerate(answers) if answer is True]
    failed = [n for n, answer in enumerate(answers) if isinstance(answer, str)]
    return chosen, failed, str(answers[failed[-1]]) if failed else ""


def _applies(name: str, reward: Any, prompt: Prompt) -> bool | str:
    """Whether a reward applies to a prompt, or the error that it raised instead of an answer."""
    if not prompt.allows(name):
        return False
    try:
        return not hasattr(reward, "applies") or bool(reward.applies(prompt))
    except Exception as error:  # a reward may fail in any way, and the run goes on
        return f"applies: {_told(error)}"


def _told(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _checked(answer: Any, count: int) -> Tensor:
    values = torch.as_tensor(answer).detach().to("cpu", torch.float64)
    if values.shape != (count,):
        raise ValueError(f"it must return one number per picture, [{count}], but returned {list(values.shape)}")
    return values
