r"""How K rewards become the direction of one optimizer step.

Every loss is linear in per-sample terms (:func:`mogb_diffusion.nft.nft_terms`), so the gradient of reward k is its
*slope*, the part that depends on its advantages, and a part that is common to all:

.. math::  g_k = h_k + C , \qquad d = \sum_k \beta_k g_k \ \text{(full)} , \qquad
           d = \sum_k \beta_k h_k + C \ \text{(slope)} ,

and the gradient of the distance to the reference is added after either. The coefficients β come from

=====================  ===============================================================  ===============================
mode                   coefficients                                                     backward passes of a step
=====================  ===============================================================  ===============================
``weighted_sum``       one objective: the rewards summed (DiffusionNFT)                 1
``gdpo``               one objective: normalized, summed, normalized                    1
``fixed``              given, or uniform                                                1
``single:<reward>``    one reward alone                                                 1
``sequential``         one stage of rewards after the other                             1
``reward_dropout``     uniform; general rewards are dropped on specialists' prompts     1
``marble``             MARBLE at every ``refresh_every``-th step, kept in between       1, or 2 at a refresh
``marble_every_step``  MARBLE at every step: the paper's Algorithm 1                    K, and 1 for what is common
``marble_exact``       the same through the per-sample engine                           2; 1 on policy
``marble_spread``      MARBLE from a share of the micro-steps, used one step later      1, or 2 on that share
``marble_script``      the authors' script, see :mod:`mogb_diffusion.script`            1, or K
a method of mogb       that method, through the per-sample engine                       2; 1 on policy
=====================  ===============================================================  ===============================

All sums run over the whole batch of a step: its micro-batches, times and ranks. Weights, masks and the scale of the
loss are constants of that batch, so that the cut into micro-batches and ranks changes nothing but rounding.

Shapes: K = objectives, B = pictures of a step, b = of a micro-batch, R = rows that are kept: K, and those in common.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float64
from torch import Tensor, nn

import mogb
from mogb.aggregators.mgda import MGDA
from mogb.base import Aggregator, Solution, Wrapper
from mogb.engines.differentiate import differentiate
from mogb.engines.distributed import Ranks as Sharing
from mogb.engines.distributed import SharedRows, is_sharded, local_part, sharded_like
from mogb.engines.per_sample import PerSample
from mogb.errors import NonFiniteError
from mogb.jacobian import Jacobian
from mogb.wrappers.normalized import Normalized
from mogb.wrappers.rescaled import Rescaled
from mogb.wrappers.silenced import Silenced
from mogb.wrappers.smoothed import Smoothed
from mogb_diffusion import config
from mogb_diffusion.config import ConfigError
from mogb_diffusion.distributed import Ranks
from mogb_diffusion.nft import nft_weights
from mogb_diffusion.seeds import keyed_generator
from mogb_diffusion.signals import Signal


@dataclass(frozen=True, eq=False)
class BalanceReport:
    """What a step did. Numbers by objective are ``[K]``.

    Attributes:
        names: Of the objectives.
        kind: ``weighted`` (coefficients known before), ``solved``, ``spread`` or ``script``.
        coefficients: β, on the raw gradients.
        shares: α, their parts on the simplex: proportional to β ‖g‖ where norms are known, to β otherwise.
        norms: Of the gradients that coefficients were solved on; None without a solve.
        cosines: Between the direction, the part in common included, and each of those gradients; None without.
        conflicts: Pairs of those gradients with a negative inner product; None without.
        left_out: Names of the rewards that took no part.
        scale: What the slopes were multiplied with for ``advantage_scale``; 1 otherwise.
        passes: Backward passes, in the mean over the micro-steps.
        note: Of the method, such as "Pareto stationary".
    """

    names: tuple[str, ...]
    kind: str
    coefficients: Float64[np.ndarray, " K"]
    shares: Float64[np.ndarray, " K"]
    norms: Float64[np.ndarray, " K"] | None = None
    cosines: Float64[np.ndarray, " K"] | None = None
    gramian: Float64[np.ndarray, "K K"] | None = None
    conflicts: int | None = None
    left_out: tuple[str, ...] = ()
    scale: float = 1.0
    passes: float = 1.0
    note: str = ""

    @property
    def min_cosine(self) -> float:
        """The worst cosine among the rewards that took part; NaN without a solve."""
        if self.cosines is None:
            return math.nan
        part = [c for name, c in zip(self.names, self.cosines.tolist(), strict=True) if name not in self.left_out]
        return min(part, default=0.0)


@dataclass(eq=False)
class LossScale:
    """The factor on the losses that keeps float16 gradients from vanishing, and its growth; 1 where it is off.

    Attributes:
        enabled: Only in float16.
        value: The factor, a power of two.
        good: Steps since it changed.
    """

    enabled: bool = False
    value: float = 1.0
    good: int = 0

    @classmethod
    def of(cls, dtype: torch.dtype) -> "LossScale":
        """For a model that computes in this dtype."""
        return cls(True, 2.0**12) if dtype == torch.float16 else cls()

    def update(self, finite: bool) -> None:
        """Halves it after a step that overflowed, doubles it after 500 that did not."""
        if not self.enabled:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.good >= 500:
            self.value, self.good = min(self.value * 2, 2.0**24), 0


class RewardBalancer:
    """Balances one optimizer step after the other.

    Args:
        run: The configuration.
        model: Whose parameters train: the transformer.
        parameters: Those.
        ranks: The processes.
        scale: Of the losses, in float16.

    Attributes:
        takes_rows: Whether the present micro-step goes through the per-sample engine.

    Raises:
        ConfigError: A method that cannot balance rewards.
    """

    def __init__(
        self,
        run: config.Run,
        model: nn.Module,
        parameters: Sequence[Tensor],
        *,
        ranks: Ranks | None = None,
        scale: LossScale | None = None,
    ) -> None:
        self.run = run
        self.choice = run.balancing
        self.parameters = tuple(parameters)
        self.ranks = ranks or Ranks()
        self.scale = scale or LossScale()
        self.is_spread = any(is_sharded(param) for param in self.parameters)  # over the ranks, by fully_shard
        # Needs whole weights; where they are spread, every reward has a backward pass of its own.
        self.engine: Any = None if self.is_spread else PerSample(model, self.parameters, self_check="off")
        self.takes_rows = False
        self._checked_sizes: set[int] = set()
        self.step = 0
        self._shrink = _Shrunk(MGDA())
        self.aggregator = self._make_aggregator()
        self._coefficients: Float64[np.ndarray, " K"] | None = None  # of the last solve, for the steps after it
        self._simplex: Float64[np.ndarray, " K"] | None = None
        self._norms: Float64[np.ndarray, " K"] | None = None  # the last ones that were not zero; NaN before that

    def start(self, signal: Signal, samples: Sequence[int], micro_steps: int, times: int, epoch: int) -> "Update":
        """Begins an optimizer step.

        Args:
            signal: Of the epoch.
            samples: Of this step, on all ranks.
            micro_steps: How many this rank will do.
            times: How many times of each picture.
            epoch: Its number.
        """
        weights = nft_weights(
            signal.optimality[:, list(samples)],
            beta=self.run.loss.beta,
            scale=self.run.loss.max_advantage,
            mask=signal.applies[:, list(samples)],
        ).cpu().numpy() / times  # fmt: skip
        known = self._known_coefficients(signal, epoch)
        mode = self.choice.mode
        if mode == "marble_script" and not self._in_final_stage(epoch):
            from mogb_diffusion.script import ScriptUpdate

            return ScriptUpdate(self, signal, samples, micro_steps)
        batch = _Batch(signal, tuple(samples), weights, times)
        if known is not None:
            return WeightedUpdate(self, batch, known)
        if mode == "marble_spread" and self._coefficients is not None:
            return SpreadUpdate(self, batch, self._between(), micro_steps)
        return SolvedUpdate(self, batch, plain=self.is_spread or mode == "marble_every_step")

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        state: dict[str, Any] = {"step": self.step, "scale": self.scale.value, "good": self.scale.good}
        for name in ("coefficients", "simplex", "norms"):
            if (value := getattr(self, f"_{name}")) is not None:
                state[name] = torch.from_numpy(value.copy())
        if self.aggregator is not None:
            state |= {f"aggregator.{key}": value for key, value in self.aggregator.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self.step, self.scale.value, self.scale.good = int(state["step"]), float(state["scale"]), int(state["good"])
        for name in ("coefficients", "simplex", "norms"):
            value = state.get(name)
            setattr(self, f"_{name}", None if value is None else torch.as_tensor(value).double().numpy().copy())
        if self.aggregator is not None:
            prefix = "aggregator."
            self.aggregator.load_state_dict(
                {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            )

    def check_split(self, outputs: Tensor, seeds: Float64[np.ndarray, "R b J"]) -> None:
        """Compares the per-sample engine with an ordinary backward pass, once for every size of a micro-batch.

        Apart from the gradients that are used, so that these have the same bits in a run that was resumed.
        """
        if len(outputs) in self._checked_sizes:
            return
        self._checked_sizes.add(len(outputs))
        self.engine.self_check = "first"
        try:
            self.engine.gradients(outputs, seeds, store="dense", retain_graph=True)
        finally:
            self.engine.self_check = "off"

    def end_epoch(self) -> None:
        """For methods that compare epochs."""
        if self.aggregator is not None:
            self.aggregator.end_epoch()

    def solve(
        self, gramian: Float64[np.ndarray, "K K"], silent: np.ndarray, losses: Float64[np.ndarray, " K"]
    ) -> Solution:
        """Solves for the coefficients, remembers what later steps need, and leaves silent rewards out."""
        assert self.aggregator is not None
        heard = gramian.copy()
        heard[silent] = 0.0
        heard[:, silent] = 0.0
        if not np.isfinite(heard).all():
            raise NonFiniteError("gradient", int(np.argmin(np.isfinite(heard.diagonal()))))
        solution = self.aggregator.solve(torch.from_numpy(heard), torch.from_numpy(losses))
        norms = np.sqrt(heard.diagonal())
        before = np.full(len(norms), np.nan) if self._norms is None else self._norms
        self._norms = np.where(norms > 0, norms, before)
        self._coefficients = solution.weights.copy()
        shares = solution.weights * (norms if self.choice.normalize else 1.0)  # on the simplex that was solved on
        total = shares.sum()
        self._simplex = shares / total if total > 0 else np.full(len(norms), 1 / len(norms))
        if solution.left_out:
            self._remember_silent(solution)
        return solution

    def _remember_silent(self, solution: Solution) -> None:
        """A reward that was silent at a refresh keeps its average, so that it is heard in the steps after it."""
        assert self._coefficients is not None
        assert self._norms is not None
        assert self._simplex is not None
        assert self.aggregator is not None
        size = len(self._norms)
        averages = [value for key, value in self.aggregator.state_dict().items() if key.endswith("average")]
        alpha = self._simplex.copy()
        out = list(solution.left_out)
        alpha[out] = np.nan if not averages else torch.as_tensor(averages[0]).numpy()[out]
        alpha = np.where(np.isnan(alpha), 1 / size, alpha)
        if alpha.min() < 0 or alpha.sum() <= 0:  # weights of another kind have no shares to keep
            return
        self._simplex = alpha / alpha.sum()
        known = np.where(np.isnan(self._norms), np.nanmean(self._norms) if np.isfinite(self._norms).any() else 1.0,
                         self._norms)  # fmt: skip
        known = known if self.choice.normalize else np.ones(size)
        live = [k for k in range(size) if k not in solution.left_out]
        length, heard = float(np.sum(solution.weights[live] * known[live])), float(self._simplex[live].sum())
        if length > 0 and heard > 0:
            self._coefficients[out] = length / heard * self._simplex[out] / known[out]

    def _between(self) -> Float64[np.ndarray, " K"]:
        """The coefficients of a step that does not solve."""
        assert self._coefficients is not None
        assert self._simplex is not None
        return self._simplex if self.choice.coefficients == "raw" else self._coefficients

    def _in_final_stage(self, epoch: int) -> bool:
        return epoch >= self.run.epochs - round(self.choice.final_uniform * self.run.epochs)

    def _known_coefficients(self, signal: Signal, epoch: int) -> Float64[np.ndarray, " K"] | None:
        """The coefficients, where no gradient is needed for them."""
        mode, names = self.choice.mode, signal.names
        uniform = np.full(len(names), 1 / len(names))
        if mode in config.SUM_MODES:
            return np.ones(1)
        if mode == "fixed" and self.choice.alpha is not None:
            given = np.array([self.choice.alpha.get(name, 0.0) for name in names])
            return given / given.sum()
        if mode in ("fixed", "reward_dropout") or self._in_final_stage(epoch):
            return uniform
        if mode.startswith("single:"):
            return np.array([float(name == mode.removeprefix("single:")) for name in names])
        if mode == "sequential":
            members = self.choice.stage(epoch, self.run.epochs).rewards
            return np.array([float(name in members) / len(members) for name in names])
        every = self.choice.interval
        if every > 1 and self._coefficients is not None and self.step % every:
            return self._between()
        return None

    def _make_aggregator(self) -> Aggregator | None:
        choice = self.choice
        if choice.mode in config.MARBLE_MODES and choice.mode != "marble_script":
            made: Aggregator = Smoothed(self._shrink, decay=choice.averaging)
            if choice.normalize:
                made = Rescaled(Normalized(made), length="times_mean_norm")
            made = Silenced(made, choice.silent)
            if choice.cold_start == "uniform":
                made.solve(torch.eye(len(self.run.rewards), dtype=torch.float64))
            return made
        if choice.method is None:
            return None
        try:
            method = mogb.make(choice.method, **choice.options)
        except (ValueError, TypeError) as error:
            raise ConfigError("balancing.options", " ".join(str(error).split())) from None
        if method.reads == "losses":
            raise ConfigError(
                "balancing.mode",
                f"{choice.method!r} reads only the values of the losses, which do not tell rewards apart on policy. "
                "Use mode: fixed, or a method that reads the Gramian.",
            )
        if method.phases - {"end_epoch"}:
            raise ConfigError(
                "balancing.mode", f"{choice.method!r} needs a training loop of its own ({', '.join(method.phases)})."
            )
        if not method.yields_weights and choice.interval > 1:
            raise ConfigError("balancing.refresh_every", f"must be 1: {choice.method!r} yields no weights to reuse.")
        if not method.yields_weights and self.run.model.shard:
            raise ConfigError(
                "balancing.mode", f"{choice.method!r} reads whole gradients, which no rank has with model.shard."
            )
        return Silenced(method, choice.silent) if method.yields_weights else method


@dataclass(frozen=True)
class _Shrunk(Wrapper):
    """Pulls simplex weights towards uniform by an amount that is set before every solve."""

    inner: Aggregator
    amount: list[float] = field(default_factory=lambda: [0.0])

    @property
    def promises(self) -> Any:  # type: ignore[override]
        return self.inner.keeps - {mogb.base.Promise.NON_CONFLICTING}

    def _solve_live(self, gramian: Any, losses: Any, live: Any) -> Solution:
        solution = self.inner._solve_live(gramian, losses, live)
        amount = self.amount[0]
        part = np.array([k not in solution.left_out for k in range(len(live))])
        if amount == 0 or not part.any() or solution.weights.sum() <= 0:
            return solution
        uniform = part / part.sum()
        weights = (1 - amount) * solution.weights + amount * uniform
        return Solution(weights, solution.residual, solution.converged, solution.left_out, solution.note)


@dataclass(frozen=True, eq=False)
class _Batch:
    """What all micro-steps of an optimizer step share.

    Attributes:
        signal: Of the epoch.
        samples: Of the step, on all ranks.
        weights: W of ``l_k = sum_ij W_kij term_ij``, ``[K, B, 2]``, divided by the number of times.
        times: How many times of each picture.
    """

    signal: Signal
    samples: tuple[int, ...]
    weights: Float64[np.ndarray, "K B 2"]
    times: int

    @property
    def silent(self) -> np.ndarray:
        """Which rewards say nothing about any picture of the step, ``[K]``."""
        return ~(self.weights[:, :, 0] != 0).any(axis=1)

    def columns(self, samples: Sequence[int]) -> list[int]:
        """Where samples of the epoch are in the step."""
        where = {sample: column for column, sample in enumerate(self.samples)}
        return [where[sample] for sample in samples]

    def spread(self, coefficients: Float64[np.ndarray, " K"]) -> float:
        """The standard deviation of the combined advantage: the mixture of optimalities on the scale of advantages."""
        slopes = coefficients @ self.weights[:, :, 0]
        unit = self.weights[0, 0, 1] * self.times * len(self.samples)  # max_advantage / beta
        per_sample = slopes * len(self.samples) * self.times / unit  # sum of (2 r - 1)
        return float(per_sample.std())


class Update:
    """One optimizer step in the making: micro-steps add up, :meth:`finish` leaves the direction in ``.grad``."""

    def __init__(self, balancer: RewardBalancer) -> None:
        self.balancer = balancer
        self.micro_steps = 0
        self.passes = 0

    @contextmanager
    def micro_step(self) -> Iterator[None]:
        """Within the block belong the forward pass of the current policy and :meth:`add`."""
        if self.keeps_rows:
            self.balancer.takes_rows = True
            try:
                with self.balancer.engine:
                    yield
            finally:
                self.balancer.takes_rows = False
        else:
            yield
        self.micro_steps += 1

    @property
    def keeps_rows(self) -> bool:
        """Whether the next micro-step goes through the per-sample engine."""
        return False

    def add(
        self, terms: Float64[Tensor, "b 2"], distance: Float64[Tensor, " b"] | None, samples: Sequence[int]
    ) -> None:
        """Adds a micro-batch at one time.

        Args:
            terms: (u, s) of :func:`mogb_diffusion.nft.nft_terms`.
            distance: To the reference, of each picture; None without.
            samples: Their numbers in the epoch.
        """
        raise NotImplementedError

    def finish(self) -> BalanceReport:
        """Puts the direction into every ``.grad``.

        Raises:
            NonFiniteError: NaN or Inf in a gradient. Every ``.grad`` is None.
        """
        raise NotImplementedError

    def _distance_weight(self, batch: _Batch) -> float:
        return self.balancer.run.loss.kl_weight / (len(batch.samples) * batch.times)

    def _target_scale(self, batch: _Batch, coefficients: Float64[np.ndarray, " K"]) -> float:
        """What slopes are multiplied with, so that the combined advantage has the wanted deviation."""
        wanted = self.balancer.choice.advantage_scale
        spread = 0.0 if wanted is None else batch.spread(coefficients) * self.balancer.run.loss.max_advantage
        return 1.0 if wanted is None or spread < 1e-12 else wanted / spread

    def _reduce_grads(self) -> None:
        """Adds up over the ranks what ordinary backward passes left in ``.grad``."""
        balancer = self.balancer
        for param in balancer.parameters:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        grads = [local_part(param.grad) for param in balancer.parameters if param.grad is not None]
        self._sum_up(grads)
        finite = all(bool(torch.isfinite(grad).all()) for grad in grads)
        if balancer.ranks.any(not finite) if balancer.is_spread else not finite:
            self.drop()
            raise NonFiniteError("direction", None)

    @torch.no_grad()
    def _sum_up(self, tensors: Sequence[Tensor]) -> None:
        """Sums gradients over the ranks, in place, and takes the scale of the losses off them."""
        balancer = self.balancer
        factor = 1 / balancer.scale.value
        if balancer.is_spread:
            factor *= balancer.ranks.size  # fully_shard has averaged them
        else:
            sum_over_ranks(tensors, balancer.ranks)
        if factor != 1.0:
            for tensor in tensors:
                tensor.mul_(factor)

    def drop(self) -> None:
        """Forgets the step."""
        for param in self.balancer.parameters:
            param.grad = None


class WeightedUpdate(Update):
    """Coefficients are known: one backward pass of the weighted losses."""

    def __init__(self, balancer: RewardBalancer, batch: _Batch, coefficients: Float64[np.ndarray, " K"]) -> None:
        super().__init__(balancer)
        self.batch, self.coefficients = batch, coefficients
        self.stretch = self._target_scale(batch, coefficients)
        between_solves = balancer.choice.method is not None or balancer.choice.mode in config.MARBLE_MODES
        is_full = between_solves and balancer.choice.solved_on == "full"
        self.common = float(coefficients.sum()) if is_full else 1.0

    def add(
        self, terms: Float64[Tensor, "b 2"], distance: Float64[Tensor, " b"] | None, samples: Sequence[int]
    ) -> None:
        weights = self.batch.weights[:, self.batch.columns(samples)]
        seeds = np.stack(
            [self.stretch * (self.coefficients @ weights[:, :, 0]), self.common * weights[0, :, 1]], axis=1
        )
        loss = (terms * torch.from_numpy(seeds).to(terms)).sum()
        if distance is not None:
            loss = loss + self._distance_weight(self.batch) * distance.sum()
        (loss * self.balancer.scale.value).backward()
        self.passes += 1

    def finish(self) -> BalanceReport:
        self._reduce_grads()
        self.balancer.step += 1
        norms = self.balancer._norms
        weights = self.coefficients if norms is None else self.coefficients * np.where(np.isnan(norms), 0.0, norms)
        raw = self.balancer.choice.coefficients == "raw"
        total = weights.sum()
        return BalanceReport(
            names=self.batch.signal.names,
            kind="weighted",
            coefficients=self.coefficients,
            shares=self.coefficients if raw or norms is None or total <= 0 else weights / total,
            left_out=_named(self.batch.signal.names, self.batch.silent),
            scale=self.stretch,
            passes=self.passes / max(1, self.micro_steps),
        )


class SolvedUpdate(Update):
    """All K gradients, then coefficients, then the direction.

    Args:
        balancer: Where the method and its state are.
        batch: Of the step.
        plain: K ordinary backward passes instead of the per-sample engine.
    """

    kind = "solved"

    def __init__(self, balancer: RewardBalancer, batch: _Batch, *, plain: bool = False) -> None:
        super().__init__(balancer)
        self.batch, self.plain = batch, plain
        self.rows: Jacobian | None = None
        self.is_full = balancer.choice.solved_on == "full"
        self.size = len(batch.signal.names)
        self.losses = np.zeros(self.size)
        self.squares = np.zeros(self.size)  # sums over micro-steps of squared norms, for shrinkage

    @property
    def keeps_rows(self) -> bool:
        return not self.plain

    @property
    def extra(self) -> tuple[str, ...]:
        """The rows after the K ones: what is common to all rewards."""
        has_distance = self.balancer.run.loss.kl_weight > 0
        if not self.is_full:
            return ("common",)  # with the distance in it
        rescaled = self.balancer.choice.advantage_scale is not None
        return ("common",) * rescaled + ("distance",) * has_distance

    def add(
        self, terms: Float64[Tensor, "b 2"], distance: Float64[Tensor, " b"] | None, samples: Sequence[int]
    ) -> None:
        weights = self.batch.weights[:, self.batch.columns(samples)]
        self.losses += np.einsum("kbj,bj->k", weights, terms.detach().cpu().numpy())
        outputs, seeds = self._seeds(terms, distance, weights)
        seeds = seeds * self.balancer.scale.value
        choice = self.balancer.choice
        target = None if choice.shrinkage else self.rows
        if self.plain:
            added = plain_rows(outputs, seeds, self.balancer.parameters, target)
            self.passes += len(seeds)
        else:
            self.balancer.check_split(outputs, seeds)
            added = self.balancer.engine.gradients(outputs, seeds, store="dense", add_to=target)
            report = self.balancer.engine.report
            self.passes += 0 if report is None else report.passes
        if choice.shrinkage:
            self.squares += added.gramian().diagonal()[: self.size]
            added = added if self.rows is None else self.rows + added
        self.rows = added

    def _seeds(
        self, terms: Tensor, distance: Tensor | None, weights: Float64[np.ndarray, "K b 2"]
    ) -> tuple[Tensor, Float64[np.ndarray, "R b J"]]:
        """The terms, and their weights in every row that is kept."""
        slopes, shared = weights[:, :, 0], weights[0, :, 1]
        per_sample = self._distance_weight(self.batch)
        if not self.is_full:
            common = terms[:, 1] * torch.from_numpy(shared).to(terms)
            if distance is not None:
                common = common + per_sample * distance
            seeds = np.zeros((self.size + 1, len(shared), 2))
            seeds[: self.size, :, 0] = slopes
            seeds[self.size, :, 1] = 1.0
            return torch.stack([terms[:, 0], common], dim=1), seeds
        columns = [terms[:, 0], terms[:, 1]] + ([] if distance is None else [distance])
        seeds = np.zeros((self.size + len(self.extra), len(shared), len(columns)))
        seeds[: self.size, :, 0] = slopes
        seeds[: self.size, :, 1] = shared
        for row, name in enumerate(self.extra, start=self.size):
            seeds[row, :, 1 if name == "common" else 2] = shared if name == "common" else per_sample
        return torch.stack(columns, dim=1), seeds

    def finish(self) -> BalanceReport:
        rows = self._reduced_rows()
        gramian = rows.gramian()
        self._shrink(gramian)
        balancer = self.balancer
        if balancer.aggregator is not None and not balancer.aggregator.yields_weights:
            return self._finish_direction(rows, gramian)
        solution = balancer.solve(gramian[: self.size, : self.size], self.batch.silent, self._all_losses())
        return self._apply(rows, gramian, solution.weights, solution)

    def _apply(
        self,
        rows: Jacobian,
        gramian: Float64[np.ndarray, "R R"],
        weights: Float64[np.ndarray, " K"],
        solution: Solution,
    ) -> BalanceReport:
        stretch = self._target_scale(self.batch, weights)
        mixing = np.concatenate([stretch * weights, self._extra_weights(weights, stretch)])
        self._put(rows.combine(mixing))
        self.balancer.step += 1
        names = self.batch.signal.names
        inner = gramian[: self.size, : self.size]
        norms = np.sqrt(inner.diagonal())
        length = math.sqrt(max(float(mixing @ gramian @ mixing), 0.0))
        scale = norms * length
        cosines = np.divide((gramian @ mixing)[: self.size], scale, out=np.zeros(self.size), where=scale > 0)
        shares = weights * norms
        out = np.zeros(self.size, dtype=bool)
        out[list(solution.left_out)] = True
        heard = ~out
        negative = inner < -1e-12 * np.outer(norms, norms)
        return BalanceReport(
            names=names, kind=self.kind, coefficients=weights,
            shares=shares / shares.sum() if shares.sum() > 0 else shares, norms=norms, cosines=cosines,
            gramian=inner, conflicts=int(np.triu(negative & np.outer(heard, heard), 1).sum()),
            left_out=_named(names, out), scale=stretch, passes=self.passes / max(1, self.micro_steps),
            note=solution.note,
        )  # fmt: skip

    def _extra_weights(self, weights: Float64[np.ndarray, " K"], stretch: float) -> list[float]:
        if not self.is_full:
            return [1.0]
        return [float((1 - stretch) * weights.sum()) if name == "common" else 1.0 for name in self.extra]

    def _finish_direction(self, rows: Jacobian, gramian: Float64[np.ndarray, "R R"]) -> BalanceReport:
        """For methods that read the whole Jacobian and yield no weights."""
        assert self.balancer.aggregator is not None
        live = np.flatnonzero(~self.batch.silent & (gramian.diagonal()[: self.size] > 0))
        direction = rows.combine(np.zeros(len(gramian)))
        if len(live):
            heard = Jacobian(tuple(block[live] for block in rows.blocks))
            direction = self.balancer.aggregator.direct(heard, self._all_losses()[live])[0]
        rest = np.concatenate([np.zeros(self.size), self._extra_weights(np.ones(self.size), 1.0)])
        common = rows.combine(rest)
        both = tuple(a + b for a, b in zip(direction, common, strict=True))
        lengths = math.sqrt(sum(float(part.double().square().sum()) for part in both))
        norms = np.sqrt(gramian.diagonal()[: self.size])
        products = rows.products(both)[: self.size]
        self._put(both)
        self.balancer.step += 1
        scale = norms * lengths
        return BalanceReport(
            names=self.batch.signal.names, kind=self.kind, coefficients=np.full(self.size, np.nan),
            shares=np.full(self.size, np.nan), norms=norms,
            cosines=np.divide(products, scale, out=np.zeros(self.size), where=scale > 0),
            gramian=gramian[: self.size, : self.size],
            left_out=_named(self.batch.signal.names, ~np.isin(np.arange(self.size), live)),
            passes=self.passes / max(1, self.micro_steps),
        )  # fmt: skip

    def _reduced_rows(self) -> Jacobian:
        assert self.rows is not None
        blocks = list(self.rows.blocks)
        self._sum_up(blocks)
        across = SharedRows(Sharing(dist.group.WORLD), self.balancer.parameters) if self.balancer.is_spread else None
        rows = Jacobian(tuple(blocks), across)
        if not np.isfinite(rows.gramian()).all():
            self.drop()
            raise NonFiniteError("gradient", None)
        return rows

    def _all_losses(self) -> Float64[np.ndarray, " K"]:
        return self.balancer.ranks.sum(torch.from_numpy(self.losses.copy())).numpy()

    def _shrink(self, gramian: Float64[np.ndarray, "R R"]) -> None:
        """Sets how far weights are pulled towards uniform: by the share of the gradients that is noise.

        With independent micro-steps of mean m and variance v, E|sum|^2 = M^2 m^2 + M v and E sum|.|^2 = M (m^2 + v).
        """
        if not self.balancer.choice.shrinkage:
            return
        ranks = self.balancer.ranks
        squares = ranks.sum(torch.from_numpy(self.squares.copy())).numpy() / self.balancer.scale.value**2
        steps = float(ranks.sum(torch.tensor(float(self.micro_steps))))
        total = gramian.diagonal()[: self.size]
        live = (total > 0) & ~self.batch.silent
        if steps < 2 or not live.any():
            self.balancer._shrink.amount[0] = 0.0
            return
        share = steps / (steps - 1) * (1 - squares[live] / total[live])
        self.balancer._shrink.amount[0] = 1 - float(np.clip(share, 0, 1).mean())

    def _put(self, direction: Sequence[Tensor]) -> None:
        for param, part in zip(self.balancer.parameters, direction, strict=True):
            added = sharded_like(param, part) if is_sharded(param) else part.to(param.dtype)
            param.grad = added if param.grad is None else param.grad + added


class SpreadUpdate(SolvedUpdate):
    """The coefficients of the step before; new ones from a share of the micro-steps."""

    kind = "spread"

    def __init__(
        self, balancer: RewardBalancer, batch: _Batch, coefficients: Float64[np.ndarray, " K"], micro_steps: int
    ) -> None:
        super().__init__(balancer, batch)
        self.weighted = WeightedUpdate(balancer, batch, coefficients)
        generator = keyed_generator(balancer.run.seed, "spread", balancer.step, balancer.ranks.rank)
        count = max(1, math.ceil(balancer.choice.fraction * micro_steps))
        self.chosen = frozenset(torch.randperm(micro_steps, generator=generator)[:count].tolist())

    @property
    def keeps_rows(self) -> bool:
        return self.micro_steps in self.chosen

    def add(
        self, terms: Float64[Tensor, "b 2"], distance: Float64[Tensor, " b"] | None, samples: Sequence[int]
    ) -> None:
        if self.keeps_rows:
            super().add(terms, distance, samples)
        else:
            self.weighted.add(terms, distance, samples)
            self.passes += 1

    def finish(self) -> BalanceReport:
        self._reduce_grads()
        rows = self._reduced_rows()
        gramian = rows.gramian()
        used = self.weighted.coefficients
        balancer = self.balancer
        try:
            solution = balancer.solve(gramian[: self.size, : self.size], self.batch.silent, self._all_losses())
        except NonFiniteError:
            self.drop()
            raise
        return self._apply(rows, gramian, used, solution)


def plain_rows(
    outputs: Tensor,
    seeds: Float64[np.ndarray, "R b J"],
    parameters: Sequence[Tensor],
    rows: Jacobian | None,
    *,
    retain_graph: bool = False,
) -> Jacobian:
    """The gradients of ``sum_ij seeds[r, i, j] * outputs[i, j]``, added to rows; one ordinary backward pass each."""
    if rows is None:
        kept = [local_part(param.detach()) for param in parameters]
        wide = [torch.promote_types(part.dtype, torch.float32) for part in kept]
        rows = Jacobian(
            tuple(
                part.new_zeros((len(seeds), *part.shape), dtype=dtype) for part, dtype in zip(kept, wide, strict=True)
            )
        )
    for k, seed in enumerate(seeds):
        keep = retain_graph or k < len(seeds) - 1
        cotangent = torch.from_numpy(seed).to(outputs)
        grads = differentiate(outputs, cotangent, parameters, retain_graph=keep)
        for block, grad in zip(rows.blocks, grads, strict=True):
            if grad is not None:
                block[k] += local_part(grad)
    return rows


def sum_over_ranks(tensors: Sequence[Tensor], ranks: Ranks) -> None:
    """Adds up tensors over the ranks, in place, in pieces of at most 2^24 numbers."""
    if ranks.size == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    for piece in flat.split(1 << 24):
        piece.copy_(ranks.sum(piece))
    offset = 0
    for tensor in tensors:
        tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
        offset += tensor.numel()


def _named(names: Sequence[str], flags: np.ndarray) -> tuple[str, ...]:
    return tuple(name for name, flag in zip(names, flags.tolist(), strict=True) if flag)
