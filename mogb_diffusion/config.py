"""What a run is: frozen dataclasses that are checked when they are built, from Python, YAML or both.

A key that does not exist and a value that cannot be are refused with the path of the key, such as
``batch.micro_batch: must be a whole number >= 1, but got 0.`` :func:`to_yaml` writes a run out in full, and
:func:`from_yaml` takes that back.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from mogb_diffusion.errors import InputError

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Gradients = Literal["full", "slope"]
TextEncoders = Literal["resident", "offload", "precompute"]
T = TypeVar("T")

SD3_LORA_TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
SUM_MODES = ("weighted_sum", "gdpo")  # one advantage from all rewards
CONSTANT_MODES = ("fixed", "single", "sequential", "reward_dropout")  # coefficients that no gradient is needed for
MARBLE_MODES = ("marble", "marble_every_step", "marble_script", "marble_exact", "marble_spread")
MODES = (*SUM_MODES, *CONSTANT_MODES, *MARBLE_MODES)


class ConfigError(InputError):
    """A key that cannot be used; ``path`` grows on the way out."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path, self.problem = path, problem

    def under(self, prefix: str) -> "ConfigError":
        """The same error, seen from one level further up."""
        return ConfigError(f"{prefix}.{self.path}", self.problem)


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which pipeline is trained, and how it is run.

    Attributes:
        source: ``tiny`` (the tiny world's, pre-trained), a ``.safetensors`` file of other weights for it,
            ``tiny-random``, or a folder or hub name of a ``StableDiffusion3Pipeline``.
        seed: Of the weights of ``tiny-random``.
        dtype: What the transformer computes in. Weights that train are kept in float32 or wider.
        device: ``auto`` takes an accelerator where there is one.
        max_sequence_length: Tokens of the T5 encoder; the tiny model wants 1. None: 1 for tiny, 128 otherwise.
        resolution: Side of the pictures in pixels; None is the model's own.
        gradient_checkpointing: Compute each block again in the backward pass, to save memory.
        text_encoders: ``resident`` on the device; ``offload``: in main memory, and on the device only while the prompts
            of an epoch are encoded; ``precompute``: as ``offload``, but all prompts of the run are encoded before
            training, kept in main memory, and the encoders are dropped.
        shard: Spread weights, gradients and the optimizer's state over the ranks (FSDP2), for ``policy.kind: full``.
    """

    source: str = "tiny"
    seed: int = 0
    dtype: Dtype = "float32"
    device: str = "auto"
    max_sequence_length: int | None = None
    resolution: int | None = None
    gradient_checkpointing: bool = False
    shard: bool = False
    text_encoders: TextEncoders = "resident"

    def __post_init__(self) -> None:
        _need(bool(self.source.strip()), "source", "must name a pipeline", self.source)
        _at_least("max_sequence_length", self.max_sequence_length, 1)
        _at_least("resolution", self.resolution, 1)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What trains, and how the old policy and the average follow it.

    Attributes:
        kind: ``lora`` adapters, or ``full`` for every weight of the transformer (small models).
        rank: Of the adapters.
        alpha: Of the adapters; they are scaled by alpha / rank.
        targets: Endings of the names of the layers that get adapters.
        old_schedule: How slowly the old policy follows, see :func:`mogb_diffusion.policy_schedule.old_policy_decay`.
        old_flat: Steps before its decay grows; None is the schedule's own.
        old_rate: Growth of its decay per step.
        old_hold: Where its decay stops growing.
        ema: Decay of the average of the weights, which is evaluated and exported; 0 keeps none.
    """

    kind: Literal["lora", "full"] = "lora"
    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] = SD3_LORA_TARGETS
    old_schedule: Literal["copy", "linear", "delayed_linear"] = "linear"
    old_flat: int | None = None
    old_rate: float | None = None
    old_hold: float | None = None
    ema: float = 0.9

    def __post_init__(self) -> None:
        _at_least("rank", self.rank, 1)
        _positive("alpha", self.alpha)
        _need(bool(self.targets) or self.kind == "full", "targets", "must name at least one layer", self.targets)
        _at_least("old_flat", self.old_flat, 0)
        _at_least("old_rate", self.old_rate, 0)
        _within("old_hold", self.old_hold, 0, 1)
        overridden = any(value is not None for value in (self.old_flat, self.old_rate, self.old_hold))
        _need(
            self.old_schedule != "copy" or not overridden, "old_schedule",
            "'copy' has no old_flat, old_rate or old_hold: use 'linear' for a decay of your own", self.old_schedule,
        )  # fmt: skip
        _need(0 <= self.ema < 1, "ema", "must be in [0, 1); 0 keeps no average", self.ema)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """One source of prompts.

    Attributes:
        path: A file; None for prompts of the tiny world.
        format: Of the file, see :func:`mogb_diffusion.prompts.read_prompts`; ``world`` draws from the tiny world.
        kind: Of the tiny world's prompts: ``objects``, ``text`` or ``mixed``.
        split: Of the tiny world's prompts.
        count: How many of the world's prompts, or at most how many lines of the file; None is 256 or all.
        weight: How often this source is drawn from, relative to the others.
        rewards: The rewards that apply; None leaves it to the lines and to the rewards.
    """

    path: str | None = None
    format: Literal["auto", "text", "geneval", "jsonl", "world"] = "auto"
    kind: Literal["mixed", "text", "objects"] = "mixed"
    split: Literal["train", "held_out"] = "train"
    count: int | None = None
    weight: float = 1.0
    rewards: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _need((self.path is None) == (self.format == "world"), "path",
              "must name a file, or be left out with format: world", self.path)  # fmt: skip
        _at_least("count", self.count, 1)
        _positive("weight", self.weight)


