"""A folder of results that survives a crash: one line a run, each on disk before the next one is computed."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from mogb.compare.plan import InputError, Plan

Record = dict[str, Any]

RESULTS, SETTINGS = "results.jsonl", "settings.json"
# What two records of the same run may differ in: how long it took, and on what.
VOLATILE = frozenset({"wall_seconds", "cpu_seconds", "versions"})
WRITTEN = ("*.png", "summary.csv", "summary.md", "report.html", RESULTS, SETTINGS)


@dataclass
class Store:
    """The open results file of one folder.

    Attributes:
        folder: Where everything goes.
        done: The records that were there already, by key.
        torn: The number of bytes of an unfinished last line that was cut off; 0 for an intact file.
    """

    folder: Path
    done: dict[str, Record] = field(default_factory=dict)
    torn: int = 0
    _descriptor: int = -1

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def append(self, record: Record) -> None:
        """Writes one line and waits until it is on the disk."""
        line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fsync(self._descriptor)
        self.done[record["key"]] = record


def open_store(folder: Path, plan: Plan, *, resume: bool = False, overwrite: bool = False) -> Store:
    """Opens a folder for a comparison.

    Args:
        folder: Made if it does not exist.
        plan: What is about to be run.
        resume: Keep the finished runs of the same comparison; an unfinished last line is cut off.
        overwrite: Remove the files that an earlier comparison wrote here, and nothing else.

    Raises:
        InputError: The folder is not empty, belongs to other settings, is not writable, or holds damaged results.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file: name a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite and not resume:
            remove_written(folder)
        elif any(folder.iterdir()) and not resume:
            raise InputError(
                f"--out {folder} is not empty: add --resume to complete it, --overwrite to start again, "
                "or name another folder."
            )
        torn = 0
        if (folder / SETTINGS).exists():
            _check_settings(folder, plan)
            torn = _cut_torn_line(folder / RESULTS)
        elif (folder / RESULTS).exists():
            raise InputError(f"{folder / RESULTS} has no {SETTINGS} beside it: add --overwrite or name another folder.")
        else:
            _write_settings(folder, plan)
        done, _ = read_results(folder)
        descriptor = os.open(folder / RESULTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        _lock(descriptor, folder)
    except OSError as error:
        raise InputError(
            f"--out {folder} cannot be written: {error.strerror}. Name a folder that you may write to."
        ) from error
    return Store(folder, done, torn, descriptor)


def read_results(folder: Path) -> tuple[dict[str, Record], bool]:
    """The records of a folder by key, and whether an unfinished last line was left out.

    Raises:
        InputError: No results, a damaged line, or two different records of one run.
    """
    path = folder / RESULTS
    if not path.exists():
        return {}, False
    *lines, rest = path.read_bytes().split(b"\n")
    records: dict[str, Record] = {}
    for number, line in enumerate(lines, start=1):
        merge(records, [_parse(line, path, number)], str(path))
    return records, bool(rest)


def merge(into: dict[str, Record], records: Iterable[Record], source: str) -> None:
    """Adds records; one that is there already must be the same but for its wall time.

    Raises:
        InputError: Two records of one run differ.
    """
    for record in records:
        known = into.setdefault(record["key"], record)
        differ = [name for name in sorted(known.keys() | record.keys()) if known.get(name) != record.get(name)]
        if differ := [name for name in differ if name not in VOLATILE]:
            raise InputError(
                f"{source} holds another result of {record['key']!r} than was read before; they differ in "
                f"{', '.join(differ)}. Remove one of the two, or run both again with the same version."
            )


def read_settings(folder: Path) -> dict[str, Any]:
    """What ``settings.json`` of a folder records.

    Raises:
        InputError: It is missing or damaged.
    """
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no {SETTINGS}: name a folder that `mogb compare` wrote.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): start again with --overwrite.") from error
    if not isinstance(settings, dict) or "methods" not in settings:
        raise InputError(f"{path} is damaged: it does not say which methods were run. Start again with --overwrite.")
    return settings


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one go: a reader sees the old text or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def differences(recorded: Mapping[str, Any], asked: Mapping[str, Any], *, ignore: frozenset[str]) -> list[str]:
    """In words, in what two settings differ."""
    names = [name for name in sorted(recorded.keys() | asked.keys()) if name not in ignore]
    return [
        f"{name} was {_show(recorded.get(name))}, is {_show(asked.get(name))}"
        for name in names
        if recorded.get(name) != asked.get(name)
    ]


def _show(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _check_settings(folder: Path, plan: Plan) -> None:
    differ = differences(read_settings(folder), plan.settings(), ignore=frozenset())
    if differ:
        raise InputError(
            f"--resume: {folder} was run with other settings ({'; '.join(differ)}). "
            "Give the recorded ones, add --overwrite, or name another folder."
        )


def _write_settings(folder: Path, plan: Plan) -> None:
    write_text(folder / SETTINGS, json.dumps(plan.settings(), indent=2) + "\n")


def remove_written(folder: Path) -> None:
    """Removes what a comparison or a report wrote, and nothing else."""
    for pattern in WRITTEN:
        for path in folder.glob(pattern):
            path.unlink()


def _cut_torn_line(path: Path) -> int:
    if not path.exists():
        return 0
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        with path.open("r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())
    return len(text) - whole


def _parse(line: bytes, path: Path, number: int) -> Record:
    try:
        record = json.loads(line)
        if {"key", "method", "problem", "seed", "status"} <= record.keys():
            return record
        reason = "it is no record of a run"
    except (ValueError, AttributeError) as error:
        reason = str(error)
    raise InputError(
        f"{path} line {number} is damaged ({reason}): delete that line and add --resume to run it again, "
        "or start again with --overwrite."
    )


def _lock(descriptor: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no advisory locks on this platform
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(
            f"--out {folder} is being written by another `mogb compare`: wait, or name another."
        ) from error
    except OSError:  # a network file system without locks
        return
