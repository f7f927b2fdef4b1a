"""What a request may hold. Everything here is written by somebody else, and is looked at before it is used.

A request is ``{"items": [{"png": BASE64, "text": ..., "target_text": ..., "metadata": {...}}, ...]}``; its answer is
``{"rewards": [0.5, null, ...]}``, in the same order, with null where the reward does not apply or is not finite.
Nothing is unpickled, and no name in a request is a path or a module. A PNG is measured by its header before it is
decoded; its text, profiles and animations are not looked at.
"""

import base64
import binascii
import io
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mogb_diffusion.prompts import Prompt

SIGNATURE = b"\x89PNG\r\n\x1a\n"
NEEDED = (b"IHDR", b"PLTE", b"IDAT", b"IEND")  # the chunks that the pixels are made of
COLOR_TYPES = (0, 2, 3)  # grey, RGB, palette
LONGEST_NUMBER = 64  # digits
KEYS = {"png", "text", "target_text", "metadata"}


@dataclass(frozen=True)
class Limits:
    """The most that one request may hold.

    Attributes:
        body: Bytes.
        pictures: How many.
        pixels: Of all of its pictures together.
        text: Characters of a prompt, and of its target text.
        metadata: Characters of a prompt's metadata as JSON.
    """

    body: int = 32 * 2**20
    pictures: int = 64
    pixels: int = 2**24
    text: int = 4096
    metadata: int = 16384


class RequestError(Exception):
    """Why a request cannot be answered; it becomes the answer.

    Attributes:
        status: The HTTP status.
        code: One word for programs.
    """

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.headers = dict(headers or {})

    def payload(self) -> dict[str, Any]:
        """As JSON."""
        return {"error": {"code": self.code, "message": str(self)}}


def parse_json(body: bytes) -> Any:
    """The JSON of a body.

    Raises:
        RequestError: It is none, or one that is nested or has numbers beyond reason.
    """
    try:
        return json.loads(
            body.decode("utf-8"), parse_int=_whole_number, parse_float=_number, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise RequestError(400, "bad_json", "The JSON is nested too deeply.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise RequestError(400, "bad_json", f"The body is no JSON: {_short(error)}.") from None


def parse_prompts(payload: Any, limits: Limits) -> list[Prompt]:
    """Of a question which prompts the reward applies to: ``{"prompts": [{"text": ...}, ...]}``."""
    return [_prompt(item, limits, KEYS - {"png"}) for item in _items(payload, "prompts", limits)]


def parse_items(payload: Any, limits: Limits) -> tuple[list[bytes], list[Prompt]]:
    """The encoded pictures and the prompts of a request.

    Raises:
        RequestError: It has another form, or is too large.
    """
    items = _items(payload, "items", limits)
    prompts = [_prompt(item, limits, KEYS) for item in items]
    pngs = []
    for item in items:
        if not isinstance(item.get("png"), str):
            raise RequestError(422, "bad_request", "Every item must have a 'png', a PNG in base64.")
        try:
            pngs.append(base64.b64decode(item["png"], validate=True))
        except (binascii.Error, ValueError):
            raise RequestError(422, "bad_picture", "'png' is no base64.") from None
    pixels = sum(math.prod(png_size(png)) for png in pngs)
    if pixels > limits.pixels:
        raise RequestError(413, "too_many_pixels", f"{pixels} pixels are more than {limits.pixels}: send fewer.")
    return pngs, prompts


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height by the header alone.

    Raises:
        RequestError: It is no PNG of 8 bits without transparency.
    """
    if data[:8] != SIGNATURE or data[8:16] != b"\x00\x00\x00\rIHDR" or len(data) < 33:
        raise RequestError(422, "bad_picture", "The picture is no PNG.")
    width, height, depth, color = struct.unpack(">IIBB", data[16:26])
    if depth != 8 or color not in COLOR_TYPES:
        raise RequestError(422, "bad_picture", "The picture must be a PNG of 8 bits without transparency.")
    if width < 1 or height < 1:
        raise RequestError(422, "bad_picture", "The picture is empty.")
    return width, height


def decode_png(data: bytes) -> Tensor:
    """The picture, uint8 ``[3, H, W]``. Measure it with :func:`png_size` before.

    Raises:
        RequestError: It is damaged.
    """
    from PIL import Image

    width, height = png_size(data)
    try:
        with Image.open(io.BytesIO(_only_pixels(data)), formats=["PNG"]) as image:
            if image.size != (width, height):
                raise ValueError("two headers")
            array = np.asarray(image.convert("RGB"))
    except Exception as error:  # whatever a damaged file does to the library
        raise RequestError(422, "bad_picture", f"The picture cannot be decoded: {_short(error)}.") from None
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def as_json(rewards: Sequence[float]) -> list[float | None]:
    """Rewards for an answer: null for what JSON cannot say."""
    return [reward if math.isfinite(reward) else None for reward in rewards]


def _only_pixels(data: bytes) -> bytes:
    """The file without the chunks that hold no pixels."""
    kept, place = [SIGNATURE], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        end = place + 12 + length
        if end > len(data):
            raise ValueError("it is truncated")
        if data[place + 4 : place + 8] in NEEDED:
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def _items(payload: Any, name: str, limits: Limits) -> list[Mapping[str, Any]]:
    if not isinstance(payload, dict) or set(payload) != {name} or not isinstance(payload[name], list):
        raise RequestError(422, "bad_request", f'The request must be {{"{name}": [...]}}.')
    items = payload[name]
    if not items:
        raise RequestError(422, "bad_request", f"{name!r} is empty.")
    if len(items) > limits.pictures:
        raise RequestError(413, "too_many", f"{len(items)} {name} are more than {limits.pictures}: send fewer.")
    if not all(isinstance(item, dict) for item in items):
        raise RequestError(422, "bad_request", f"{name!r} must hold objects.")
    return items


def _prompt(item: Mapping[str, Any], limits: Limits, known: set[str]) -> Prompt:
    if unknown := sorted(set(item) - known):
        raise RequestError(
            422, "bad_request", f"Unknown key {unknown[0][:40]!r}. Known ones: {', '.join(sorted(known))}."
        )
    text, target, metadata = item.get("text"), item.get("target_text"), item.get("metadata", {})
    if not isinstance(text, str) or not (target is None or isinstance(target, str)):
        raise RequestError(422, "bad_request", "'text' must be a string, and 'target_text' one or null.")
    if not isinstance(metadata, dict):
        raise RequestError(422, "bad_request", "'metadata' must be an object.")
    if max(len(text), len(target or "")) > limits.text:
        raise RequestError(413, "too_long", f"A text is longer than {limits.text} characters.")
    if len(json.dumps(metadata)) > limits.metadata:
        raise RequestError(413, "too_long", f"The metadata is longer than {limits.metadata} characters.")
    return Prompt(text, metadata=metadata, target_text=target)


def _whole_number(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError("a number is too long")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits) if len(digits) <= LONGEST_NUMBER else math.inf
    if not math.isfinite(value):
        raise ValueError("a number is too long, or too large")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not in JSON")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120].rstrip(".") or type(error).__name__
