"""A recipe in miniature: the same balancing, loss, sampler and cut on the tiny model, for two epochs of a few pictures.

What needs weights is replaced: the pipeline by the tiny one with random weights, prompts by those of the tiny world,
and rewards that judge photographs by those of the world. Everything else is the recipe's.
"""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from mogb_diffusion import config

STAND_INS = {
    "pickscore": "world_preference",
    "hpsv2": "world_aesthetic",
    "clip": "world_alignment",
    "clipscore": "world_alignment",
    "aesthetic": "world_aesthetic",
    "imagereward": "world_preference",
    "unifiedreward": "world_preference",
    "remote": "world_preference",
    "ocr": "world_text",
    "geneval": "world_composition",
}
EPOCHS, GROUPS, PICTURES, STEPS, TIMES = 2, 3, 2, 2, 2


@dataclass(frozen=True)
class DryRun:
    """What a dry run did.

    Attributes:
        run: What ran.
        updates: Optimizer steps.
        skipped: Of them, those whose gradient was not finite.
        solved: Those that solved for coefficients.
        shares: α of the last one, by objective.
        seconds: That it took.
    """

    run: config.Run
    updates: int
    skipped: int
    solved: int
    shares: dict[str, float]
    seconds: float


def miniature(run: config.Run) -> config.Run:
    """The recipe on the tiny model."""
    sources = tuple(_in_the_world(source) for source in run.prompts)
    return replace(
        run,
        epochs=min(run.epochs, EPOCHS),
        model=replace(run.model, source="tiny-random", resolution=None, max_sequence_length=None),
        prompts=sources,
        rewards=tuple(map(_stand_in, run.rewards)),
        batch=replace(
            run.batch, groups=max(GROUPS, len(sources)), images_per_prompt=PICTURES, micro_batch=4,
            sampling_batch=None if run.batch.sampling_batch is None else 5,
            updates_per_epoch=min(run.batch.updates_per_epoch, 2),
            timesteps=min(run.trained_timesteps, TIMES),
        ),
        sampling=replace(run.sampling, steps=min(run.sampling.steps, STEPS)),
        evaluation=replace(
            run.evaluation, every=0, images=2, batch=2,
            prompts=tuple(_in_the_world(source, split="held_out") for source in run.evaluation.prompts),
            rewards=tuple(map(_stand_in, run.evaluation.rewards)),
            steps=None if run.evaluation.steps is None else min(run.evaluation.steps, STEPS),
        ),
        checkpoints=config.Checkpoints(every=0, keep_last=1),
        tracking=config.Tracking(samples_every=0, samples=2),
    )  # fmt: skip


def dry_run(run: config.Run) -> DryRun:
    """Trains the miniature in a temporary folder.

    Raises:
        InputError: The configuration cannot run.
        RewardFailure: A reward of one's own failed.
    """
    import json

    from mogb_diffusion.trainer import Trainer

    small = miniature(run)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mogb-dry-run-") as folder:
        Trainer(small, Path(folder) / "run").train()
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    done = [row for row in steps if not row.get("skipped")]
    return DryRun(
        run=small, updates=len(steps), skipped=len(steps) - len(done),
        solved=sum(row["solve"] != "weighted" for row in done),
        shares=dict(done[-1]["alpha"]) if done else {}, seconds=time.monotonic() - begun,
    )  # fmt: skip


def _in_the_world(source: config.Prompts, split: str = "train") -> config.Prompts:
    if source.format == "world":
        return replace(source, count=min(source.count or 32, 32))
    kind = "mixed"
    if source.format == "geneval":
        kind = "objects"
    elif "ocr" in Path(str(source.path)).parts:
        kind = "text"
    return config.Prompts(
        format="world", kind=kind, split=split, count=32, weight=source.weight, rewards=source.rewards  # type: ignore[arg-type]
    )  # fmt: skip


def _stand_in(reward: config.Reward) -> config.Reward:
    if reward.name not in STAND_INS:
        return reward
    return replace(reward, name=STAND_INS[reward.name], label=reward.key, options={}, batch_size=None)
