"""One epoch's pictures: which prompts, which noise, and the clean latents that the old policy makes of them.

Sample i of an epoch belongs to group ``i // images_per_prompt``. Its noise has the key (seed, epoch, i): it does not
depend on the ranks, on the batches, or on what ran before.

Shapes: B = pictures of an epoch; latents are ``[B, C, H, W]``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mogb_diffusion import flow
from mogb_diffusion.config import Run, Sampling
from mogb_diffusion.models.sd3 import SD3Model, Text
from mogb_diffusion.prompts import Prompt, PromptMixture
from mogb_diffusion.sampling import integrate
from mogb_diffusion.seeds import keyed_generator, keyed_noise


@dataclass(frozen=True)
class Epoch:
    """Which pictures an epoch has.

    Attributes:
        number: Of the epoch, from 0.
        rows: The row of the prompt dataset of every sample; those with the same row are compared with each other.
        seed: Of the run.
    """

    number: int
    rows: tuple[int, ...]
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def noise(self, samples: Sequence[int], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What the pictures start from."""
        return keyed_noise(shape, [(self.seed, "rollout", self.number, i) for i in samples], dtype)

    def training_noise(self, samples: Sequence[int], column: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What the clean latents are noised with, fresh for every time."""
        return keyed_noise(shape, [(self.seed, "noising", self.number, i, column) for i in samples], dtype)

    def times(self, samples: Sequence[int], grid: Tensor, count: int) -> Tensor:
        """``[samples, count]``: times of the sampling grid, in an order of each sample's own."""
        orders = [
            torch.randperm(len(grid), generator=keyed_generator(self.seed, "times", self.number, i))[:count]
            for i in samples
        ]
        return grid[torch.stack(orders)]

    def updates(self, count: int) -> list[list[int]]:
        """The samples of every optimizer step, shuffled, in nearly equal parts."""
        order = torch.randperm(len(self), generator=keyed_generator(self.seed, "updates", self.number)).tolist()
        return [order[len(order) * u // count : len(order) * (u + 1) // count] for u in range(count)]


def plan_epoch(run: Run, mixture: PromptMixture, number: int) -> Epoch:
    """Draws the prompts of an epoch and repeats each ``images_per_prompt`` times."""
    stages = run.balancing.stages
    sources = run.balancing.stage(number, run.epochs).sources if stages else None
    drawn = mixture.draw(run.batch.groups, run.seed, "epoch", number, sources=sources)
    rows = tuple(row for row in drawn for _ in range(run.batch.images_per_prompt))
    return Epoch(number, rows, run.seed)


def draw(model: SD3Model, prompts: Sequence[Prompt], noise: Tensor, how: Sampling) -> Tensor:
    """Clean latents from noise, by the policy that is active."""
    text = model.encode([prompt.text for prompt in prompts])
    empty = model.encode([""] * len(prompts)) if how.guidance > 1 else None

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        if empty is None:
            return model.velocity(latents, sigma, text)
        both = Text(torch.cat([text.tokens, empty.tokens]), torch.cat([text.pooled, empty.pooled]))
        asked, unasked = model.velocity(torch.cat([latents, latents]), sigma, both).chunk(2)
        return unasked + how.guidance * (asked - unasked)

    return integrate(velocity, noise.to(model.device), model.sigmas(how.steps), how.solver)


def noised(clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """The clean latents on their way to noise."""
    return flow.noised(clean, noise.to(clean), times.to(clean))


def describe_batch(run: Run, size: int) -> str:
    """What the configuration means for this number of ranks, in one line."""
    batch, times = run.batch, run.trained_timesteps
    per_update = -(-batch.images // batch.updates_per_epoch)
    per_rank = -(-per_update // size)
    micro = -(-per_rank // batch.micro_batch) * times
    return (
        f"{batch.groups} prompts x {batch.images_per_prompt} pictures = {batch.images} an epoch, "
        f"{batch.updates_per_epoch} updates of {per_update} pictures x {times} times; "
        f"on {size} rank{'s' if size > 1 else ''}: {per_rank} pictures an update, {micro} micro-steps of up to "
        f"{batch.micro_batch}"
    )
