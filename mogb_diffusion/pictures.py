"""Folders of pictures with prompts, of whatever model: who asked for what, and the pixels.

Four forms are read: ``prompts.jsonl``, ``metadata.jsonl`` or ``prompts.csv`` with a line per picture; a ``.txt`` beside
each picture; GenEval's folders (``00000/metadata.jsonl`` and ``00000/samples/0000.png``).
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import LineError, Prompt, as_object, as_row, read_prompts, rewards_and_metadata

MAPPING = "prompts.jsonl"
_MAPPINGS = (MAPPING, "prompts.csv", "metadata.jsonl", "metadata.csv")
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_NAMES = ("file_name", "file", "image")  # of the key that holds a picture's file


@dataclass(frozen=True)
class Picture:
    """A file and what it was asked to show.

    Attributes:
        path: Of the file.
        name: Relative to the folder.
        prompt: What was asked for.
    """

    path: Path
    name: str
    prompt: Prompt


def find_pictures(folder: Path, prompts: Path | None = None) -> list[Picture]:
    """The pictures of a folder and their prompts, sorted by name.

    Args:
        folder: Where they are; folders in it are searched, too.
        prompts: A ``.jsonl`` or ``.csv`` file with a line per picture; None looks for one of the four forms.

    Raises:
        InputError: No picture, or one without a prompt, or a line without a picture or that cannot be used.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder.")
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))
             if path.suffix.lower() in _ENDINGS and path.is_file() and not _is_overview(path)}  # fmt: skip
    if prompts is None:
        prompts = next((folder / name for name in _MAPPINGS if (folder / name).is_file()), None)
    if prompts is not None:
        found = [_listed(folder, *entry) for entry in _read_mapping(prompts)]
        if missing := sorted(set(files) - {picture.name for picture in found}):
            raise InputError(f"{prompts} has no prompt for {_some(missing)}.")
        return sorted(found, key=lambda picture: picture.name)
    if not files:
        raise InputError(f"{folder} holds no picture ({', '.join(_ENDINGS)}).")
    found, missing = [], []
    for name, path in files.items():
        prompt = _beside(path)
        if prompt is None:
            missing.append(name)
        else:
            found.append(Picture(path, name, prompt))
    if missing:
        raise InputError(
            f"{_some(missing)} in {folder} have no prompt: put a .txt beside each, or name a file with --prompts."
        )
    return found


def read_picture(path: Path) -> Tensor:
    """``[3, H, W]`` in [0, 1], turned as its camera says; transparent parts on white.

    Raises:
        InputError: It is damaged, or no picture.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            pixels = np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def read_in_batches(
    pictures: Sequence[Picture], size: int, damaged: dict[str, str]
) -> Iterator[tuple[Tensor, list[Picture]]]:
    """Pictures of one size at a time, at most ``size``, in order; what cannot be read goes into ``damaged``."""
    batch: list[tuple[Tensor, Picture]] = []
    for picture in pictures:
        try:
            pixels = read_picture(picture.path)
        except InputError as error:
            damaged[picture.name] = str(error)
            continue
        if batch and (len(batch) == size or batch[0][0].shape != pixels.shape):
            yield torch.stack([image for image, _ in batch]), [other for _, other in batch]
            batch = []
        batch.append((pixels, picture))
    if batch:
        yield torch.stack([image for image, _ in batch]), [other for _, other in batch]


def to_bytes(image: Tensor) -> np.ndarray:
    """A picture ``[3, H, W]`` in [0, 1] as 8-bit ``[H, W, 3]``."""
    return (image.float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def as_line(name: str, prompt: Prompt) -> str:
    """A line of :data:`MAPPING`."""
    return json.dumps({"file_name": name} | as_row(prompt), ensure_ascii=False)


def _beside(path: Path) -> Prompt | None:
    """From a ``.txt`` of the same name, or from GenEval's metadata one folder further up."""
    text = path.with_suffix(".txt")
    if text.is_file():
        lines = read_prompts(text, "text")
        if len(lines) > 1:
            raise InputError(f"{text} must hold one prompt on one line, but has {len(lines)} lines.")
        return lines[0]
    metadata = path.parent.parent / "metadata.jsonl"
    if path.parent.name == "samples" and metadata.is_file():
        return read_prompts(metadata)[0]
    return None


def _is_overview(path: Path) -> bool:
    """GenEval's grid of the samples of one prompt."""
    return path.stem == "grid" and (path.parent / "metadata.jsonl").is_file() and (path.parent / "samples").is_dir()


def _listed(folder: Path, name: str, prompt: Prompt, where: str) -> Picture:
    path = folder / name
    if not path.is_file():
        raise InputError(f"{where}: there is no picture {path}.")
    return Picture(path, str(Path(name)), prompt)


def _read_mapping(path: Path) -> Iterator[tuple[str, Prompt, str]]:
    """File name, prompt, and where that is said."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise InputError(f"{path} cannot be read: {reason}.") from None
    if path.suffix.lower() == ".csv":
        rows = [(number, dict(row)) for number, row in enumerate(csv.DictReader(text.splitlines()), 2)]
    elif path.suffix.lower() == ".jsonl":
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                with _placed(f"{path}:{number}"):
                    rows.append((number, as_object(line)))
    else:
        raise InputError(f"{path}: prompts of pictures come from a .jsonl or .csv file with a line per picture.")
    for number, row in rows:
        where = f"{path}:{number}"
        key = next((key for key in _NAMES if isinstance(row.get(key), str) and row[key]), None)
        if key is None:
            raise InputError(f"{where}: names no picture: it needs {' or '.join(_NAMES)}.")
        rest = {name: value for name, value in row.items() if name != key and value not in (None, "")}
        yield row[key], _prompt_of(rest, where), where


def _prompt_of(row: dict[str, Any], where: str) -> Prompt:
    """From ``prompt`` (or ``text``), ``target_text``, ``rewards``, ``metadata``; other keys belong to the metadata."""
    row = dict(row)
    text = row.pop("prompt", None) or row.pop("text", None)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: prompt must be a text that is not empty, but is {text!r}.")
    target = row.pop("target_text", None)
    with _placed(where):
        rewards, metadata = rewards_and_metadata(row)
    quoted = re.search(r'"([^"]+)"', text)
    target = quoted[1] if target is None and quoted else target
    if target is not None and not isinstance(target, str):
        raise InputError(f"{where}: target_text must be a text, but is {target!r}.")
    rest = {key: value for key, value in row.items() if key not in ("rewards", "metadata")}
    return Prompt(text.strip(), rewards, rest | metadata, target)


@contextmanager
def _placed(where: str) -> Iterator[None]:
    """Says where a line is that something is wrong with."""
    try:
        yield
    except LineError as error:
        raise InputError(f"{where}: {error}") from None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
