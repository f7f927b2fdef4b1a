"""A folder of results that survives a crash: one line a run, each on disk before the next one is computed."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from mogb.compare.check import wrong_record, wrong_settings
from mogb.compare.plan import InputError, Plan
from mogb.problems import registered_problems

Record = dict[str, Any]

RESULTS, SETTINGS, LOCK = "results.jsonl", "settings.json", ".lock"
# What two records of the same run may differ in: how long it took, and on what.
VOLATILE = frozenset({"wall_seconds", "cpu_seconds", "versions"})
# Names of figures, and the beginnings of those that there is one of per problem.
FIGURES = ("ranking", "ranks_distance", "ranks_coverage", "conflicts")
FIGURES_OF = ("trajectories", "objectives", "conflicts", "invariance", "weights")


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
    _lock: int = -1

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
        os.close(self._lock)

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
        resume: Keep the finished runs of the same comparison; an unfinished last line is cut off, and runs whose
            process was killed are left to be done again.
        overwrite: Remove the files that an earlier comparison wrote here, and nothing else.

    Raises:
        InputError: The folder is not empty, belongs to other settings, is not writable, is in use, holds damaged
            results, or is to be overwritten but no comparison wrote it.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file: name a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_free(folder, resume, overwrite)  # before a lock file is left in a folder of somebody else
        lock = lock_folder(folder)
        try:
            _check_free(folder, resume, overwrite)
            return _open_locked(folder, plan, overwrite and not resume, lock)
        except BaseException:
            os.close(lock)
            raise
    except OSError as error:
        raise InputError(
            f"--out {folder} cannot be written: {error.strerror}. Name a folder that you may write to."
        ) from error


def _check_free(folder: Path, resume: bool, overwrite: bool) -> None:
    if resume:
        return
    if overwrite:
        check_ours(folder)
    elif not is_empty(folder):
        raise InputError(
            f"--out {folder} is not empty: add --resume to complete it, --overwrite to start again, "
            "or name another folder."
        )


def _open_locked(folder: Path, plan: Plan, anew: bool, lock: int) -> Store:
    if anew:
        remove_written(folder)
    torn = 0
    if (folder / SETTINGS).exists():
        _check_settings(folder, plan)
        torn = _cut_torn_line(folder / RESULTS)
    elif (folder / RESULTS).exists():
        raise InputError(f"{folder / RESULTS} has no {SETTINGS} beside it: remove it or name another folder.")
    else:
        _write_settings(folder, plan)
    found, _ = read_results(folder)
    done = {key: record for key, record in found.items() if not record.get("lost")}
    descriptor = os.open(folder / RESULTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    return Store(folder, done, torn, descriptor, lock)


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

    A run whose process was killed has no result: any other record of it takes its place.

    Raises:
        InputError: Two records of one run differ.
    """
    for record in records:
        known = into.setdefault(record["key"], record)
        if known.get("lost") or record.get("lost"):
            into[record["key"]] = record if known.get("lost") else known
            continue
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
    if wrong := wrong_settings(settings):
        raise InputError(f"{path} is damaged: {wrong}. Start again with --overwrite.")
    return dict(settings)


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


def check_ours(folder: Path) -> None:
    """Makes sure that it is a comparison that ``--overwrite`` is about to remove.

    Raises:
        InputError: The folder is not empty, and no comparison wrote it.
    """
    path = folder / SETTINGS
    ours = path.is_file() and ((folder / RESULTS).exists() or b'"mogb"' in path.read_bytes())
    if not ours and not is_empty(folder):
        raise InputError(
            f"--overwrite: {folder} is not empty and holds no {SETTINGS} of a comparison: name another folder, or "
            "empty this one yourself."
        )


def is_empty(folder: Path) -> bool:
    """Whether nothing is there but the lock that an earlier command left."""
    return all(path.name == LOCK for path in folder.iterdir())


def remove_written(folder: Path) -> None:
    """Removes what a comparison or a report wrote, and nothing else; the settings last, so that it can be repeated."""
    figures = [*FIGURES, *(f"{what}_{problem}" for what in FIGURES_OF for problem in registered_problems())]
    for name in (*(f"{name}.png" for name in figures), "summary.csv", "summary.md", "report.html", RESULTS, SETTINGS):
        (folder / name).unlink(missing_ok=True)


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
        record: Record = json.loads(line)
        reason = wrong_record(record)
    except ValueError as error:
        reason = str(error)
    if reason is None:
        return record
    raise InputError(
        f"{path} line {number} is damaged ({reason}): delete that line and add --resume to run it again, "
        "or start again with --overwrite."
    )


def lock_folder(folder: Path) -> int:
    """Takes a folder for this process, until the descriptor that is returned is closed.

    Raises:
        InputError: Another process has it.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(
            f"--out {folder} is being written by another `mogb compare` or `mogb report`: wait, or name another."
        ) from error
    except (ImportError, OSError):  # a platform or a network file system without locks
        pass
    return descriptor


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder."""
    descriptor = lock_folder(folder)
    try:
        yield
    finally:
        os.close(descriptor)
