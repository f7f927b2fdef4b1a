"""Held-out prompts with the same noise every time: a table of rewards, and pictures to look at."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from mogb_diffusion.config import Run, Sampling
from mogb_diffusion.distributed import Ranks
from mogb_diffusion.models.sd3 import SD3Model
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rollouts import draw
from mogb_diffusion.scoring import Scorer
from mogb_diffusion.seeds import keyed_noise


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


def evaluation_sampling(run: Run) -> Sampling:
    """How evaluation pictures are drawn: as rollouts, except for what the configuration says."""
    wanted = {
        name: value for name in ("steps", "solver", "guidance") if (value := getattr(run.evaluation, name)) is not None
    }
    return replace(run.sampling, **wanted)


@torch.no_grad()
def draw_pictures(
    model: SD3Model, prompts: Sequence[Prompt], how: Sampling, seed: int, *, batch: int = 32, first: int = 0
) -> Float64[Tensor, "B 3 h w"] | Tensor:
    """Pictures of prompts; picture n has the noise of ``first + n``."""
    images = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        keys: list[tuple[int | str, ...]] = [(seed, "evaluation", first + start + n) for n in range(len(part))]
        images.append(model.decode(draw(model, part, keyed_noise(model.latent_shape, keys, model.dtype), how)).cpu())
    return torch.cat(images)


def evaluate(
    model: SD3Model, scorer: Scorer, prompts: Sequence[Prompt], run: Run, ranks: Ranks
) -> tuple[dict[str, Score], Float64[Tensor, "K B"]]:
    """Draws pictures with the policy that is active, and scores them.

    Returns:
        The score of each reward, and all rewards ``[K, B]``; the same on every rank.
    """
    mine = ranks.mine(len(prompts))
    how = evaluation_sampling(run)
    part = [prompts[n] for n in mine]
    for start in range(0, len(part), run.evaluation.batch):
        piece = part[start : start + run.evaluation.batch]
        first = mine.start + start
        scorer.submit(draw_pictures(model, piece, how, run.seed, batch=len(piece), first=first), piece)
    rewards = ranks.gather(scorer.collect().mT.contiguous(), len(prompts)).mT
    return {name: summarized(row) for name, row in zip(scorer.rewards, rewards, strict=True)}, rewards


def summarized(row: Float64[Tensor, " B"]) -> Score:
    """The mean of the numbers that are there."""
    values = row[~row.isnan()]
    if not len(values):
        return Score(math.nan, math.nan, 0)
    spread = float(values.std()) if len(values) > 1 else math.nan
    return Score(float(values.mean()), spread / math.sqrt(len(values)), len(values))
