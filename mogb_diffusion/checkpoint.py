"""Checkpoints: all that a run needs to go on bit for bit, whole or not there.

A checkpoint is written to a staging folder, flushed to disk and renamed. Its manifest holds the size and the hash of
every file, so that a damaged one is recognised. Tensors are in safetensors, everything else in JSON; nothing is
unpickled. Besides the state of the run it holds the trained weights in the form that diffusers loads.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mogb_diffusion.errors import CheckpointError

PREFIX = "checkpoint-"
STATE, TENSORS, MANIFEST, LATEST = "state.json", "state.safetensors", "manifest.json", "latest"
_ASIDE = ".aside-"
_TENSOR, _ITEMS, _TUPLE = "__tensor__", "__items__", "__tuple__"


def save(root: Path, step: int, state: dict[str, Any], export: Callable[[Path], None], *, keep_last: int = 0) -> Path:
    """Writes ``root/checkpoint-<step>/`` and then ``root/latest``, and deletes what is older than ``keep_last``.

    Args:
        root: Folder of the run.
        step: Optimizer steps so far.
        state: Nested dicts, lists, numbers, texts and tensors.
        export: Writes the trained weights into a folder.
        keep_last: How many checkpoints are kept; 0 keeps all.

    Raises:
        CheckpointError: It could not be written, as when the disk is full. Earlier checkpoints are untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    final = root / folder_name(step)
    staging = root / f".staging-{final.name}"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        tensors: dict[str, Tensor] = {}
        plain = _pack(state, "", tensors)
        save_file(tensors, str(staging / TENSORS))
        (staging / STATE).write_text(json.dumps(plain))
        export(staging)
        files = sorted(path for path in staging.rglob("*") if path.is_file())
        listed = {str(path.relative_to(staging)): [path.stat().st_size, _hash(path)] for path in files}
        (staging / MANIFEST).write_text(json.dumps(listed, indent=1))
        for path in (*files, staging / MANIFEST):
            _flush(path)
        aside = root / f"{_ASIDE}{final.name}"
        if final.exists():  # of the same step: it stays until the new one has its name
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
        staging.rename(final)
        _flush(root)
        shutil.rmtree(aside, ignore_errors=True)
        write_whole(root / LATEST, final.name + "\n")
    except (OSError, SafetensorError) as error:  # the latter is no OSError, also where the disk is full
        shutil.rmtree(staging, ignore_errors=True)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CheckpointError(
            f"The checkpoint {final} could not be written: {reason}. Earlier ones are untouched: "
            "make room and add --resume to go on."
        ) from error
    _prune(root, keep_last, step)
    return final


def load(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint.

    Raises:
        CheckpointError: It is damaged: a file is missing or is not what was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        listed = json.loads((folder / MANIFEST).read_text())
        for name, (size, digest) in listed.items():
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{folder} is damaged: {name} is missing.")
            if path.stat().st_size != size or _hash(path) != digest:
                raise CheckpointError(f"{folder} is damaged: {name} is not what was written.")
        tensors = load_file(str(folder / TENSORS))
        state: dict[str, Any] = _unpack(json.loads((folder / STATE).read_text()), tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is damaged: {' '.join(str(error).split()) or type(error).__name__}."
        ) from error
    return state


def folder_name(step: int) -> str:
    """Of the checkpoint after so many optimizer steps."""
    return f"{PREFIX}{step:06d}"


def found(root: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    return sorted((path for path in root.glob(f"{PREFIX}*") if path.is_dir()), key=_step, reverse=True)


def newest(root: Path, tell: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its state; damaged ones are skipped, with a message each. Nothing is written."""
    for folder in sorted((*found(root), *_set_aside(root)), key=_step, reverse=True):
        try:
            return folder, load(folder)
        except CheckpointError as error:  # noqa: PERF203 - a handful of folders
            tell(f"{error} It is skipped.")
    return None


def restore(root: Path) -> None:
    """Gives a checkpoint its name back, where a kill came between two renames. For the one process that writes."""
    for aside in _set_aside(root):
        aside.rename(root / aside.name.removeprefix(_ASIDE))
    for left in root.glob(f"{_ASIDE}{PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


def _set_aside(root: Path) -> list[Path]:
    """Checkpoints that a newer one of the same step was about to replace, and did not."""
    return [path for path in root.glob(f"{_ASIDE}{PREFIX}*") if not (root / path.name.removeprefix(_ASIDE)).exists()]


def _prune(root: Path, keep_last: int, step: int) -> None:
    """Deletes what is older. Folders of later steps are damaged ones that a resumed run went back over."""
    earlier = [folder for folder in found(root) if _step(folder) <= step]
    for folder in earlier[keep_last:] if keep_last else ():
        shutil.rmtree(folder, ignore_errors=True)
    for folder in root.glob(f".staging-{PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _step(path: Path) -> int:
    digits = path.name.removeprefix(_ASIDE).removeprefix(PREFIX)
    return int(digits) if digits.isdigit() else -1


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: path}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _pack(item, f"{path}/{key}", tensors) for key, item in value.items()}
        return {_ITEMS: [[key, _pack(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        packed = [_pack(item, f"{path}/{n}", tensors) for n, item in enumerate(value)]
        return {_TUPLE: packed} if isinstance(value, tuple) else packed
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path} is {type(value).__name__}, which a checkpoint does not hold.")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {_TENSOR}:
        return tensors[value[_TENSOR]]
    if set(value) == {_ITEMS}:
        return {key: _unpack(item, tensors) for key, item in value[_ITEMS]}
    if set(value) == {_TUPLE}:
        return tuple(_unpack(item, tensors) for item in value[_TUPLE])
    return {key: _unpack(item, tensors) for key, item in value.items()}


def _hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """To the disk itself, so that a power cut after the rename finds what was renamed."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there in full or as it was before."""
    staging = path.with_name(f".{path.name}.new")
    staging.write_text(text)
    _flush(staging)
    staging.replace(path)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer, as a checkpoint holds it."""
    state: dict[str, Any] = optimizer.state_dict()
    return state
