"""A reward that another process, or another machine, serves with ``mogb-diffusion serve-reward``.

Pictures travel as PNG, so they are rounded to 8 bits: a reward that looks at 8 bits anyway, as most do, gives exactly
the numbers that it gives here; one that looks at floats (``clip``, ``hpsv2``) gives those of the rounded picture.
"""

import base64
import json
import math
import os
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mogb_diffusion import checks
from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import Prompt, in_batches
from mogb_diffusion.rewards._clip import Pictures, eight_bit
from mogb_diffusion.rewards._http import Client, RemoteError, all_at_once, as_png

TOKEN_VARIABLE = "MOGB_REWARD_TOKEN"
REMEMBERED = 65536  # prompts


class Remote:
    """The reward behind a URL.

    It is a specialist, and has ``applies``, exactly if the reward there is and has. Pictures whose request failed are
    NaN; if every request of a call fails, the call fails.

    Args:
        url: As ``serve-reward`` prints it.
        token: What the server wants to hear. Configurations are written into the folder of a run: better give it as
        token_file: or leave it to the environment variable ``MOGB_REWARD_TOKEN``.
        timeout: Seconds that one attempt may take, the queue of the server included.
        retries: Attempts after the first one.
        batch: Pictures in a request.
        concurrency: Requests at once.
        seed: Of the jitter in the pauses between attempts.

    Attributes:
        name: What the server calls the reward.
        counts: Of the requests (:class:`~mogb_diffusion.rewards._http.Client`).

    Raises:
        InputError: The server cannot be reached or is none of ours; an impossible option.
    """

    specialist: bool

    def __init__(
        self,
        url: str,
        token: str | None = None,
        token_file: str | None = None,
        timeout: float = 120.0,
        retries: int = 6,
        batch: int = 16,
        concurrency: int = 4,
        seed: int = 0,
    ) -> None:
        self.client = Client(url, token=find_token(token, token_file), timeout=timeout, retries=retries, seed=seed)
        self.concurrency = checks.whole_number("concurrency", concurrency)
        checks.whole_number("batch", batch)
        try:
            info = self.client.get("/info")
            limits = info["limits"]
            self.name, self.specialist, asks = str(info["reward"]), bool(info["specialist"]), bool(info["applies"])
            self.batch, self._pixels = min(batch, int(limits["pictures"])), int(limits["pixels"])
        except RemoteError as error:
            raise InputError(f"The reward at {url} cannot be used: {error}. Is serve-reward running there?") from error
        except (LookupError, TypeError, ValueError) as error:
            raise InputError(f"{url} is no server of mogb-diffusion serve-reward.") from error
        self._applies: dict[str, bool] = {}
        self._lock = threading.Lock()
        if asks:
            self.applies = self._ask

    @property
    def counts(self) -> Counter[str]:
        return self.client.counts

    def __call__(self, images: Pictures, prompts: Sequence[Prompt]) -> Tensor:
        """The rewards ``[B]``, float64.

        Raises:
            RemoteError: Every request failed.
            InputError: One picture is larger than the server takes.
        """
        pictures = eight_bit(images)
        pixels = pictures.shape[2] * pictures.shape[3]
        if pixels > self._pixels:
            raise InputError(f"A picture of {pixels} pixels is larger than the server takes: {self._pixels}.")
        size = max(1, min(self.batch, self._pixels // max(1, pixels)))
        parts = list(in_batches(range(len(prompts)), size))
        answers = all_at_once(
            lambda part: self._score([pictures[n] for n in part], [prompts[n] for n in part]), parts, self.concurrency
        )
        rewards = torch.full((len(prompts),), math.nan, dtype=torch.float64)
        for part, answer in zip(parts, answers, strict=True):
            if not isinstance(answer, RemoteError):
                rewards[list(part)] = torch.tensor(answer, dtype=torch.float64)
        return rewards

    def _score(self, pictures: Sequence[Tensor], prompts: Sequence[Prompt]) -> list[float]:
        items = [
            {"png": base64.b64encode(as_png(picture)).decode()} | _fields(prompt)
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        answer = self.client.post("/score", {"items": items})
        try:
            rewards = [math.nan if reward is None else float(reward) for reward in answer["rewards"]]
        except (LookupError, TypeError, ValueError):
            rewards = []
        if len(rewards) != len(prompts):
            self.client.count("failed answer")
            raise RemoteError(f"{self.client.url} did not answer with {len(prompts)} rewards", "answer")
        return rewards

    def _ask(self, prompt: Prompt) -> bool:
        """Whether the reward applies to a prompt; asked once.

        If the server does not answer, the answer is yes: the call that follows fails, and is counted.
        """
        key = json.dumps(_fields(prompt), sort_keys=True)
        with self._lock:
            if key in self._applies:
                return self._applies[key]
        try:
            answer = bool(self.client.post("/applies", {"prompts": [_fields(prompt)]})["applies"][0])
        except (RemoteError, LookupError, TypeError):
            return True
        with self._lock:
            if len(self._applies) >= REMEMBERED:
                self._applies.clear()
            self._applies[key] = answer
        return answer


def find_token(token: str | None, file: str | None) -> str | None:
    """The token: itself, of a file, or of the environment; None if there is none.

    Raises:
        InputError: Two are given, or the file cannot be read.
    """
    if token is not None and file is not None:
        raise InputError("Give token or token_file, not both.")
    if file is not None:
        try:
            token = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The token file {file} cannot be read: {error}.") from error
        if not token:
            raise InputError(f"The token file {file} is empty.")
    return token or os.environ.get(TOKEN_VARIABLE) or None


def _fields(prompt: Prompt) -> dict[str, Any]:
    return {"text": prompt.text, "target_text": prompt.target_text, "metadata": prompt.metadata}