@dataclass(frozen=True, kw_only=True)
class Reward:
    """One reward.

    Attributes:
        name: In the registry, or ``module:Class`` or ``module:function``.
        label: What it is called in logs and tables; None is the name.
        weight: In the sum of ``weighted_sum`` and ``gdpo``.
        specialist: It applies to some prompts only, so that NaN elsewhere is no failure; None asks the reward itself.
        options: Keyword arguments of its class.
        batch_size: Pictures per call; None gives it a whole sampling batch at once.
    """

    name: str
    label: str | None = None
    weight: float = 1.0
    specialist: bool | None = None
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: int | None = None

    def __post_init__(self) -> None:
        _need(bool(self.name.strip()), "name", "must name a reward", self.name)
        _need(math.isfinite(self.weight), "weight", "must be a finite number", self.weight)
        _at_least("batch_size", self.batch_size, 1)

    @property
    def key(self) -> str:
        """What it is called in logs and tables."""
        return self.label or self.name.rsplit(":", 1)[-1]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """How many pictures an epoch has, and how they are cut up. Everything else is derived, for any number of ranks.

    Attributes:
        groups: Prompts per epoch.
        images_per_prompt: Pictures of each, which are compared with each other.
        micro_batch: Pictures per forward and backward pass of a rank.
        sampling_batch: Pictures that a rank samples at once; None is ``micro_batch``.
        updates_per_epoch: Optimizer steps per epoch; the pictures are divided among them.
        timesteps: Of each picture's sampling grid, how many are trained on; None is 99 % of them, as in DiffusionNFT.
    """

    groups: int = 48
    images_per_prompt: int = 24
    micro_batch: int = 9
    sampling_batch: int | None = None
    updates_per_epoch: int = 1
    timesteps: int | None = None

    def __post_init__(self) -> None:
        for name in ("groups", "micro_batch", "updates_per_epoch"):
            _at_least(name, getattr(self, name), 1)
        rule = "must be at least 2, because advantages compare pictures of one prompt"
        _need(self.images_per_prompt >= 2, "images_per_prompt", rule, self.images_per_prompt)
        _at_least("sampling_batch", self.sampling_batch, 1)
        _at_least("timesteps", self.timesteps, 1)
        _need(self.updates_per_epoch <= self.images, "updates_per_epoch",
              f"must not exceed the {self.images} pictures of an epoch", self.updates_per_epoch)  # fmt: skip

    @property
    def images(self) -> int:
        """Pictures of an epoch."""
        return self.groups * self.images_per_prompt


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How rollouts are drawn.

    Attributes:
        steps: Evaluations of the velocity.
        solver: ``euler`` or ``dpm2``, see :mod:`mogb_diffusion.sampling`.
        guidance: Of classifier-free guidance; 1 is off, as in every DiffusionNFT recipe.
    """

    steps: int = 10
    solver: Literal["euler", "dpm2"] = "euler"
    guidance: float = 1.0

    def __post_init__(self) -> None:
        _at_least("steps", self.steps, 1)
        _at_least("guidance", self.guidance, 1)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """DiffusionNFT's loss.

    Attributes:
        beta: How far the imagined policies step.
        max_advantage: Where advantages are clipped.
        advantage_mode: Which part of them counts, see :func:`mogb_diffusion.nft.optimality`.
        std: Whose standard deviation divides: the prompt's (MARBLE's paper), or that of the epoch (the released code).
        eps: Added to it.
        memory: Statistics that run over epochs, with this factor on the past; None forgets between epochs.
        kl_weight: Of the distance to the reference, added after balancing; 0 needs no reference.
    """

    beta: float = 0.1
    max_advantage: float = 5.0
    advantage_mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all"
    std: Literal["prompt", "global"] = "prompt"
    eps: float = 1e-4
    memory: float | None = None
    kl_weight: float = 1e-4

    def __post_init__(self) -> None:
        _positive("beta", self.beta)
        _positive("max_advantage", self.max_advantage)
        _at_least("eps", self.eps, 0)
        _within("memory", self.memory, 0, 1)
        _at_least("kl_weight", self.kl_weight, 0)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a ``sequential`` run.

    Attributes:
        share: Of the epochs, relative to the other stages.
        rewards: The rewards that train then, equally weighted.
        sources: Numbers of the sources in ``prompts`` that are drawn from then; None is all of them.
    """

    share: float
    rewards: tuple[str, ...]
    sources: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _positive("share", self.share)
        _need(bool(self.rewards), "rewards", "must name at least one reward", self.rewards)
        _need(self.sources is None or bool(self.sources), "sources", "must name at least one source", self.sources)


