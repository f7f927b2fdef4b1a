"""Stable Diffusion 3.5 Medium with five rewards: the main run and what it is compared with.

Values are those of MARBLE (arXiv 2605.06507) and of its released recipe where the paper is silent: 48 prompts of 24
pictures an epoch, 25 steps of the second-order solver without guidance, LoRA of rank 32, AdamW with 3e-4.
"""

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

MODEL = "stabilityai/stable-diffusion-3.5-medium"
GENERAL = ("pickscore", "hpsv2", "clip")
REWARDS = (
    Reward(name="pickscore"),
    Reward(name="hpsv2"),
    Reward(name="clip"),
    Reward(name="ocr", specialist=True),
    Reward(name="geneval", specialist=True),
)


def sd35_marble() -> Run:
    """The main run: MARBLE, solved afresh every ten steps."""
    return Run(
        name="sd35_marble",
        seed=42,
        epochs=1600,
        model=Model(source=MODEL, dtype="bfloat16", resolution=512, max_sequence_length=128),
        policy=Policy(rank=32, alpha=64.0, old_schedule="linear", old_hold=0.95, ema=0.9),
        prompts=(
            Prompts(path="prompts/pickscore/train.txt", format="text", rewards=GENERAL),
            Prompts(path="prompts/ocr/train.txt", format="text", rewards=(*GENERAL, "ocr")),
            Prompts(path="prompts/geneval/train_metadata.jsonl", format="geneval", rewards=(*GENERAL, "geneval")),
        ),
        rewards=REWARDS,
        batch=Batch(groups=48, images_per_prompt=24, micro_batch=9),
        sampling=Sampling(steps=25, solver="dpm2"),
        loss=Loss(beta=0.1, kl_weight=1e-4),
        balancing=Balancing(mode="marble", gradients="full", coefficients="raw", refresh_every=10, decay=0.7),
        optimizer=Optimizer(lr=3e-4),
        evaluation=Evaluation(
            every=50,
            prompts=(
                Prompts(path="prompts/pickscore/test.txt", format="text"),
                Prompts(path="prompts/ocr/test.txt", format="text"),
                Prompts(path="prompts/geneval/test_metadata.jsonl", format="geneval"),
            ),
            images=768,
            batch=16,
            steps=40,
            solver="euler",
        ),
        checkpoints=Checkpoints(every=25, keep_last=3),
        tracking=Tracking(samples_every=25, samples=24),
    )


def sd35_marble_exact() -> Run:
    """Every step exact, at the cost of one or two backward passes."""
    return replace(sd35_marble(), name="sd35_marble_exact", balancing=Balancing(mode="marble_exact"))


def sd35_weighted_sum() -> Run:
    """The baseline of DiffusionNFT: the rewards summed."""
    return replace(sd35_marble(), name="sd35_weighted_sum", balancing=Balancing(mode="weighted_sum"))


def sd35_fixed() -> Run:
    """The paper's ablation: uniform coefficients on per-reward advantages."""
    return replace(sd35_marble(), name="sd35_fixed", balancing=Balancing(mode="fixed"))


def sd35_every_step() -> Run:
    """The paper's Algorithm 1: K backward passes at every step."""
    return replace(sd35_marble(), name="sd35_every_step", balancing=Balancing(mode="marble_every_step"))


def sd35_script() -> Run:
    """The released script to the letter, for comparison: fp16, and advantages divided by the epoch's deviation."""
    run = sd35_marble()
    return replace(
        run,
        name="sd35_script",
        model=replace(run.model, dtype="float16"),
        loss=replace(run.loss, std="global"),
        balancing=Balancing(mode="marble_script"),
    )
