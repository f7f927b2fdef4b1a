"""Held-out prompts with the same noise every time: a table of rewards, and pictures to look at.

The noise of a picture belongs to its prompt: to the text, and to how often the text came before. It is the same in any
order of the prompts, in any part of them, on any number of ranks, for every model of one shape.

Shapes: K = rewards, B = pictures, C = categories.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from mogb_diffusion import config
from mogb_diffusion.config import Run, Sampling
from mogb_diffusion.distributed import Ranks
from mogb_diffusion.headers import scrubbed
from mogb_diffusion.models.sd3 import SD3Model
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.results import Record
from mogb_diffusion.rollouts import draw
from mogb_diffusion.scoring import Scorer
from mogb_diffusion.seeds import Key, keyed_noise

FAILURES = ("errors", "timeouts", "nan", "inf")  # of the counts of a scorer: what costs a picture its number
_ENCODED = 128  # prompts that are encoded at once, where text encoders come to the device for it
_WAITING = 256  # pictures that wait for their rewards at most, so that a long list of prompts does not fill the memory


@dataclass(frozen=True)
class Score:
    """One reward over the pictures that it applies to.

    Attributes:
        mean: Of the reward.
        error: Standard error of the mean.
        count: Of pictures.
    """

    mean: float
    error: float
    count: int


@dataclass(frozen=True, eq=False)
class Measured:
    """What rewards said about pictures.

    Attributes:
        rewards: ``[K, B]``; NaN where a reward does not apply, or failed.
        failures: How many calls or pictures failed, by reward and kind; empty where none did.
        messages: Of the rewards that failed.
    """

    rewards: Float64[Tensor, "K B"]
    failures: dict[str, dict[str, int]]
    messages: tuple[str, ...]


def evaluation_sampling(run: Run) -> Sampling:
    """How evaluation pictures are drawn: as rollouts, except for what the configuration says."""
    wanted = {
        name: value for name in ("steps", "solver", "guidance") if (value := getattr(run.evaluation, name)) is not None
    }
    return replace(run.sampling, **wanted)


def evaluation_keys(prompts: Sequence[Prompt], seed: int) -> list[Key]:
    """What the noise of every picture depends on: the seed, the prompt, and how often that came before.

    Examples:
        >>> evaluation_keys([Prompt("a"), Prompt("b"), Prompt("a")], 0)
        [(0, 'evaluation', 'a', 0), (0, 'evaluation', 'b', 0), (0, 'evaluation', 'a', 1)]
    """
    before: Counter[str] = Counter()
    keys: list[Key] = []
    for prompt in prompts:
        keys.append((seed, "evaluation", prompt.text, before[prompt.text]))
        before[prompt.text] += 1
    return keys


@torch.no_grad()
def draw_pictures(
    model: SD3Model,
    prompts: Sequence[Prompt],
    how: Sampling,
    seed: int,
    *,
    batch: int = 32,
    keys: Sequence[Key] | None = None,
) -> Float64[Tensor, "B 3 h w"] | Tensor:
    """Pictures of prompts by the policy that is active, on the CPU.

    Args:
        model: What draws.
        prompts: Of each picture.
        how: Steps, solver, guidance.
        seed: Of the noise.
        batch: Pictures at once.
        keys: Of the noise of each picture; None takes those of :func:`evaluation_keys`.
    """
    keys = evaluation_keys(prompts, seed) if keys is None else keys
    if len(prompts) <= _ENCODED:
        model.prepare([prompt.text for prompt in prompts])
    images = []
    for start in range(0, len(prompts), batch):
        noise = keyed_noise(model.latent_shape, list(keys[start : start + batch]), model.dtype)
        images.append(model.decode(draw(model, prompts[start : start + batch], noise, how)).cpu())
    return torch.cat(images)


def measure(scorer: Scorer, batches: Iterable[tuple[Tensor, Sequence[Prompt]]]) -> Measured:
    """Scores pictures batch by batch, while the next ones are drawn or read."""
    parts: list[Tensor] = []
    counts = {name: Counter[str]() for name in scorer.rewards}
    messages: list[str] = []

    def collect() -> None:
        parts.append(scorer.collect())
        messages.extend(scorer.messages)
        for name, found in scorer.counts.items():
            counts[name].update({kind: found[kind] for kind in FAILURES if found[kind]})

    waiting = 0
    for images, prompts in batches:
        scorer.submit(images, prompts)
        waiting += len(prompts)
        if waiting >= _WAITING:
            collect()
            waiting = 0
    collect()
    failures = {name: dict(found) for name, found in counts.items() if found}
    return Measured(torch.cat(parts, dim=1), failures, tuple(messages))


def examine(
    model: SD3Model,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    how: Sampling,
    seed: int,
    batch: int,
    ranks: Ranks,
    *,
    spread: bool = False,
) -> Measured:
    """Draws every prompt once, on one rank or another, and scores it; the same result on every rank.

    Where the weights are ``spread`` over the ranks, all pictures are drawn before the first one is scored: drawing
    gathers weights, and a rank that fails while it scores must not be missed there.
    """
    keys, mine = evaluation_keys(prompts, seed), ranks.mine(len(prompts))
    ahead = max(1, _ENCODED // batch)

    def drawn() -> Iterable[tuple[Tensor, Sequence[Prompt]]]:
        for start in range(mine.start, mine.stop, batch):
            if (start - mine.start) % (batch * ahead) == 0:
                model.prepare([prompt.text for prompt in prompts[start : min(start + batch * ahead, mine.stop)]])
            piece = slice(start, min(start + batch, mine.stop))
            yield draw_pictures(model, prompts[piece], how, seed, batch=batch, keys=keys[piece]), prompts[piece]

    pieces = list(drawn()) if spread else drawn()
    with ranks.together():  # a rank that fails does not leave the others waiting
        part = measure(scorer, pieces)
    rewards = ranks.gather(part.rewards.mT.contiguous(), len(prompts)).mT
    table = torch.tensor(
        [[part.failures.get(name, {}).get(kind, 0) for kind in FAILURES] for name in scorer.rewards],
        dtype=torch.float64,
    )
    failures: dict[str, dict[str, int]] = {}
    for name, row in zip(scorer.rewards, ranks.sum(table).tolist(), strict=True):
        if any(row):
            failures[name] = {kind: int(count) for kind, count in zip(FAILURES, row, strict=True) if count}
    return Measured(rewards, failures, part.messages)


def evaluate(
    model: SD3Model, scorer: Scorer, prompts: Sequence[Prompt], run: Run, ranks: Ranks
) -> tuple[dict[str, Score], Float64[Tensor, "K B"]]:
    """Draws pictures with the policy that is active, and scores them, as a configuration says.

    Returns:
        The score of each reward, and all rewards ``[K, B]``; the same on every rank.
    """
    how = evaluation_sampling(run)
    found = examine(
        model, scorer, prompts, how, run.seed, run.evaluation.batch, ranks, spread=run.model.shard and ranks.size > 1
    )
    rewards = found.rewards
    return {name: summarized(row) for name, row in zip(scorer.rewards, rewards, strict=True)}, rewards


def summarized(row: Float64[Tensor, " B"]) -> Score:
    """The mean of the numbers that are there."""
    values = row[~row.isnan()]
    if not len(values):
        return Score(math.nan, math.nan, 0)
    spread = float(values.std()) if len(values) > 1 else math.nan
    return Score(float(values.mean()), spread / math.sqrt(len(values)), len(values))


def by_category(row: Float64[Tensor, " B"], prompts: Sequence[Prompt]) -> dict[str, Score]:
    """The score of every category of GenEval (``tag`` in a prompt's metadata), in the order in which they come."""
    tags = [str(prompt.metadata.get("tag", "")) for prompt in prompts]
    found = {}
    for tag in dict.fromkeys(tag for tag in tags if tag):
        score = summarized(row[torch.tensor([other == tag for other in tags])])
        if score.count:
            found[tag] = score
    return found


def category_mean(categories: Iterable[Score]) -> Score:
    r"""GenEval's overall score: the mean of the C categories' means, however many pictures each has.

    Its standard error is :math:`\frac{1}{C} \sqrt{\sum_c s_c^2}`, of the categories' standard errors. The benchmark's
    own summary averages in the same way (Ghosh et al. 2023, arXiv 2310.11513, ``summary_scores.py``).
    """
    scores = list(categories)
    mean = math.fsum(score.mean for score in scores) / len(scores)
    error = math.sqrt(math.fsum(score.error**2 for score in scores)) / len(scores)
    return Score(mean, error, sum(score.count for score in scores))


def is_by_category(spec: config.Reward, reward: Any) -> bool:
    """Whether a reward's score is the mean over GenEval's categories: GenEval's, and that of rewards that say so."""
    return bool(getattr(reward, "per_category", "geneval" in (spec.name, spec.key)))


def scores_of(
    measured: Measured, specs: Sequence[config.Reward], scorer: Scorer, prompts: Sequence[Prompt]
) -> dict[str, dict[str, Any]]:
    """Plain numbers by reward: mean, error, count, and for GenEval the categories."""
    found: dict[str, dict[str, Any]] = {}
    for spec, row in zip(specs, measured.rewards, strict=True):
        score, categories = summarized(row), {}
        if is_by_category(spec, scorer.rewards[spec.key]):
            categories = by_category(row, prompts)
            score = category_mean(categories.values()) if categories else score
        found[spec.key] = _plain(score)
        if categories:
            found[spec.key]["categories"] = {tag: _plain(part) for tag, part in categories.items()}
    return found


# Options of rewards that change where and how fast they run, but not what they measure.
_MACHINE = (
    "device",
    "batch_size",
    "offload",
    "timeout",
    "retries",
    "concurrency",
    "threads",
    "workers",
    "batch",
    "seed",
)


def definitions(specs: Sequence[config.Reward], scores: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What each score is of: the reward, its options, and GenEval's rule and mean; nothing secret.

    Args:
        specs: The rewards.
        scores: Of them, as :func:`scores_of` gives them.
    """
    found = {}
    for spec in specs:
        options = {"metric": "score"} if spec.name == "geneval" else {}
        options |= {key: value for key, value in scrubbed(spec.options).items() if key not in _MACHINE}
        words = [f"{key} {options[key]}" for key in sorted(options)]
        if "categories" in scores.get(spec.key, {}):
            words.append("mean of categories")
        found[spec.key] = ", ".join([spec.name, *words])
    return found


def own_record(rows: Sequence[Mapping[str, Any]], run: Run, name: str, step: int | None = None) -> Record | None:
    """The record of an evaluation that a run made itself.

    Args:
        rows: Of its ``metrics.jsonl``.
        run: Its configuration.
        name: For tables.
        step: Which evaluation; None is the last one.

    Returns:
        None if there is none.
    """
    tests = [row for row in rows if row["kind"] == "evaluation"]
    found = [row for row in tests if step is None or row["step"] == step]
    if not found:
        return None
    last, specs = found[-1], (*run.rewards, *run.evaluation.rewards)
    record: Record = {
        "name": name, "model": run.model.source, "epoch": last["epoch"], "step": last["step"],
        "prompts": "held-out prompts", "pictures": run.evaluation.images, "seed": run.seed,
        "sampling": asdict(evaluation_sampling(run)), "trained_on": list(run.reward_names),
        "metrics": definitions(specs, last["scores"]), "trained": last["scores"],
    }  # fmt: skip
    return record | ({"base": tests[0]["scores"]} if tests[0]["step"] == 0 else {})


def _plain(score: Score) -> dict[str, Any]:
    numbers = {"mean": score.mean, "error": score.error}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()} | {"count": score.count}