@dataclass(frozen=True, kw_only=True)
class Balancing:
    """How K rewards become one direction; see :mod:`mogb_diffusion.balancing` for the modes.

    Attributes:
        mode: One of the modes, ``single:<reward>``, or the name of a method of mogb.
        options: Of that method.
        gradients: Coefficients are solved on the ``full`` gradients or on their ``slope``, the part that depends on
            the advantages; None is the mode's own.
        normalize: MARBLE's modes solve on unit gradients and bring the direction to the mean length. False is the
            paper's ablation: the min-norm point of the gradients as they are.
        coefficients: Between refreshes the coefficients of the refresh step (``norm_corrected``), or the paper's
            simplex weights (``raw``).
        refresh_every: Steps from one solve to the next; None is 10 for ``marble`` and ``marble_script``, 1 otherwise.
        decay: Of the moving average of MARBLE's simplex weights; None is 0.7 where steps are saved, 0 where every step
            is solved.
        cold_start: What the average starts from: the ``first`` solve, or ``uniform`` weights.
        shrinkage: Pull the simplex weights towards uniform where gradients are mostly noise.
        silent: A reward whose gradient is shorter than this share of the longest one takes no part.
        fraction: Of the micro-steps on which ``marble_spread`` takes gradients.
        final_uniform: The share of the epochs, at the end, with uniform coefficients.
        alpha: Coefficients of ``fixed``, by reward; None is uniform.
        stages: Of ``sequential``.
        dropout: Chance with which ``reward_dropout`` silences a general reward on a specialist's prompt.
        advantage_scale: Standard deviation that the combined advantage of a step is brought to; None leaves it.
    """

    mode: str = "marble"
    options: dict[str, Any] = field(default_factory=dict)
    gradients: Gradients | None = None
    normalize: bool = True
    coefficients: Literal["norm_corrected", "raw"] = "norm_corrected"
    refresh_every: int | None = None
    decay: float | None = None
    cold_start: Literal["first", "uniform"] = "first"
    shrinkage: bool = False
    silent: float = 1e-6
    fraction: float = 0.25
    final_uniform: float = 0.0
    alpha: dict[str, float] | None = None
    stages: tuple[Stage, ...] = ()
    dropout: float = 0.5
    advantage_scale: float | None = None

    def __post_init__(self) -> None:
        _known_mode(self.mode)
        _at_least("refresh_every", self.refresh_every, 1)
        _need(self.decay is None or 0 <= self.decay < 1, "decay", "must be in [0, 1)", self.decay)
        _need(0 <= self.silent < 1, "silent", "must be in [0, 1)", self.silent)
        _need(0 < self.fraction <= 1, "fraction", "must be in (0, 1]", self.fraction)
        _within("final_uniform", self.final_uniform, 0, 1)
        _within("dropout", self.dropout, 0, 1)
        if self.advantage_scale is not None:
            _positive("advantage_scale", self.advantage_scale)
        self._check_belongings()

    def _check_belongings(self) -> None:
        """Options of other modes would do nothing, which is an error."""
        _need(self.alpha is None or self.mode == "fixed", "alpha", "belongs to mode: fixed", self.alpha)
        if self.alpha is not None:
            total = sum(self.alpha.values())
            _need(all(value >= 0 for value in self.alpha.values()) and total > 0, "alpha",
                  "must be numbers >= 0 that do not all vanish", self.alpha)  # fmt: skip
        _need(bool(self.stages) == (self.mode == "sequential"), "stages",
              "belong to mode: sequential, which needs at least one", list(self.stages))  # fmt: skip
        is_method = self.method is not None
        rule = "are those of a method of mogb; the modes of this package have keys of their own"
        _need(not self.options or is_method, "options", rule, self.options)
        solved = is_method or self.mode in MARBLE_MODES
        _need(self.gradients is None or solved, "gradients", f"means nothing in mode: {self.mode}", self.gradients)
        _need(self.decay is None or self.mode in MARBLE_MODES, "decay", f"means nothing in mode: {self.mode}; "
              "give a method its own average with options, if it has one", self.decay)  # fmt: skip
        _need(self.normalize or (self.mode in MARBLE_MODES and self.mode != "marble_script"), "normalize",
              f"false means nothing in mode: {self.mode}", self.normalize)  # fmt: skip
        _need(not self.shrinkage or self.mode in ("marble", "marble_every_step", "marble_exact"), "shrinkage",
              f"means nothing in mode: {self.mode}", self.shrinkage)  # fmt: skip
        _need(self.cold_start == "first" or self.mode in MARBLE_MODES, "cold_start",
              f"means nothing in mode: {self.mode}", self.cold_start)  # fmt: skip
        _need(self.coefficients == "norm_corrected" or self.mode in ("marble", "marble_spread"), "coefficients",
              f"'raw' belongs to modes: marble, marble_spread; {self.mode} has none between refreshes",
              self.coefficients)  # fmt: skip
        every = self.mode in ("marble_every_step", "marble_exact", "marble_spread") or not solved
        _need(self.refresh_every in (None, 1) or not every, "refresh_every",
              f"must be 1 or left out in mode: {self.mode}", self.refresh_every)  # fmt: skip
        _need(self.final_uniform == 0 or solved, "final_uniform", f"means nothing in mode: {self.mode}",
              self.final_uniform)  # fmt: skip
        _need(self.mode != "marble_script" or (self.gradients in (None, "full") and self.advantage_scale is None),
              "mode", "marble_script follows a script to the letter: no gradients: slope and no advantage_scale",
              self.mode)  # fmt: skip

    @property
    def method(self) -> str | None:
        """The method of mogb, where the mode names one."""
        return None if self.mode in MODES or self.mode.startswith("single:") else self.mode

    @property
    def solved_on(self) -> Gradients:
        """On which gradients coefficients are solved."""
        if self.gradients is not None:
            return self.gradients
        return "full" if self.mode in ("marble_every_step", "marble_script") else "slope"

    @property
    def interval(self) -> int:
        """Steps from one solve to the next."""
        if self.refresh_every is not None:
            return self.refresh_every
        return 10 if self.mode in ("marble", "marble_script") else 1

    def stage(self, epoch: int, epochs: int) -> Stage:
        """The stage of a ``sequential`` run that an epoch belongs to."""
        total = sum(stage.share for stage in self.stages)
        reached = 0.0
        for stage in self.stages:
            reached += stage.share / total
            if epoch < round(reached * epochs):
                return stage
        return self.stages[-1]

    @property
    def averaging(self) -> float:
        """Decay of the moving average of MARBLE's simplex weights."""
        if self.decay is not None:
            return self.decay
        return 0.0 if self.mode in ("marble_every_step", "marble_exact") else 0.7


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW with a constant learning rate, as in DiffusionNFT.

    Attributes:
        lr: Learning rate.
        betas: Decays of its averages.
        eps: In its denominator.
        weight_decay: Decoupled.
        max_grad_norm: The direction is clipped to this norm; 0 is off.
    """

    lr: float = 3e-4
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _positive("lr", self.lr)
        _need(len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "betas",
              "must be two numbers in [0, 1)", list(self.betas))  # fmt: skip
        _positive("eps", self.eps)
        _at_least("weight_decay", self.weight_decay, 0)
        _at_least("max_grad_norm", self.max_grad_norm, 0)


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What happens when a reward fails.

    Attributes:
        timeout: Seconds for one call; then its pictures lose the signal of this reward.
        retries: More attempts after an error.
        max_failures: So many failed calls of one reward in a row stop the run, with a checkpoint.
    """

    timeout: float = 60.0
    retries: int = 1
    max_failures: int = 10

    def __post_init__(self) -> None:
        _positive("timeout", self.timeout)
        _at_least("retries", self.retries, 0)
        _at_least("max_failures", self.max_failures, 1)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out prompts, with the same noise at every evaluation.

    Attributes:
        every: Epochs from one to the next; 0 evaluates only before and after training. Ignored without prompts.
        prompts: Where they come from; empty for none.
        images: How many pictures: the prompts in turn until there are so many.
        batch: Pictures at once on a rank.
        rewards: Rewards that are measured but not trained on.
        steps: As for sampling; None is the same as there.
        solver: As for sampling; None is the same as there.
        guidance: As for sampling; None is the same as there.
    """

    every: int = 10
    prompts: tuple[Prompts, ...] = ()
    images: int = 96
    batch: int = 32
    rewards: tuple[Reward, ...] = ()
    steps: int | None = None
    solver: Literal["euler", "dpm2"] | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        _at_least("every", self.every, 0)
        _at_least("images", self.images, 1)
        _at_least("batch", self.batch, 1)
        _at_least("steps", self.steps, 1)
        _at_least("guidance", self.guidance, 1)


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When a run is saved.

    Attributes:
        every: Epochs from one to the next; the last epoch is always saved. 0 saves only that.
        keep_last: How many are kept; 0 keeps all.
    """

    every: int = 5
    keep_last: int = 3

    def __post_init__(self) -> None:
        _at_least("every", self.every, 0)
        _at_least("keep_last", self.keep_last, 0)


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """What is written while a run goes on, besides ``metrics.jsonl``.

    Attributes:
        samples_every: Epochs from one grid of pictures to the next; 0 writes only the first and the last.
        samples: Pictures in a grid.
        tensorboard: Also write event files.
        wandb: The name of a Weights & Biases project to log to; None for none.
    """

    samples_every: int = 5
    samples: int = 24
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        _at_least("samples_every", self.samples_every, 0)
        _at_least("samples", self.samples, 1)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A whole run.

    Attributes:
        name: For titles.
        seed: Of everything that is random.
        epochs: Rounds of rollouts and updates; 0 trains nothing: the model is measured as it is.
        model: Which pipeline.
        policy: What trains.
        prompts: Where training prompts come from.
        rewards: What is maximized.
        batch: How many pictures.
        sampling: How rollouts are drawn.
        loss: What is differentiated.
        balancing: How K gradients become one direction.
        optimizer: What the direction goes into.
        scoring: What happens when a reward fails.
        evaluation: On held-out prompts.
        checkpoints: When it is saved.
        tracking: What else is written.
    """

    name: str = "run"
    seed: int = 0
    epochs: int = 100
    model: Model = field(default_factory=Model)
    policy: Policy = field(default_factory=Policy)
    prompts: tuple[Prompts, ...] = ()
    rewards: tuple[Reward, ...] = ()
    batch: Batch = field(default_factory=Batch)
    sampling: Sampling = field(default_factory=Sampling)
    loss: Loss = field(default_factory=Loss)
    balancing: Balancing = field(default_factory=Balancing)
    optimizer: Optimizer = field(default_factory=Optimizer)
    scoring: Scoring = field(default_factory=Scoring)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    tracking: Tracking = field(default_factory=Tracking)

    def __post_init__(self) -> None:
        _at_least("seed", self.seed, 0)
        _at_least("epochs", self.epochs, 0)
        _need(bool(self.prompts), "prompts", "must name at least one source", [])
        _need(bool(self.rewards), "rewards", "must name at least one reward", [])
        keys = [reward.key for reward in (*self.rewards, *self.evaluation.rewards)]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        _need(not twice, "rewards", "must have different names; use label to tell them apart", twice)
        self._check_names(self.reward_names)
        if self.model.shard:
            self._check_shard()
        if self.batch.timesteps is not None:
            rule = f"must not exceed the {self.sampling.steps} times of sampling.steps"
            _need(self.batch.timesteps <= self.sampling.steps, "batch.timesteps", rule, self.batch.timesteps)

    @property
    def reward_names(self) -> tuple[str, ...]:
        """What the K rewards are called."""
        return tuple(reward.key for reward in self.rewards)

    @property
    def trained_timesteps(self) -> int:
        """How many times of each picture's grid are trained on."""
        return self.batch.timesteps or max(1, int(self.sampling.steps * 0.99))

    def _check_shard(self) -> None:
        """Weights that no rank has whole leave no room for what needs them so."""
        _need(self.policy.kind == "full", "model.shard", "needs policy.kind: full, as adapters are small", True)
        mode, instead = self.balancing.mode, {"marble_exact": "marble_every_step", "marble_spread": "marble"}
        hint = f"; use {instead.get(mode, 'marble or marble_every_step')}"
        _need(mode not in ("marble_exact", "marble_spread", "marble_script"), "balancing.mode",
              f"needs whole weights on every rank, which there are none with model.shard{hint}", mode)  # fmt: skip
        _need(not self.balancing.shrinkage, "balancing.shrinkage",
              "compares the micro-steps of single ranks, which model.shard adds up", True)  # fmt: skip

    def _check_names(self, known: Sequence[str]) -> None:
        asked = [("balancing.alpha", name) for name in self.balancing.alpha or ()]
        asked += [(f"balancing.stages.{n}.rewards", name) for n, stage in enumerate(self.balancing.stages)
                  for name in stage.rewards]  # fmt: skip
        if self.balancing.mode.startswith("single:"):
            asked.append(("balancing.mode", self.balancing.mode.removeprefix("single:")))
        asked += [(f"prompts.{n}.rewards", name) for n, source in enumerate(self.prompts)
                  for name in source.rewards or ()]  # fmt: skip
        for path, name in asked:
            _need(name in known, path, f"names no reward of this run ({', '.join(known)})", name)
        for n, stage in enumerate(self.balancing.stages):
            path, last = f"balancing.stages.{n}.sources", len(self.prompts) - 1
            _need(all(0 <= source <= last for source in stage.sources or ()), path,
                  f"must be numbers of sources in prompts, 0 to {last}", stage.sources)  # fmt: skip


