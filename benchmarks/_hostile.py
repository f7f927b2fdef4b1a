"""Requests that no honest client sends, byte by byte, and what a reward server must answer to each."""

import base64
import json
import pickle
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Hostile(NamedTuple):
    """A request.

    Attributes:
        name: What is wrong with it.
        request: Its bytes.
        statuses: The answers that are right; 0 is a closed connection without one.
        hold: Whether the client keeps the connection open and waits, instead of saying that it is done.
    """

    name: str
    request: bytes
    statuses: tuple[int, ...]
    hold: bool = True


class Bomb:
    """Writes a file if it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.trace, "executed")


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, rows: bytes | None = None, extra: bytes = b"", color: int = 2, depth: int = 8
) -> bytes:
    """A PNG whose header says so; black if no rows are given."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    rows = bytes((1 + 3 * width) * height) if rows is None else rows
    return SIGNATURE + header + extra + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def item(picture: bytes, **more: Any) -> dict[str, Any]:
    """One picture of a request."""
    return {"png": base64.b64encode(picture).decode(), "text": "a sign", "target_text": "A", "metadata": {}} | more


def request(
    body: bytes, *, token: str | None = None, path: str = "/score", head: str = "", length: Any = None
) -> bytes:
    """An HTTP request around a body."""
    lines = [
        f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body) if length is None else length}",
        "Content-Type: application/json", *([f"Authorization: Bearer {token}"] if token else []),
    ]  # fmt: skip
    return ("\r\n".join(lines) + "\r\n" + head + "\r\n").encode("latin-1") + body


