"""The HTTP server around one reward: GET /health, GET /info, POST /score, POST /applies.

One request a connection. What a stranger can make it do is bounded: connections, the time in which headers and body
must have come, their sizes, and the queue. The token is compared before a body is read.

A page in a browser on this machine reaches the server too. A request must say ``Content-Type: application/json``, which
a page cannot send to another origin unasked; but one whose name is made to point here (DNS rebinding) has the origin of
the server. So, where no token stands in the way, the ``Host`` of a request must be this machine by name or by address,
and so must its ``Origin``, if it has one.
"""

import hmac
import io
import ipaddress
import json
import re
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mogb_diffusion.errors import InputError
from mogb_diffusion.rewards import Reward
from mogb_diffusion.serving.batching import Batcher
from mogb_diffusion.serving.messages import (
    Limits,
    RequestError,
    as_json,
    decode_png,
    parse_items,
    parse_json,
    parse_prompts,
)

SHORTEST_TOKEN = 16
LINGER = 2.0  # seconds, after an answer that came before the end of the body
LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
PATHS = ("/health", "/info", "/score", "/applies")


@dataclass(frozen=True)
class Settings:
    """How a server works.

    Attributes:
        limits: Of one request.
        batch: Pictures that the reward gets at once, at most.
        wait: Seconds that a batch which is not full waits for more.
        queue: Pictures that may wait at a time; so no request may have more, whatever ``limits`` say.
        connections: At a time; further ones are told to come again.
        header_timeout: Seconds in which the headers of a request must have come,
        body_timeout: and its body.
        reward_timeout: Seconds that a request waits for its rewards.
    """

    limits: Limits = field(default_factory=Limits)
    batch: int = 32
    wait: float = 0.005
    queue: int = 512
    connections: int = 128
    header_timeout: float = 10.0
    body_timeout: float = 60.0
    reward_timeout: float = 300.0


