"""Stable Diffusion 3.5 Medium with five rewards: MARBLE's run, its baselines and its ablations, by the paper's tables.

Values are those of MARBLE (arXiv 2605.06507), and of its released script where the paper says nothing: 48 prompts of
24 pictures an epoch, 25 steps of the second-order solver without guidance, LoRA of rank 32, AdamW with 3e-4. Every
other run changes what its row of a table changes, and nothing else. ``docs/paper.md`` maps rows to names.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

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
    Stage,
    Tracking,
)

MODEL = "stabilityai/stable-diffusion-3.5-medium"
GENERAL = ("pickscore", "hpsv2", "clip")
SPECIALISTS = ("ocr", "geneval")
GENERAL_PROMPTS, OCR_PROMPTS, GENEVAL_PROMPTS = range(3)  # the sources, by number
REWARDS = tuple(
    Reward(name=name, specialist=name in SPECIALISTS or None, options={"device": "auto"} if name != "ocr" else {})
    for name in (*GENERAL, *SPECIALISTS)
)
# DiffusionNFT's multi-reward model: iterations, the rewards that train, and the prompts that they are drawn from.
PUBLISHED_STAGES = (
    (800, GENERAL, GENERAL_PROMPTS),
    (300, ("geneval",), GENEVAL_PROMPTS),
    (200, GENERAL, GENERAL_PROMPTS),
    (200, ("geneval",), GENEVAL_PROMPTS),
    (100, ("ocr",), OCR_PROMPTS),
)
EPOCHS = sum(iterations for iterations, _, _ in PUBLISHED_STAGES)
MARBLE = Balancing(mode="marble", gradients="full", coefficients="raw", refresh_every=10, decay=0.7)
CFG_SCALE = 4.5  # of the example on the model's page


@dataclass(frozen=True)
class Variant:
    """A run that differs from the main one.

    Attributes:
        name: Of the recipe.
        summary: One line.
        change: From the main run to this one.
    """

    name: str
    summary: str
    change: Callable[[Run], Run]

    def __call__(self) -> Run:
        """The whole configuration."""
        return replace(self.change(_main()), name=self.name)


def _main() -> Run:
    return Run(
        seed=42,
        epochs=EPOCHS,
        model=Model(source=MODEL, dtype="bfloat16", resolution=512, max_sequence_length=128),
        policy=Policy(rank=32, alpha=64.0, old_schedule="linear", old_rate=0.001, old_hold=0.95, ema=0.9),
        prompts=(
            Prompts(path="prompts/pickscore/train.txt", format="text", rewards=GENERAL),
            Prompts(path="prompts/ocr/train.txt", format="text", rewards=(*GENERAL, "ocr")),
            Prompts(path="prompts/geneval/train_metadata.jsonl", format="geneval", rewards=(*GENERAL, "geneval")),
        ),
        rewards=REWARDS,
        batch=Batch(groups=48, images_per_prompt=24, micro_batch=9),
        sampling=Sampling(steps=25, solver="dpm2"),
        loss=Loss(beta=0.1, max_advantage=5.0, std="prompt", kl_weight=1e-4),
        balancing=MARBLE,
        optimizer=Optimizer(lr=3e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4, max_grad_norm=1.0),
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


def _balanced(balancing: Balancing) -> Callable[[Run], Run]:
    return lambda run: replace(run, balancing=balancing)


def _marble(**options: object) -> Callable[[Run], Run]:
    return _balanced(replace(MARBLE, **options))  # type: ignore[arg-type]


def _untrained(guidance: float) -> Callable[[Run], Run]:
    def change(run: Run) -> Run:
        return replace(run, epochs=0, evaluation=replace(run.evaluation, guidance=guidance))

    return change


def _script(run: Run) -> Run:
    return replace(
        run,
        model=replace(run.model, dtype="float16"),
        loss=replace(run.loss, std="global"),
        balancing=Balancing(mode="marble_script", refresh_every=10, decay=0.7),
    )


def _sequential(run: Run) -> Run:
    stages = tuple(
        Stage(share=iterations, rewards=rewards, sources=(source,)) for iterations, rewards, source in PUBLISHED_STAGES
    )
    return replace(run, balancing=Balancing(mode="sequential", stages=stages))


def _weighted(run: Run) -> Run:
    rewards = tuple(replace(reward, weight=2.0 if reward.name in SPECIALISTS else 1.0) for reward in run.rewards)
    return replace(run, rewards=rewards, balancing=Balancing(mode="weighted_sum"))


def _single(name: str) -> Callable[[Run], Run]:
    """One reward alone, on the prompts that its specialists' data sets have; the others are measured."""

    def change(run: Run) -> Run:
        source = {"ocr": OCR_PROMPTS, "geneval": GENEVAL_PROMPTS}.get(name, GENERAL_PROMPTS)
        return replace(
            run,
            prompts=(replace(run.prompts[source], rewards=(name,)),),
            rewards=tuple(reward for reward in run.rewards if reward.name == name),
            evaluation=replace(run.evaluation, rewards=tuple(reward for reward in run.rewards if reward.name != name)),
            balancing=Balancing(mode=f"single:{name}"),
        )

    return change


