"""Results of one folder, or of several parts, as one summary."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mogb.compare.plan import InputError
from mogb.compare.store import (
    RESULTS,
    SETTINGS,
    Record,
    check_ours,
    differences,
    is_empty,
    locked,
    merge,
    read_results,
    read_settings,
    remove_written,
    write_text,
)
from mogb.compare.summary import Summary


def read_summary(folder: Path) -> Summary:
    """The summary of one folder.

    Raises:
        InputError: It holds no results, or damaged ones.
    """
    settings = read_settings(folder)
    if not (folder / RESULTS).exists():
        raise InputError(f"{folder} holds no {RESULTS}: run `mogb compare --out {folder} --resume` first.")
    records, _ = read_results(folder)
    return Summary(settings, records)


def merge_folders(names: Sequence[str], out: str | None, *, overwrite: bool = False) -> tuple[Summary, Path]:
    """Merges folders, writes what they hold together into another one, and returns it with its summary.

    Args:
        names: Folders that ``mogb compare`` wrote, with the same settings but for the shard. A run that is in several
            of them must have the same result in all.
        out: Where to; None is the folder itself, if there is one only.
        overwrite: Replace what an earlier merge left in ``out``.

    Raises:
        InputError: Missing or damaged results, different settings, contradicting results, an ``out`` that is missing,
            not empty or not writable.
    """
    folders = list({Path(name).resolve(): Path(name) for name in names}.values())
    if out is None and len(folders) > 1:
        raise InputError(f"--out is missing: name a folder for what {len(folders)} folders hold together.")
    summaries = {folder: read_summary(folder) for folder in folders}
    settings = _common_settings({folder: summary.settings for folder, summary in summaries.items()})
    records: dict[str, Record] = {}
    for folder, summary in summaries.items():
        merge(records, summary.records.values(), str(folder / RESULTS))
    merged = Summary(settings | {"shard": "1/1"} if len(folders) > 1 else settings, records)
    target = folders[0] if out is None else Path(out)
    if target.resolve() not in {folder.resolve() for folder in folders}:
        _write(merged, target, overwrite)
    elif len(folders) > 1:
        raise InputError(f"--out {target} is one of the folders that are merged: name another one.")
    return merged, target


def _common_settings(found: dict[Path, Any]) -> dict[str, Any]:
    first, *others = found
    for other in others:
        if differ := differences(found[first], found[other], ignore=frozenset({"shard"})):
            raise InputError(
                f"{first} and {other} were run with different settings ({'; '.join(differ)}): merge parts of one "
                "comparison only."
            )
    return dict(found[first])


def _write(merged: Summary, target: Path, overwrite: bool) -> None:
    lines = [json.dumps(record, separators=(",", ":")) for _, record in sorted(merged.records.items())]
    try:
        target.mkdir(parents=True, exist_ok=True)
        _check_free(target, overwrite)  # before a lock file is left in a folder of somebody else
        with locked(target):
            _check_free(target, overwrite)
            if overwrite:
                remove_written(target)
            write_text(target / SETTINGS, json.dumps(merged.settings, indent=2) + "\n")
            write_text(target / RESULTS, "".join(f"{line}\n" for line in lines))
    except FileExistsError as error:
        raise InputError(f"--out {target} is a file: name a folder.") from error
    except OSError as error:
        raise InputError(
            f"--out {target} cannot be written: {error.strerror}. Name a folder that you may write to."
        ) from error


def _check_free(target: Path, overwrite: bool) -> None:
    if overwrite:
        check_ours(target)
    elif not is_empty(target):
        raise InputError(f"--out {target} is not empty: add --overwrite or name another folder.")
