"""The tiny world: five rewards at once on a real pipeline that two CPU cores train in minutes."""

from dataclasses import replace

from mogb_diffusion.config import (
    Balancing,
    Batch,
    Checkpoints,
    Evaluation,
    Loss,
    Model,
    Optimizer,
    Policy,
    Prompts,
    Reward,
    Run,
    Sampling,
    Tracking,
)

REWARDS = (
    Reward(name="world_preference", label="preference"),
    Reward(name="world_aesthetic", label="aesthetic"),
    Reward(name="world_alignment", label="alignment"),
    Reward(name="world_text", label="text"),
    Reward(name="world_composition", label="composition"),
)


def tiny() -> Run:
    """Five rewards, balanced exactly at every step: the demo."""
    return Run(
        name="tiny",
        epochs=26,
        model=Model(source="tiny"),
        policy=Policy(rank=16, alpha=32.0, old_schedule="linear", ema=0.0),
        prompts=(
            Prompts(format="world", kind="objects", count=384, weight=5.0),
            Prompts(format="world", kind="text", count=128, weight=3.0),
        ),
        rewards=REWARDS,
        batch=Batch(groups=8, images_per_prompt=12, micro_batch=48, updates_per_epoch=2, timesteps=2),
        sampling=Sampling(steps=8),
        loss=Loss(beta=1.0, kl_weight=0.0),
        balancing=Balancing(mode="marble_exact", advantage_scale=1.0),
        optimizer=Optimizer(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0),
        evaluation=Evaluation(
            every=0,
            prompts=(
                Prompts(format="world", kind="objects", split="held_out", count=120),
                Prompts(format="world", kind="text", split="held_out", count=120),
            ),
            images=240,
            batch=60,
        ),
        checkpoints=Checkpoints(every=8, keep_last=2),
        tracking=Tracking(samples_every=8, samples=32),
    )


def tiny_smoke() -> Run:
    """The same in a few seconds, on random weights: does everything run?"""
    run = tiny()
    return replace(
        run,
        name="tiny_smoke",
        epochs=2,
        model=Model(source="tiny-random"),
        batch=Batch(groups=4, images_per_prompt=3, micro_batch=6, updates_per_epoch=2, timesteps=1),
        sampling=Sampling(steps=2),
        evaluation=replace(run.evaluation, images=8, batch=8),
        checkpoints=Checkpoints(every=1, keep_last=2),
        tracking=Tracking(samples_every=1, samples=8),
    )


def tiny_weighted_sum() -> Run:
    """DiffusionNFT's way: the rewards are summed."""
    return replace(tiny(), name="tiny_weighted_sum", balancing=Balancing(mode="weighted_sum", advantage_scale=1.0))


def tiny_marble() -> Run:
    """The paper's amortized form: solved at every tenth step."""
    return replace(tiny(), name="tiny_marble", balancing=Balancing(mode="marble", advantage_scale=1.0))