class RewardServer:
    """Serves one reward, from :meth:`start` to :meth:`close`.

    Args:
        reward: The reward.
        name: What it is called.
        host: The address to listen on. Every other than this machine's own needs a token.
        port: 0 takes a free one.
        token: What clients must know; None lets everybody on this machine in, but no page of a browser.
        settings: Limits.

    Attributes:
        counts: Answers by status, and connections that were ``refused`` or ``broken``.

    Raises:
        InputError: The address can be reached from elsewhere and there is no token, the token is too short, or the
            port is taken.
    """

    def __init__(
        self,
        reward: Reward,
        name: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        settings: Settings | None = None,
    ) -> None:
        family, address = _resolve(host, port)
        if token is None and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            raise InputError(
                f"host={host!r} can be reached from other machines: that needs a token (--token-file, or the "
                "environment variable MOGB_REWARD_TOKEN)."
            )
        if token is not None:
            check_token(token)
        self.settings = settings or Settings()
        self.reward, self.name = reward, name
        self.counts: Counter[str] = Counter()
        self.token = token
        self.names = LOCAL | {address.partition("%")[0]}
        self.lock = threading.Lock()
        self.working = 0  # requests that are being answered
        self.batcher = Batcher(reward, batch=self.settings.batch, wait=self.settings.wait, queue=self.settings.queue)
        try:
            self._http = _Server(self, (address, port), family)
        except OSError as error:
            self.batcher.close()
            raise InputError(f"{host}:{port} cannot be listened on: {error.strerror or error}.") from error
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        """Where clients find it."""
        host, port = self._http.server_address[:2]
        return f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"

    def start(self) -> "RewardServer":
        """Begins to answer."""
        self._thread.start()
        return self

    def close(self, grace: float = 30.0) -> None:
        """Takes no more connections, answers the requests that are there, and ends."""
        until = time.monotonic() + grace
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join(grace)
        self._http.server_close()
        time.sleep(0.1)  # requests that have just come in
        while self.working and time.monotonic() < until:
            time.sleep(0.01)
        self.batcher.close(max(0.0, until - time.monotonic()))

    def __enter__(self) -> "RewardServer":
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def count(self, what: str) -> None:
        """Adds one to :attr:`counts`."""
        with self.lock:
            self.counts[what] += 1

    def health(self) -> dict[str, Any]:
        """Whether the reward is at work, and how many pictures wait.

        Raises:
            RequestError: The reward hangs (503).
        """
        busy = self.batcher.busy_for
        if busy > self.settings.reward_timeout:
            raise RequestError(503, "stuck", f"The reward has been at one call for {busy:.0f} s.")
        return {"status": "ok", "waiting": self.batcher.waiting}

    def info(self) -> dict[str, Any]:
        """What is served, and the most that one request may hold."""
        limits = replace(self.settings.limits, pictures=min(self.settings.limits.pictures, self.settings.queue))
        return {
            "reward": self.name,
            "specialist": bool(getattr(self.reward, "specialist", False)),
            "applies": hasattr(self.reward, "applies"),
            "limits": asdict(limits),
        }

    def score(self, body: bytes) -> dict[str, Any]:
        """The answer to a request for rewards."""
        pngs, prompts = parse_items(parse_json(body), self.settings.limits)
        with self.batcher.room(len(pngs)):
            pictures = [decode_png(png) for png in pngs]
            return {"rewards": as_json(self.batcher.score(pictures, prompts, self.settings.reward_timeout))}

    def applies(self, body: bytes) -> dict[str, Any]:
        """The answer to the question which prompts the reward applies to."""
        prompts = parse_prompts(parse_json(body), self.settings.limits)
        return {"applies": [self.batcher.applies(prompt) for prompt in prompts]}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, owner: RewardServer, address: tuple[str, int], family: socket.AddressFamily) -> None:
        self.owner = owner
        self.address_family = family
        self._slots = threading.BoundedSemaphore(owner.settings.connections)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # without HTTPServer's question to the name server
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        self.owner.count("refused")
        body = json.dumps(RequestError(503, "busy", "Too many connections: try again.").payload()).encode()
        head = (
            f"HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        )
        try:
            request.setblocking(False)
            request.send(head.encode() + b"Connection: close\r\n\r\n" + body)
            request.recv(65536)  # what has come, so that closing does not reset the connection
        except OSError:
            pass
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.owner.count("broken")  # the client has gone


class _Patience(io.RawIOBase):
    """Reads from a connection until a moment, however slowly it drips."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.until = 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: _Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "mogb", ""
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.settings = self.server.owner.settings
        self.patience = _Patience(self.connection)
        self.patience.until = time.monotonic() + self.settings.header_timeout
        self.rfile = io.BufferedReader(self.patience, 65536)
        self.unread = 0  # bytes of the body

    def do_GET(self) -> None:
        owner = self.server.owner
        self._answer({"/health": owner.health, "/info": lambda: self._trusted(owner.info)})

    def do_POST(self) -> None:
        owner = self.server.owner
        self._answer(
            {
                "/score": lambda: self._trusted(lambda: owner.score(self._body())),
                "/applies": lambda: self._trusted(lambda: owner.applies(self._body())),
            }
        )

    def _answer(self, paths: dict[str, Callable[[], dict[str, Any]]]) -> None:
        owner = self.server.owner
        with owner.lock:
            owner.working += 1
        try:
            try:
                self.unread = self._length() or 0
                self._refuse_pages()
                status, payload, headers = 200, self._find(paths)(), {}
            except RequestError as error:
                status, payload, headers = error.status, error.payload(), error.headers
            except Exception as error:  # whatever else a request may do
                unforeseen = RequestError(500, "internal", f"The server failed: {type(error).__name__}.")
                status, payload, headers = 500, unforeseen.payload(), {}
            self._reply(status, payload, headers)
        finally:
            with owner.lock:
                owner.working -= 1

    def _find(self, paths: dict[str, Callable[[], dict[str, Any]]]) -> Callable[[], dict[str, Any]]:
        if self.path in paths:
            return paths[self.path]
        if self.path in PATHS:
            raise RequestError(405, "bad_method", f"{self.command} is not for {self.path}.")
        raise RequestError(404, "not_found", f"There are {', '.join(PATHS)}.")

    def _refuse_pages(self) -> None:
        """Without a token: refuses what a page in a browser may have sent."""
        owner = self.server.owner
        if owner.token is not None:
            return
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not _is_one_of(owner.names, hosts[0]):
            raise RequestError(403, "bad_host", "Without a token the Host must be localhost, 127.0.0.1 or [::1].")
        for origin in self.headers.get_all("Origin", []):
            scheme, _, authority = origin.partition("://")
            if scheme not in ("http", "https") or not _is_one_of(owner.names, authority):
                raise RequestError(403, "bad_origin", "Without a token the Origin must be of this machine.")

    def _trusted(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The work, for somebody who knows the token."""
        token = self.server.owner.token
        given = self.headers.get("Authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise RequestError(401, "bad_token", "The token is missing or wrong.", {"WWW-Authenticate": "Bearer"})
        return work()

    def _length(self) -> int | None:
        """The length of the body; None if the request does not say."""
        values = self.headers.get_all("Content-Length", [])
        if not values:
            return None
        if len(set(values)) > 1 or not (values[0].isascii() and values[0].isdigit() and len(values[0]) < 16):
            raise RequestError(400, "bad_length", "Content-Length is no number.")
        return int(values[0])

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding"):
            raise RequestError(411, "no_length", "Send the body in one piece, with its Content-Length.")
        length = self._length()
        if length is None:
            raise RequestError(411, "no_length", "The request must have a Content-Length.")
        if self.headers.get_content_type() != "application/json":
            raise RequestError(415, "bad_type", "The Content-Type must be application/json.")
        if length > self.settings.limits.body:
            raise RequestError(
                413, "too_large", f"{length} bytes are more than {self.settings.limits.body}: send fewer."
            )
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        self.patience.until = time.monotonic() + self.settings.body_timeout
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            self.unread = 0
            raise RequestError(408, "too_slow", "The body did not come in time.") from None
        self.unread = 0
        if len(body) < length:
            raise RequestError(400, "truncated", f"The body has {len(body)} bytes, and not {length} as it says.")
        return body

    def _reply(self, status: int, payload: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self.close_connection = True
        self.server.owner.count(str(status))
        body = json.dumps(payload, allow_nan=False).encode()
        self.connection.settimeout(self.settings.header_timeout)
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close",
            **(headers or {}),
        }.items():  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
        self._drain()

    def _drain(self) -> None:
        """Reads on for a moment: closing with unread bytes would take the answer back."""
        left = self.unread
        self.patience.until = time.monotonic() + LINGER
        try:
            while left > 0 and (part := self.rfile.read1(min(left, 65536))):
                left -= len(part)
        except OSError:
            pass

    def handle_expect_100(self) -> bool:
        return True  # said once the rest of the headers is fine

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class finds wrong with a request, as JSON."""
        self._reply(int(code), RequestError(int(code), "bad_request", message or "The request is malformed.").payload())

    def log_message(self, format: str, *args: Any) -> None:
        pass  # counted instead


def check_token(token: str) -> None:
    """Refuses a token that is short, or cannot be sent.

    Raises:
        InputError: It is one.
    """
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(
            f"The token must have at least {SHORTEST_TOKEN} letters, digits or signs and no spaces. One is made by "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))'."
        )


def _is_one_of(names: Collection[str], authority: str) -> bool:
    """Whether ``HOST`` or ``HOST:PORT`` has one of these hosts, at any port."""
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^\s:\[\]]+))(?::[0-9]{0,5})?", authority.strip().lower())
    return found is not None and (found[1] or found[2]) in names


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, str]:
    """The numeric address of a host."""
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 65536:
        raise InputError(f"port must be a whole number from 0 to 65535, but got {port!r}.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InputError(f"host={host!r} is no address of this machine: {error}.") from error
    return family, str(address[0])