def build(cls: type[T], given: Any, base: T | None = None) -> T:
    """An instance of a configuration class from plain dicts and lists, checked.

    Args:
        cls: Which class.
        given: As from YAML.
        base: What keys that are not given keep; None is the class's own defaults.

    Raises:
        ConfigError: An unknown key, a value of the wrong kind, or one that cannot be; with its path.
    """
    if not isinstance(given, Mapping):
        raise InputError(f"A configuration must be keys and values, but is {_kind(given)}.")
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Known ones: {', '.join(fields)}."
            raise ConfigError(str(key), f"unknown key.{hint}")
        values[key] = _converted(hints[key], value, key, None if base is None else getattr(base, key))
    missing = [name for name, item in fields.items() if _is_required(item) and name not in values and base is None]
    if missing:
        raise ConfigError(missing[0], "is missing and has no default.")
    if base is not None:
        return dataclasses.replace(base, **values)  # type: ignore[type-var]
    return cls(**values)


def to_plain(value: Any) -> Any:
    """Dataclasses and tuples as dicts and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def to_yaml(run: Run) -> str:
    """The run in full; :func:`from_yaml` gives it back."""
    import yaml

    text: str = yaml.safe_dump(to_plain(run), sort_keys=False, allow_unicode=True, width=120)
    return text


def from_yaml(text: str, source: str = "the configuration", base: Run | None = None) -> Run:
    """A run from YAML; keys that are left out keep those of ``base``, or their defaults.

    Raises:
        InputError: The text is no YAML; otherwise as :func:`build`.
    """
    return build(Run, parse_yaml(text, source), base)


def parse_yaml(text: str, source: str) -> Any:
    """Plain values from YAML.

    Raises:
        InputError: The text is no YAML.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{source}: this is no YAML: {' '.join(str(error).split())}") from None


