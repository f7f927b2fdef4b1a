"""Prompts: what a picture is asked to show, and what the rewards need to know about it.

Three kinds of files: ``text`` (one prompt a line; a word in double quotes is the text that the picture should show),
``geneval`` (GenEval's ``*_metadata.jsonl``), and ``jsonl`` (one object a line with ``prompt`` and, optionally,
``target_text``, ``rewards`` and ``metadata``). A line that cannot be used is an error with its file and number.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mogb_diffusion.errors import InputError
from mogb_diffusion.seeds import keyed_generator

_QUOTED = re.compile(r'"([^"]+)"')
_GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt dataset.

    Attributes:
        text: What the model is given.
        rewards: The names of the rewards that apply; None means every reward decides by itself.
        metadata: What a reward needs to know, such as GenEval's ``include`` and ``exclude``.
        target_text: The words that the picture should show, for a reward that reads them.
    """

    text: str
    rewards: tuple[str, ...] | None = None
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)
    target_text: str | None = None

    def allows(self, reward: str) -> bool:
        """Whether a reward of this name may judge pictures of this prompt."""
        return self.rewards is None or reward in self.rewards


def read_prompts(path: str | Path, format: str = "auto", *, rewards: Sequence[str] | None = None) -> list[Prompt]:
    """The prompts of a file.

    Args:
        path: The file, in UTF-8. Empty lines are skipped.
        format: ``text``, ``geneval`` or ``jsonl``; ``auto`` takes ``text`` for ``.txt``, and for ``.jsonl`` looks at
            the first line: GenEval's have the keys ``tag`` and ``include``.
        rewards: Names of the rewards that apply to these prompts, where a line does not say so itself.

    Raises:
        InputError: The file cannot be read, holds no prompt, or has a malformed line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise InputError(f"{path}: the prompt file cannot be read: {reason}.") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise InputError(f"{path}: the prompt file is empty.")
    if format == "auto":
        format = _guess(path, numbered[0][1])
    if format not in _READERS:
        raise InputError(f"{path}: the format must be one of auto, {', '.join(_READERS)}, but is {format!r}.")
    applying = None if rewards is None else tuple(rewards)
    prompts = []
    for number, line in numbered:
        try:
            prompt = _READERS[format](line)
        except LineError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        prompts.append(prompt if prompt.rewards is not None else replace(prompt, rewards=applying))
    return prompts


def write_prompts(prompts: Iterable[Prompt], path: str | Path) -> None:
    """Writes prompts as generic ``jsonl``, which :func:`read_prompts` gives back as they were."""
    with Path(path).open("w", encoding="utf-8") as file:
        for prompt in prompts:
            file.write(json.dumps(as_row(prompt), ensure_ascii=False) + "\n")


def as_row(prompt: Prompt) -> dict[str, Any]:
    """The entries of a generic line; what a prompt does not have is left out."""
    row: dict[str, Any] = {"prompt": prompt.text}
    if prompt.target_text is not None:
        row["target_text"] = prompt.target_text
    if prompt.rewards is not None:
        row["rewards"] = list(prompt.rewards)
    if prompt.metadata:
        row["metadata"] = prompt.metadata
    return row


class PromptMixture:
    """Several lists of prompts, drawn from with weights; every prompt is a row with a number of its own.

    Args:
        parts: The lists, none of them empty.
        weights: How often each is drawn from, relative; None means equally often.

    Examples:
        >>> mixture = PromptMixture([[Prompt("a"), Prompt("b")], [Prompt("c")]], weights=[2, 1])
        >>> sorted(mixture.draw(3, 0, "epoch", 0))
        [0, 1, 2]
    """

    def __init__(self, parts: Sequence[Sequence[Prompt]], weights: Sequence[float] | None = None) -> None:
        if not parts or not all(parts):
            raise InputError("Prompts are missing: every source needs at least one prompt.")
        self.rows: tuple[Prompt, ...] = tuple(prompt for part in parts for prompt in part)
        self._sizes = [len(part) for part in parts]
        given = [1.0] * len(parts) if weights is None else [float(weight) for weight in weights]
        if len(given) != len(parts) or not all(weight > 0 for weight in given):
            raise InputError(f"Every source of prompts needs a weight > 0, but the weights are {given}.")
        self._shares = [weight / sum(given) for weight in given]

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, count: int, *key: int | str, sources: Sequence[int] | None = None) -> list[int]:
        """The rows of ``count`` groups: each source gets its share, and repeats a row only when it has no other.

        Shares that are no whole numbers are rounded at random, so that they hold on average. The draw depends on the
        key alone, and on the numbers of the sources, if not all are drawn from.
        """
        generator = keyed_generator(*key, "rows")
        quotas = self._quotas(count, generator, sources)
        rows: list[int] = []
        start = 0
        for size, quota in zip(self._sizes, quotas, strict=True):
            while quota > 0:
                taken = torch.randperm(size, generator=generator)[:quota]
                rows += [start + int(row) for row in taken]
                quota -= len(taken)
            start += size
        order = torch.randperm(len(rows), generator=generator).tolist()
        return [rows[index] for index in order]

    def _quotas(self, count: int, generator: torch.Generator, sources: Sequence[int] | None) -> list[int]:
        """Systematic sampling: one random offset, so that each quota is its share rounded down or up."""
        offset = float(torch.rand((), generator=generator, dtype=torch.float64))
        chosen = range(len(self._shares)) if sources is None else sources
        shares = [share if index in chosen else 0.0 for index, share in enumerate(self._shares)]
        if sources is not None:
            shares = [share / sum(shares) for share in shares]
        quotas, position, reached = [], 0.0, 0
        for index, share in enumerate(shares):
            position += share * count
            end = count if index >= max(chosen) else min(count, int(position + offset + 1e-9))
            quotas.append(end - reached)
            reached = end
        return quotas


class LineError(Exception):
    """What is wrong with a line."""


def _guess(path: Path, line: str) -> str:
    if path.suffix.lower() not in (".jsonl", ".json"):
        return "text"
    try:
        keys = json.loads(line)
    except ValueError:
        return "jsonl"
    return "geneval" if isinstance(keys, dict) and {"tag", "include"} <= set(keys) else "jsonl"


def _from_text(line: str) -> Prompt:
    quoted = _QUOTED.search(line)
    return Prompt(line, target_text=quoted[1] if quoted else None)


def _from_geneval(line: str) -> Prompt:
    row = as_object(line)
    text = _text(row, "prompt")
    if row.get("tag") not in _GENEVAL_TAGS:
        raise LineError(f"tag must be one of {', '.join(_GENEVAL_TAGS)}, but is {row.get('tag')!r}.")
    for key in ("include", "exclude"):
        _check_clauses(key, row.get(key, [] if key == "exclude" else None))
    return Prompt(text, metadata={key: value for key, value in row.items() if key != "prompt"})


def _check_clauses(key: str, clauses: Any) -> None:
    if not isinstance(clauses, list) or (key == "include" and not clauses):
        raise LineError(f"{key} must be a list of objects with class and count, but is {clauses!r}.")
    for clause in clauses:
        if not isinstance(clause, dict) or not isinstance(clause.get("class"), str):
            raise LineError(f"{key} must hold objects with a class, but holds {clause!r}.")
        if isinstance(clause.get("count"), bool) or not isinstance(clause.get("count"), int) or clause["count"] < 1:
            raise LineError(f"{key} needs a count >= 1 for {clause['class']!r}, but has {clause.get('count')!r}.")
        position = clause.get("position")
        if position is not None and not (isinstance(position, list) and len(position) == 2):
            raise LineError(f"position must be a relation and the number of a clause, but is {position!r}.")


def _from_jsonl(line: str) -> Prompt:
    row = as_object(line)
    unknown = sorted(set(row) - {"prompt", "rewards", "target_text", "metadata"})
    if unknown:
        raise LineError(
            f"unknown key {unknown[0]!r}. Known ones: prompt, rewards, target_text, metadata (put more into metadata)."
        )
    text = _text(row, "prompt")
    rewards, metadata = rewards_and_metadata(row)
    target = _text(row, "target_text") if row.get("target_text") is not None else None
    return Prompt(text, rewards, metadata, target)


_READERS: dict[str, Callable[[str], Prompt]] = {"text": _from_text, "geneval": _from_geneval, "jsonl": _from_jsonl}


def as_object(line: str) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        LineError: It is something else.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise LineError(f"this is no JSON: {error}.") from None
    if not isinstance(row, dict):
        raise LineError(f"a line must be a JSON object, but is {type(row).__name__}.")
    return row


def rewards_and_metadata(row: dict[str, Any]) -> tuple[tuple[str, ...] | None, dict[str, Any]]:
    """The keys ``rewards`` and ``metadata`` of a generic line.

    Raises:
        LineError: One of them is something else.
    """
    rewards, metadata = row.get("rewards"), row.get("metadata", {})
    if rewards is not None and not (isinstance(rewards, list) and all(isinstance(name, str) for name in rewards)):
        raise LineError(f"rewards must be a list of names, but is {rewards!r}.")
    if not isinstance(metadata, dict):
        raise LineError(f"metadata must be an object, but is {metadata!r}.")
    return None if rewards is None else tuple(rewards), metadata


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise LineError(f"{key} must be a text that is not empty, but is {value!r}.")
    return value.strip()


def in_batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive pieces of at most ``size`` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