def _specialist_alpha() -> dict[str, float]:
    return {name: 2.0 if name in SPECIALISTS else 1.0 for name in (*GENERAL, *SPECIALISTS)}


VARIANTS = (
    Variant("sd35_marble", "The main run: MARBLE, solved afresh at every tenth step.", lambda run: run),
    Variant(
        "sd35_marble_final_uniform",
        "The main run, the last tenth of it with uniform coefficients.",
        _marble(final_uniform=0.1),
    ),
    Variant("sd35_marble_script", "The released script's settings and choices, to the letter.", _script),
    Variant("sd35_script", "Another name of sd35_marble_script.", _script),
    Variant(
        "sd35_exact",
        "MARBLE exactly at every step, for one or two backward passes.",
        _balanced(Balancing(mode="marble_exact")),
    ),
    Variant("sd35_marble_exact", "Another name of sd35_exact.", _balanced(Balancing(mode="marble_exact"))),
    Variant("sd35_base", "Table 1: the model as it is, measured without guidance.", _untrained(1.0)),
    Variant(
        "sd35_base_cfg",
        f"Table 1: the model as it is, measured with guidance {CFG_SCALE}.",
        _untrained(CFG_SCALE),
    ),
    Variant("sd35_sequential", "Table 1: DiffusionNFT, one stage of rewards after the other.", _sequential),
    Variant(
        "sd35_weighted_sum",
        "Tables 1, 2: DiffusionNFT on the sum of the rewards.",
        _balanced(Balancing(mode="weighted_sum")),
    ),
    Variant(
        "sd35_every_step",
        "Tables 2, 3: MARBLE with K backward passes at every step.",
        _balanced(Balancing(mode="marble_every_step")),
    ),
    Variant("sd35_unnormalized", "Table 3: MARBLE without normalization of the gradients.", _marble(normalize=False)),
    Variant("sd35_fixed", "Table 3: fixed uniform coefficients.", _balanced(Balancing(mode="fixed"))),
    *(
        Variant(f"sd35_marble_n{every}", f"Table S2: MARBLE, solved at every {every}th step.",
                _marble(refresh_every=every))
        for every in (5, 10, 20)
    ),
    *(
        Variant(f"sd35_marble_rho0{tenths}", f"Table S3: MARBLE with the decay 0.{tenths} of its average.",
                _marble(decay=tenths / 10))
        for tenths in (1, 3, 5, 7, 9)
    ),
    Variant(
        "sd35_reward_dropout",
        "Table S4: general rewards dropped by chance on specialists' prompts.",
        _balanced(Balancing(mode="reward_dropout", dropout=0.5)),
    ),
    Variant("sd35_weights_11122", "Table S4: the rewards summed, specialists twice.", _weighted),
    Variant(
        "sd35_fixed_11122",
        "Table S4, as weights of the losses: fixed coefficients, specialists' twice.",
        _balanced(Balancing(mode="fixed", alpha=_specialist_alpha())),
    ),
    *(
        Variant(f"sd35_single_{name}", f"One reward alone: {name}.", _single(name))
        for name in (*GENERAL, *SPECIALISTS)
    ),
)  # fmt: skip
