"""Several models in one table: the layout of MARBLE's Table 1 (arXiv 2605.06507), with its composite z-score.

A row is a model, a column a reward. The composite of a row is the mean over the columns of its z-scores, each of them
over all rows of the table: it says how a model stands among these rows, and changes with them.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mogb_diffusion.errors import InputError

Scores = Mapping[str, float | None]

# Title and unit of the paper's columns, in its order, by the names of rewards: PickScore is published without the
# division by 26 that the training code adds, UnifiedReward as points from 1 to 5.
PAPER_COLUMNS: dict[str, tuple[str, float, int]] = {
    "geneval": ("GenEval", 1.0, 2),
    "ocr": ("OCR", 1.0, 2),
    "pickscore": ("PickScore", 26.0, 2),
    "clip": ("CLIPScore", 1.0, 3),
    "clipscore": ("CLIPScore", 1.0, 3),
    "hpsv2": ("HPSv2.1", 1.0, 3),
    "aesthetic": ("Aesthetic", 1.0, 2),
    "imagereward": ("ImageReward", 1.0, 2),
    "unifiedreward": ("UnifiedReward", 5.0, 2),
}


@dataclass(frozen=True)
class Comparison:
    """Models by rewards.

    Attributes:
        models: The rows.
        rewards: The columns, in the paper's order; those that it does not have follow as they came.
        scores: By model and reward; None where nothing was measured.
        z: The z-scores of the columns that every row has.
        composite: Of each model; empty with fewer than two rows.
    """

    models: tuple[str, ...]
    rewards: tuple[str, ...]
    scores: dict[str, dict[str, float | None]]
    z: dict[str, dict[str, float]]
    composite: dict[str, float]

    @property
    def left_out(self) -> tuple[str, ...]:
        """Columns that take no part in the composite, because a row has no number there."""
        return tuple(name for name in self.rewards if self.composite and name not in self.z[self.models[0]])


def compare(rows: Mapping[str, Scores]) -> Comparison:
    r"""Puts models side by side.

    For model m and reward j, :math:`z_{mj} = (s_{mj} - \bar s_j) / \sigma_j` with the mean and the population standard
    deviation over the rows (0 where a column does not vary), and the composite is :math:`\frac{1}{J} \sum_j z_{mj}`
    over the J columns that every row has. The paper does not say which standard deviation it takes; the sample's would
    shrink every composite by the same factor :math:`\sqrt{(M - 1) / M}` for M rows.

    Raises:
        InputError: No row.
    """
    if not rows:
        raise InputError("There is nothing to compare.")
    names = list(dict.fromkeys(name for scores in rows.values() for name in scores))
    known = list(PAPER_COLUMNS)
    names.sort(key=lambda name: known.index(name) if name in known else len(known))
    scores = {model: {name: _finite(row.get(name)) for name in names} for model, row in rows.items()}
    z: dict[str, dict[str, float]] = {model: {} for model in rows}
    if len(rows) > 1:
        for name in names:
            column = [scores[model][name] for model in rows]
            values = [value for value in column if value is not None]
            if len(values) == len(column):
                for model, standing in zip(rows, z_scores(values), strict=True):
                    z[model][name] = standing
    composite = {model: math.fsum(found.values()) / len(found) for model, found in z.items() if found}
    return Comparison(tuple(rows), tuple(names), scores, z, composite)


def z_scores(values: Sequence[float]) -> list[float]:
    """Distances from the mean in population standard deviations; 0 where nothing varies.

    Examples:
        >>> z_scores([1.0, 3.0])
        [-1.0, 1.0]
    """
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    if spread <= 1e-12 * max(map(abs, values)):  # rounding of equal numbers
        return [0.0] * len(values)
    return [(value - mean) / spread for value in values]


def title(reward: str) -> str:
    """How the paper calls a reward; others keep their name."""
    return PAPER_COLUMNS.get(reward, (reward, 1.0, 3))[0]


def shown(reward: str, value: float | None) -> str:
    """A score in the paper's unit and number of digits."""
    _, factor, digits = PAPER_COLUMNS.get(reward, (reward, 1.0, 3))
    return "-" if value is None else f"{value * factor:.{digits}f}"


def cells(table: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows as texts, in the paper's layout."""
    header = ["model", *(title(name) for name in table.rewards)] + (["composite"] if table.composite else [])
    rows = []
    for model in table.models:
        row = [model, *(shown(name, table.scores[model][name]) for name in table.rewards)]
        rows.append(row + ([f"{table.composite[model]:+.3f}"] if table.composite else []))
    return header, rows


def as_text(table: Comparison) -> str:
    """For a terminal: columns of equal width."""
    header, rows = cells(table)
    widths = [max(len(line[n]) for line in (header, *rows)) for n in range(len(header))]
    lines = [
        "  ".join(f"{cell:<{width}}" if n == 0 else f"{cell:>{width}}" for n, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in (header, *rows))
    ]
    return "\n".join([*lines, note(table)] if note(table) else lines)


def as_markdown(table: Comparison) -> str:
    """A table of Markdown."""
    header, rows = cells(table)
    lines = [f"| {' | '.join(line)} |" for line in (header, ["---"] + ["---:"] * (len(header) - 1), *rows)]
    return "\n".join(lines) + "\n" + (f"\n{note(table)}\n" if note(table) else "")


def as_csv(table: Comparison) -> str:
    """A line per model, numbers as they are (PickScore as the reward gives it), z-scores beside them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    scored = [name for name in table.rewards if table.composite and name not in table.left_out]
    writer.writerow(["model", *table.rewards, *(f"z {name}" for name in scored), "composite"])
    for model in table.models:
        numbers = [table.scores[model][name] for name in table.rewards]
        numbers += [table.z[model][name] for name in scored]
        writer.writerow([model, *("" if n is None else repr(n) for n in (*numbers, table.composite.get(model)))])
    return text.getvalue()


def note(table: Comparison) -> str:
    """What the composite is made of."""
    if not table.composite:
        return ""
    used = len(table.rewards) - len(table.left_out)
    text = f"composite: mean of the z-scores of {used} columns over these {len(table.models)} rows"
    return text + (f"; without {', '.join(map(title, table.left_out))}" if table.left_out else "") + "."


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