def override(run: Run, assignments: Sequence[str]) -> Run:
    """The run with ``a.b=value`` set, one after the other; values are YAML, list elements are numbers.

    Raises:
        InputError: An assignment that is none; otherwise as :func:`build`.
    """
    plain = to_plain(run)
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals or not path.strip():
            raise InputError(f"--set {assignment}: must have the form key.key=value.")
        _assign(plain, path.strip(), parse_yaml(value, f"--set {path}"))
    return build(Run, plain)


def _assign(plain: Any, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    target = plain
    for depth, key in enumerate(parents):
        target = _child(target, key, ".".join(parents[: depth + 1]))
        if not isinstance(target, dict | list):
            raise ConfigError(path, f"{'.'.join(parents[: depth + 1])} holds no keys, but {_kind(target)}.")
    if isinstance(target, list):
        _child(target, last, path)
        target[int(last)] = value
    else:
        target[last] = value


def _child(target: Any, key: str, path: str) -> Any:
    if isinstance(target, list):
        if not key.isdigit() or int(key) >= len(target):
            raise ConfigError(path, f"must be a number from 0 to {len(target) - 1}, but is {key!r}.")
        return target[int(key)]
    if key not in target:
        close = difflib.get_close_matches(key, [str(name) for name in target], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else f" Known ones: {', '.join(map(str, target))}."
        raise ConfigError(path, f"unknown key.{hint}")
    return target[key]


def _is_required(item: "dataclasses.Field[Any]") -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _converted(hint: Any, value: Any, path: str, base: Any) -> Any:
    """A value as the type wants it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        [inner] = [argument for argument in arguments if argument is not type(None)]
        return _converted(inner, value, path, base)
    if origin is Literal:
        _need(isinstance(value, str) and value in arguments, path, f"must be one of {', '.join(arguments)}", value)
        return value
    if dataclasses.is_dataclass(hint):
        if dataclasses.is_dataclass(value):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(path, f"must hold keys and values, but is {_kind(value)}.")
        try:
            return build(typing.cast(type, hint), value, base)
        except ConfigError as error:
            raise error.under(path) from None
    if origin is tuple:
        _need(isinstance(value, list | tuple), path, "must be a list", value)
        return tuple(_converted(arguments[0], item, f"{path}.{n}", None) for n, item in enumerate(value))
    if origin is dict:
        is_mapping = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        _need(is_mapping, path, "must be a mapping", value)
        return {key: _converted(arguments[1], item, f"{path}.{key}", None) for key, item in value.items()}
    return _scalar(hint, value, path)


def _scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is Any:
        return value
    if hint is bool:
        _need(isinstance(value, bool), path, "must be true or false", value)
    elif hint is int:
        _need(isinstance(value, int) and not isinstance(value, bool), path, "must be a whole number", value)
    elif hint is float:
        number = _as_float(value)
        _need(number is not None and math.isfinite(number), path, "must be a finite number", value)
        return number
    elif hint is str:
        _need(isinstance(value, str), path, "must be a text", value)
    return value


def _as_float(value: Any) -> float | None:
    """Also of texts such as 1e-4, which YAML takes for a text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _known_mode(mode: str) -> None:
    if (mode in MODES and mode != "single") or (mode.startswith("single:") and len(mode) > len("single:")):
        return
    from mogb import registered

    known = [*(name for name in MODES if name != "single"), "single:<reward>", *registered()]
    if mode in ("single", "single:"):
        raise ConfigError("mode", "single needs the name of a reward: single:<reward>.")
    if mode not in registered():
        close = difflib.get_close_matches(mode, known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known ones: {', '.join(known)}."
        raise ConfigError("mode", f"there is no balancing mode {mode!r}. {hint}")


def _need(holds: bool, path: str, rule: str, value: Any) -> None:
    if not holds:
        raise ConfigError(path, f"{rule}, but got {value!r}.")


def _at_least(path: str, value: float | None, low: float) -> None:
    whole = "whole number" if isinstance(value, int) else "number"
    _need(value is None or (math.isfinite(value) and value >= low), path, f"must be a {whole} >= {low:g}", value)


def _positive(path: str, value: float) -> None:
    _need(math.isfinite(value) and value > 0, path, "must be a number > 0", value)


def _within(path: str, value: float | None, low: float, high: float) -> None:
    _need(value is None or low <= value <= high, path, f"must be in [{low:g}, {high:g}]", value)


def _kind(value: Any) -> str:
    names = {str: "a text", list: "a list", type(None): "empty", bool: "true or false", int: "a number"}
    return names.get(type(value), type(value).__name__)


def load_run(recipe_or_file: str, assignments: Sequence[str] = (), preset: str | None = None) -> Run:
    """A recipe by name or a YAML file, cut for some hardware, with overrides.

    A file may name a recipe to start from, with the key ``recipe``. The overrides come last.

    Raises:
        InputError: Neither exists, or there is no such preset; otherwise as :func:`build`.
    """
    from mogb_diffusion.recipes import RECIPES, presets, recipe

    fitted = presets.preset(preset) if preset is not None else lambda run: run
    if recipe_or_file in RECIPES:
        return override(fitted(recipe(recipe_or_file)), assignments)
    path = Path(recipe_or_file)
    if path.suffix not in (".yaml", ".yml"):
        close = difflib.get_close_matches(recipe_or_file, RECIPES, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Recipes: {', '.join(RECIPES)}."
        raise InputError(f"There is no recipe {recipe_or_file!r}, and a file must end in .yaml. {hint}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise InputError(f"{path}: the configuration cannot be read: {reason}.") from None
    given = parse_yaml(text, str(path))
    if not isinstance(given, Mapping):
        raise InputError(f"{path}: a configuration must be keys and values, but is {_kind(given)}.")
    given = dict(given)
    base = recipe(str(given.pop("recipe"))) if "recipe" in given else None
    try:
        return override(fitted(build(Run, given, base)), assignments)
    except ConfigError as error:
        raise InputError(f"{path}: {error}") from None
