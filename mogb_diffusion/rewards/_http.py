"""Rewards that live elsewhere: JSON over HTTP, with retries. Only the standard library, and no pickle.

A request is tried again after a lost connection, a timeout, and the statuses that say "later"; the pauses grow, with
jitter, and are at least what the server's ``Retry-After`` asks for. Redirects are not followed, so that a token goes to
one address only.
"""

import email.utils
import http.client
import io
import json
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import Any, TypeVar

from torch import Tensor

from mogb_diffusion import checks
from mogb_diffusion.errors import InputError

LATER = frozenset({408, 425, 429, 500, 502, 503, 504})
LARGEST_ANSWER = 16 * 2**20  # bytes
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0  # seconds

T = TypeVar("T")
U = TypeVar("U")


class RemoteError(RuntimeError):
    """A request that failed for good.

    Attributes:
        kind: ``"status"``, ``"connection"``, ``"timeout"`` or ``"answer"`` (no JSON, or too much of it).
        status: Of the answer, if there was one.
    """

    def __init__(self, message: str, kind: str, status: int | None = None, pause: float = 0.0) -> None:
        super().__init__(message)
        self.kind, self.status, self.pause = kind, status, pause

    @property
    def passing(self) -> bool:
        """Whether another attempt may succeed."""
        return self.kind in ("connection", "timeout") or self.status in LATER


class Client:
    """Talks JSON with one server; may be used by many threads.

    Args:
        url: Of the server; paths are appended.
        token: Sent as ``Authorization: Bearer``.
        timeout: Seconds that one attempt may take.
        retries: Attempts after the first one.
        seed: Of the jitter.

    Attributes:
        counts: Attempts (``requests``), ``retries``, and failures for good by kind (``failed status``, ...).

    Raises:
        InputError: An impossible option.
    """

    def __init__(
        self, url: str, *, token: str | None = None, timeout: float = 60.0, retries: int = 4, seed: int = 0
    ) -> None:
        if "@" in url.rpartition("://")[2].partition("/")[0]:
            raise InputError("url must hold no name and no password before its host: secrets belong into a token.")
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"url must be http://HOST:PORT or https://HOST, but got {url!r}.")
        if token and not (str(token).isascii() and str(token).isprintable()):
            raise InputError("The token must be of printable ASCII characters: others cannot be sent.")
        try:
            self.timeout = checks.number("timeout", timeout, above=0)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error
        self.url = url.rstrip("/")
        self.retries = checks.whole_number("retries", retries, low=0)
        self.counts: Counter[str] = Counter()
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        direct = parts.hostname == "localhost" or parts.hostname.startswith("127.") or parts.hostname == "::1"
        proxies = [urllib.request.ProxyHandler({})] if direct else []
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def get(self, path: str) -> Any:
        """The JSON at a path.

        Raises:
            RemoteError: It cannot be had.
        """
        return self._patiently(path, None)

    def post(self, path: str, payload: Any) -> Any:
        """The JSON that is answered to this one.

        Raises:
            RemoteError: It cannot be had.
        """
        return self._patiently(path, json.dumps(payload, allow_nan=False).encode())

    def count(self, what: str, number: int = 1) -> None:
        """Adds to :attr:`counts`."""
        with self._lock:
            self.counts[what] += number

    def _patiently(self, path: str, body: bytes | None) -> Any:
        attempt = 0
        while True:
            self.count("requests")
            try:
                return self._once(path, body)
            except RemoteError as error:
                if attempt >= self.retries or not error.passing:
                    self.count(f"failed {error.kind}")
                    raise
                pause = max(error.pause, self._pause(attempt))
            self.count("retries")
            time.sleep(min(pause, LONGEST_PAUSE))
            attempt += 1

    def _pause(self, attempt: int) -> float:
        """Between half of and the whole of a time that doubles."""
        with self._lock:
            part = self._random.uniform(0.5, 1)
        return part * min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)

    def _once(self, path: str, body: bytes | None) -> Any:
        address = self.url + path
        request = urllib.request.Request(address, body, self._headers, method="GET" if body is None else "POST")
        until = time.monotonic() + self.timeout
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                content = _read(answer, until)
        except urllib.error.HTTPError as error:
            with error:
                raise RemoteError(
                    f"{address} answered {error.code}: {_reason(error)}", "status", error.code,
                    _retry_after(error.headers.get("Retry-After")),
                ) from None  # fmt: skip
        except TimeoutError as error:
            raise RemoteError(f"{address} did not answer within {self.timeout:g} s", "timeout") from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise RemoteError(f"{address} did not answer within {self.timeout:g} s", "timeout") from error
            raise RemoteError(f"{address} cannot be reached: {error.reason}", "connection") from error
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise RemoteError(f"{address} broke off: {reason}", "connection") from error
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RemoteError(f"{address} answered no JSON: {content[:80]!r}", "answer") from error


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None  # then it is an error with its status


def _read(answer: Any, until: float) -> bytes:
    """All of an answer, however slowly it drips, until the time is over."""
    parts, size = [], 0
    while part := answer.read1(65536):
        parts.append(part)
        size += len(part)
        if size > LARGEST_ANSWER:
            raise RemoteError(f"the answer is larger than {LARGEST_ANSWER} bytes", "answer")
        if time.monotonic() > until:
            raise TimeoutError
    if answer.length:  # of the bytes that were promised
        raise http.client.IncompleteRead(b"".join(parts), answer.length)
    return b"".join(parts)


def _reason(error: urllib.error.HTTPError) -> str:
    """What the server says, in one line."""
    try:
        said = error.read(4096).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        said = ""
    try:
        told = json.loads(said)["error"]
        said = str(told["message"] if isinstance(told, Mapping) else told)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return " ".join(said.split())[:200] or str(error.reason)


def _retry_after(value: str | None) -> float:
    """Seconds: the header is a number of them, or a date."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(int(value)))
    except ValueError:
        pass
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())


def all_at_once(call: Callable[[T], U], items: Sequence[T], threads: int) -> list[U | RemoteError]:
    """The results of calls in parallel, in the order of the items; a request that failed gives its error.

    Raises:
        RemoteError: All of them failed; the last error.
    """

    def careful(item: T) -> U | RemoteError:
        try:
            return call(item)
        except RemoteError as error:
            return error

    if not items:
        return []
    with ThreadPoolExecutor(min(threads, len(items)), thread_name_prefix="request") as pool:
        results = list(pool.map(careful, items))
    errors = [result for result in results if isinstance(result, RemoteError)]
    if len(errors) == len(items):
        raise errors[-1]
    return results


def as_png(picture: Tensor, size: int | None = None) -> bytes:
    """One picture, uint8 ``[3, H, W]``, as a PNG; resized to a square of ``size`` pixels if that is given."""
    from PIL import Image

    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