def hostile_requests(trace: Path, token: str | None = None) -> Iterator[Hostile]:
    """All of them, for a server of ``world_alignment``, with the usual limits.

    Args:
        trace: A file that appears if anything in a request is executed.
        token: Of the server.
    """
    fine = json.dumps({"items": [item(png(16, 16))]}).encode()

    def items(*given: Any, **more: Any) -> bytes:
        return request(json.dumps({"items": list(given)} | more).encode(), token=token)

    def raw(body: bytes, **options: Any) -> bytes:
        return request(body, token=token, **options)

    bomb = pickle.dumps(Bomb(trace))
    big = bytes(40 * 2**20)
    # what is no HTTP, or only half of it
    yield Hostile("no HTTP at all", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n", (400,))
    yield Hostile("a pickle instead of HTTP", bomb + b"\r\n\r\n", (400, 0))
    yield Hostile("a line without end", b"GET /" + b"a" * 100_000, (400, 414, 0))
    yield Hostile("a thousand headers", raw(fine, head="".join(f"X-{n}: 1\r\n" for n in range(1000))), (431,))
    yield Hostile("an endless header", raw(fine, head=f"X: {'a' * 100_000}\r\n"), (431,))
    yield Hostile("nothing", b"", (0,), hold=False)
    yield Hostile("half of the headers", b"POST /score HTTP/1.1\r\nContent-Le", (401, 403, 411), hold=False)
    yield Hostile("another method", b"DELETE /score HTTP/1.1\r\nHost: localhost\r\n\r\n", (501,))
    yield Hostile("a method for another path", b"GET /score HTTP/1.1\r\nHost: localhost\r\n\r\n", (405,))
    # lengths
    yield Hostile("a truncated body", raw(fine[:-40], length=len(fine)), (400,), hold=False)
    yield Hostile("a length that is too short", raw(fine, length=len(fine) - 3), (400,))
    yield Hostile("a negative length", raw(fine, length=-1), (400,))
    yield Hostile("a length in words", raw(fine, length="many"), (400,))
    yield Hostile("a length of a thousand digits", raw(fine, length="9" * 1000), (400,))
    yield Hostile("two lengths", raw(fine, head="Content-Length: 5\r\n"), (400,))
    yield Hostile("a body of a terabyte", raw(fine, length=10**12), (413,))
    yield Hostile("chunks", raw(fine, head="Transfer-Encoding: chunked\r\n"), (411,))
    # paths
    for path in (
        "/../../etc/passwd",
        "/score/../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/score?x=1",
        "/score/",
    ):
        yield Hostile(f"the path {path}", raw(fine, path=path), (404,))
    # JSON
    yield Hostile("no JSON", raw(b"{'items': __import__('os')}"), (400,))
    yield Hostile("no UTF-8", raw(b"\xff\xfe\x00"), (400,))
    yield Hostile("a pickle for JSON", raw(bomb), (400,))
    yield Hostile("deep JSON", raw(b"[" * 1_000_000), (400,))
    yield Hostile("deep JSON that ends", raw(b'{"items":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), (400,))
    yield Hostile("a number of a million digits", raw(b'{"items": ' + b"9" * 1_000_000 + b"}"), (400,))
    yield Hostile("a number like 1e999999", raw(b'{"items": 1e999999}'), (400,))
    yield Hostile("NaN", raw(b'{"items": NaN}'), (400,))
    for given in (None, 7, "x", [], {}, {"items": []}, {"items": 3}, {"items": [3]}, {"items": [[]]}):
        yield Hostile(f"the JSON {json.dumps(given)}", raw(json.dumps(given).encode()), (422,))
    yield Hostile("an unknown key", items(item(png(16, 16)), reward="os:system"), (422,))
    yield Hostile("an unknown key of an item", items(item(png(16, 16), __class__="os")), (422,))
    yield Hostile("a name of a file for a picture", items(item(b"") | {"png": "../../../../etc/passwd"}), (422,))
    yield Hostile("a prompt that is a list", items(item(png(16, 16), text=["a"])), (422,))
    yield Hostile("metadata that are a text", items(item(png(16, 16), metadata="a")), (422,))
    yield Hostile(
        "metadata that the reward refuses", items(item(png(16, 16), metadata={"include": 7}, target_text=None)), (422,)
    )
    yield Hostile("a prompt of a megabyte", items(item(png(16, 16), text="a" * 2**20)), (413,))
    yield Hostile("a thousand pictures", items(*[item(png(16, 16))] * 1000), (413,))
    # pictures
    yield Hostile("a pickle for a picture", items(item(bomb)), (422,))
    yield Hostile("a pickle after a PNG", items(item(png(16, 16) + bomb)), (422,))
    yield Hostile("no base64", items(item(b"") | {"png": "%%%"}), (422,))
    yield Hostile("an empty picture", items(item(b"")), (422,))
    yield Hostile("a GIF", items(item(b"GIF89a" + bytes(200))), (422,))
    yield Hostile("a PNG that is cut", items(item(png(16, 16)[:-30])), (422,))
    yield Hostile("a PNG of noise", items(item(SIGNATURE + png(16, 16)[8:33] + bytes(200))), (422,))
    yield Hostile("a PNG of another size than its rows", items(item(png(16, 16, rows=bytes(10)))), (422,))
    yield Hostile("a PNG of 100 gigapixels by its header", items(item(png(2**31 - 1, 50, rows=b"\x00"))), (413,))
    yield Hostile("a PNG without pixels", items(item(png(0, 16, rows=b""))), (422,))
    yield Hostile("a PNG that unpacks to far more than it says", items(item(png(16, 16, rows=big))), (200,))
    bomb_of_text = chunk(b"zTXt", b"x\x00\x00" + zlib.compress(big, 9))
    yield Hostile("a PNG with a zip bomb for a comment", items(item(png(16, 16, extra=bomb_of_text))), (200,))
    bomb_of_colors = chunk(b"iCCP", b"x\x00\x00" + zlib.compress(big, 9))
    yield Hostile("a PNG with a zip bomb for a profile", items(item(png(16, 16, extra=bomb_of_colors))), (200,))
    yield Hostile("a PNG of 16 bits", items(item(png(16, 16, depth=16))), (422,))
    yield Hostile("a picture of another size than the reward takes", items(item(png(17, 16))), (422,))
    yield Hostile("one bad picture among good ones", items(item(png(16, 16)), item(b"GIF")), (422,))
    # who is asking
    yield Hostile("a form of a browser", raw(fine).replace(b"application/json", b"text/plain"), (415,))
    if token is not None:
        yield Hostile("no token", request(fine), (401,))
        yield Hostile("a wrong token", request(fine, token="x" * len(token)), (401,))
        yield Hostile("a token of bytes", request(fine, head="Authorization: Bearer \xff\xfe\r\n"), (401,))
        yield Hostile(
            "a wrong token and a body of 30 MB that comes", request(bytes(30 * 2**20), token="wrong"), (401, 0)
        )
