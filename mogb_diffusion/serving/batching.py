"""One reward, and many requests at once: their pictures are scored together, one batch after another.

The queue is bounded by pictures; who finds it full is told when to come again. A batch that fails is tried again
request by request, so that a picture which the reward cannot take costs the others nothing.
"""

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mogb_diffusion import checks
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rewards import Reward
from mogb_diffusion.serving.messages import RequestError


@dataclass(eq=False)
class Job:
    """The pictures of one request."""

    pictures: list[Tensor]  # uint8 [3, H, W]
    prompts: list[Prompt]
    rewards: list[float]
    left: int
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    abandoned: bool = False


@dataclass(eq=False)
class _Item:
    job: Job
    index: int
    since: float

    @property
    def picture(self) -> Tensor:
        return self.job.pictures[self.index]

    @property
    def prompt(self) -> Prompt:
        return self.job.prompts[self.index]


class Batcher:
    """Scores the pictures of many threads in one thread of its own.

    Args:
        reward: The reward.
        batch: Pictures at once, at most.
        wait: Seconds that a batch which is not full waits for more.
        queue: Pictures that may wait, or be scored, at a time; so no request may have more.

    Attributes:
        counts: ``pictures``, ``batches``, and ``failed batches``.

    Raises:
        InputError: ``batch`` or ``queue`` is no positive whole number.
    """

    def __init__(self, reward: Reward, *, batch: int = 32, wait: float = 0.005, queue: int = 512) -> None:
        self.reward = reward
        self.batch, self.queue = checks.whole_number("batch", batch), checks.whole_number("queue", queue)
        self.wait = wait
        self.counts: Counter[str] = Counter()
        self._items: deque[_Item] = deque()
        self._changed = threading.Condition()
        self._reserved = 0
        self._closing = False
        self._busy_since = 0.0  # of the present call of the reward; 0 between calls
        self._seconds = 0.05  # per picture, lately
        self._thread = threading.Thread(target=self._run, daemon=True, name="reward")
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Pictures that wait or are scored."""
        return self._reserved

    @property
    def busy_for(self) -> float:
        """Seconds since the present call of the reward began; 0 between calls."""
        since = self._busy_since
        return time.monotonic() - since if since else 0.0

    def applies(self, prompt: Prompt) -> bool:
        """Whether the reward judges pictures of this prompt.

        Raises:
            RequestError: The reward cannot make sense of the prompt.
        """
        if not hasattr(self.reward, "applies"):
            return True
        try:
            return bool(self.reward.applies(prompt))
        except Exception as error:
            raise explained(error) from error

    @contextmanager
    def room(self, pictures: int) -> Iterator[None]:
        """Room in the queue, before anything is decoded.

        Raises:
            RequestError: There is none now (503), or never will be (413).
        """
        if pictures > self.queue:
            raise RequestError(413, "too_many", f"{pictures} pictures are more than {self.queue}: send fewer.")
        with self._changed:
            if self._closing or self._reserved + pictures > self.queue:
                seconds = math.ceil(min(60.0, max(1.0, self._reserved * self._seconds)))
                raise RequestError(503, "busy", "The queue is full: try again.", {"Retry-After": str(seconds)})
            self._reserved += pictures
        try:
            yield
        finally:
            with self._changed:
                self._reserved -= pictures

    def score(self, pictures: Sequence[Tensor], prompts: Sequence[Prompt], timeout: float) -> list[float]:
        """The rewards of the pictures of one request; NaN where the reward does not apply.

        Raises:
            RequestError: The reward failed (422: on this input, 500), or took too long (504).
        """
        chosen = [index for index, prompt in enumerate(prompts) if self.applies(prompt)]
        job = Job(list(pictures), list(prompts), [math.nan] * len(prompts), len(chosen))
        if not chosen:
            return job.rewards
        now = time.monotonic()
        with self._changed:
            self._items.extend(_Item(job, index, now) for index in chosen)
            self._changed.notify()
        if not job.done.wait(timeout):
            with self._changed:
                job.abandoned = True
                self._items = deque(item for item in self._items if item.job is not job)
            raise RequestError(504, "too_slow", f"The reward took longer than {timeout:g} s.")
        if job.error is not None:
            raise explained(job.error)
        return job.rewards

    def close(self, grace: float = 10.0) -> None:
        """Scores what is queued, and ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(grace)

    def _run(self) -> None:
        with torch.no_grad():
            while (items := self._next()) is not None:
                self._judge(items)

    def _next(self) -> list[_Item] | None:
        """The next batch: pictures of one size, in the order in which they came; None at the end."""
        with self._changed:
            while True:
                if self._items:
                    shape = self._items[0].picture.shape
                    found = [item for item in self._items if item.picture.shape == shape][: self.batch]
                    left = self._items[0].since + self.wait - time.monotonic()
                    if len(found) == self.batch or left <= 0 or self._closing:
                        taken = set(map(id, found))
                        self._items = deque(item for item in self._items if id(item) not in taken)
                        return found
                    self._changed.wait(left)
                elif self._closing:
                    return None
                else:
                    self._changed.wait()

    def _judge(self, items: list[_Item]) -> None:
        begun = self._busy_since = time.monotonic()
        try:
            values = self._call(items)
        except BaseException as error:  # a reward may fail in any way, and the server goes on
            self.counts["failed batches"] += 1
            jobs = {id(item.job): item.job for item in items}
            if len(jobs) == 1:
                for job in jobs.values():
                    job.error = error
                    job.done.set()
            else:
                for job in jobs.values():
                    self._judge([item for item in items if item.job is job])
            return
        finally:
            self._busy_since = 0.0
        self.counts["pictures"] += len(items)
        self.counts["batches"] += 1
        self._seconds = 0.8 * self._seconds + 0.2 * (time.monotonic() - begun) / len(items)
        for item, value in zip(items, values, strict=True):
            item.job.rewards[item.index] = value
            item.job.left -= 1
            if item.job.left == 0:
                item.job.done.set()

    def _call(self, items: Sequence[_Item]) -> list[float]:
        images = torch.stack([item.picture for item in items]).float() / 255
        values = torch.as_tensor(self.reward(images, [item.prompt for item in items])).detach().cpu().double()
        if values.shape != (len(items),):
            raise RuntimeError(f"the reward gave {list(values.shape)} numbers for {len(items)} pictures")
        numbers: list[float] = values.tolist()
        return numbers


def explained(error: BaseException) -> RequestError:
    """What a client is told about a failure of the reward: bad input is its own fault, anything else is not."""
    if isinstance(error, RequestError):
        return error
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if isinstance(error, (ValueError, TypeError, LookupError)):
        return RequestError(422, "refused", f"The reward refuses this: {reason}")
    return RequestError(500, "failed", f"The reward failed: {reason}")
