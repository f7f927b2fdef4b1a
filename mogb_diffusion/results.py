"""What an evaluation found, as a record: plain numbers that are written as JSON, CSV and Markdown, and read again.

A record has ``name``, ``model``, ``epoch``, ``step``, ``prompts``, ``pictures``, ``seed``, ``sampling``,
``trained_on`` (names of rewards; null where nobody knows), ``metrics`` (what each score is of, by reward),
``failures``, ``versions``, and the scores of the ``base``
model and of the ``trained`` one, as far as they were measured: ``{reward: {mean, error, count, categories?}}``.
"""

import csv
import importlib.metadata
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mogb_diffusion.comparison import title
from mogb_diffusion.errors import InputError

# Scores that agree in these may stand in one record.
_SAME = ("model", "epoch", "step", "prompts", "pictures", "seed", "sampling", "trained_on", "versions")
Record = dict[str, Any]
EVALUATION = "evaluation"  # evaluation.json, .csv and .md in the folder of a run
COLUMNS = ("name", "weights", "reward", "category", "trained_on", "mean", "error", "count")


def versions() -> dict[str, str]:
    """Of the packages that scores may depend on, as far as they are installed."""
    found = {}
    for name in ("mogb", "torch", "diffusers", "transformers", "peft", "rapidocr"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # noqa: PERF203 - six packages
            continue
    return found


def read_record(path: Path) -> Record:
    """A record that was written as JSON.

    Raises:
        InputError: The file is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read as an evaluation: {reason}.") from None
    is_record = isinstance(found, dict) and isinstance(found.get("name"), str)
    parts = [found[which] for which in ("base", "trained") if which in found] if is_record else []
    if not parts or not all(_is_scores(part) for part in parts):
        raise InputError(f"{path} is no evaluation: mogb-diffusion evaluate writes them.")
    record: Record = found
    return record


def _is_scores(part: Any) -> bool:
    return isinstance(part, dict) and all(
        isinstance(score, dict) and isinstance(score.get("mean"), int | float | None) for score in part.values()
    )


def merged(old: Record, new: Record) -> Record | None:
    """Both in one, the new scores first; None if they were not measured with the same settings at the same step."""
    if any(json.dumps(old.get(key), sort_keys=True) != json.dumps(new.get(key), sort_keys=True) for key in _SAME):
        return None
    found = dict(new)
    for which in ("base", "trained"):
        if which in old or which in new:
            found[which] = old.get(which, {}) | new.get(which, {})
    for key in ("metrics", "failures"):
        measured = {**new.get("base", {}), **new.get("trained", {})}
        kept = {reward: value for reward, value in old.get(key, {}).items() if reward not in measured}
        found[key] = kept | new.get(key, {})
    return found


def rows_of(records: Sequence[Record]) -> dict[str, dict[str, float | None]]:
    """Rows of a comparison: each base model once, then what was trained; parts of one name are put together.

    A base model is told apart by its name and by how it samples; its scores are those of the first record that has it.

    Raises:
        InputError: Two records of one name have different scores of one reward.
    """
    rows: dict[str, dict[str, float | None]] = {}
    bases: dict[tuple[str, str], str] = {}
    several = len({_base_key(record) for record in records if "base" in record}) > 1
    for which in ("base", "trained"):
        for record in records:
            if which not in record:
                continue
            name = str(record["name"])
            if which == "base":
                own = "trained" not in record  # a recipe's base model was evaluated for itself
                shared = f"base {record.get('model', '')}, guidance {_guidance(record):g}" if several else "base"
                name = bases.setdefault(_base_key(record), name if own else shared)
            for reward, score in record[which].items():
                row, mean = rows.setdefault(name, {}), score["mean"]
                if row.get(reward, mean) != mean and which == "trained":
                    raise InputError(f"{name!r} has two scores of {reward}, {row[reward]} and {mean}: name one anew.")
                row.setdefault(reward, mean)
    return rows


def _base_key(record: Record) -> tuple[str, str]:
    return str(record.get("model", "")), json.dumps(record.get("sampling", {}), sort_keys=True)


def _guidance(record: Record) -> float:
    return float(record.get("sampling", {}).get("guidance", 1.0))


def trained_on(record: Record, reward: str) -> str:
    """Whether a model was trained on a reward: yes, no, or a question mark."""
    known = record.get("trained_on")
    return "?" if known is None else "yes" if reward in known else "no"


def as_csv(records: Sequence[Record]) -> str:
    """A line per model, reward and category; the category is empty for a reward's own score."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for record in records:
        for which in ("base", "trained"):
            for reward, score in record.get(which, {}).items():
                parts = {"": score} | score.get("categories", {})
                for category, part in parts.items():
                    numbers = ["" if part[key] is None else part[key] for key in ("mean", "error", "count")]
                    writer.writerow([record["name"], which, reward, category, trained_on(record, reward), *numbers])
    return text.getvalue()


def as_markdown(record: Record) -> str:
    """Tables of one record: rewards, and GenEval's categories."""
    shown = [which for which in ("base", "trained") if which in record]
    lines = [f"# {record['name']}", "", _how(record), "", *table(record)]
    for reward in record[shown[-1]]:
        categories = record[shown[-1]][reward].get("categories")
        if categories:
            lines += ["", f"{title(reward)} by category; the score is the mean over them.", ""]
            lines += [f"| category | {' | '.join(shown)} | pictures |", "|---|" + "---:|" * (len(shown) + 1)]
            for tag, part in categories.items():
                parts = [record[which].get(reward, {}).get("categories", {}) for which in shown]
                scores = [as_number(found.get(tag)) for found in parts]
                lines.append(f"| {tag} | {' | '.join(scores)} | {part['count']} |")
    for reward, counts in record.get("failures", {}).items():
        lines += ["", f"{reward} failed: {', '.join(f'{count} {kind}' for kind, count in counts.items())}."]
    return "\n".join(lines) + "\n"


def table(record: Record) -> list[str]:
    """Lines of Markdown: a row per reward, a column for each model that was measured."""
    shown = [which for which in ("base", "trained") if which in record]
    both = len(shown) == 2
    header = ["reward", "trained on", *shown] + (["change"] if both else []) + ["pictures"]
    lines = [f"| {' | '.join(header)} |", "|---|---|" + "---:|" * (len(header) - 2)]
    for reward, last in record[shown[-1]].items():
        cells = [title(reward), trained_on(record, reward)]
        cells += [as_number(record[which].get(reward)) for which in shown]
        cells += [change(record["base"].get(reward), last)] if both else []
        lines.append(f"| {' | '.join([*cells, str(last['count'])])} |")
    return lines


def as_text(record: Record) -> str:
    """For a terminal."""
    shown = [which for which in ("base", "trained") if which in record]
    both = len(shown) == 2
    width = max(24, *(len(reward) + 2 for reward in record[shown[-1]]))
    lines = [_how(record), f"{'reward':{width}}{''.join(f'{which:>18}' for which in shown)}" + f"{'change':>10}" * both]
    for reward, last in record[shown[-1]].items():
        mark = " *" if trained_on(record, reward) == "no" else ""
        line = f"{reward + mark:{width}}" + "".join(f"{as_number(record[which].get(reward)):>18}" for which in shown)
        lines.append(line + (f"{change(record['base'].get(reward), last):>10}" if both else ""))
        for tag, part in last.get("categories", {}).items():
            parts = [record[which].get(reward, {}).get("categories", {}).get(tag) for which in shown]
            line = f"{'  ' + tag:{width}}" + "".join(f"{as_number(score):>18}" for score in parts)
            lines.append(line + (f"{change(parts[0], part):>10}" if both else ""))
    if any(trained_on(record, reward) == "no" for reward in record[shown[-1]]):
        lines.append("* not trained on")
    return "\n".join(lines)


def _how(record: Record) -> str:
    sampling: Mapping[str, Any] = record.get("sampling", {})
    how = ", ".join(f"{key} {value}" for key, value in sampling.items())
    return f"{record.get('model', 'model')}, {record.get('pictures', '?')} pictures of {record.get('prompts')}; {how}"


def as_number(score: Mapping[str, Any] | None) -> str:
    """A mean and its standard error; a dash where there is none."""
    if score is None or score["mean"] is None:
        return "-"
    return f"{score['mean']:.3f}" + ("" if score["error"] is None else f" ± {score['error']:.3f}")


def change(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """How much a mean has moved."""
    if before is None or after is None or before["mean"] is None or after["mean"] is None:
        return "-"
    return f"{after['mean'] - before['mean']:+.3f}"
