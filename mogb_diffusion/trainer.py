"""The loop: rollouts by the old policy, rewards, advantages, balanced steps, and the old policy follows.

:meth:`Trainer.train` reads as its phases. Nothing random is kept between epochs (see :mod:`mogb_diffusion.seeds`), so
that a run that is resumed goes on bit for bit.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from mogb.errors import NonFiniteError
from mogb_diffusion import checkpoint, readiness, sharding
from mogb_diffusion.balancing import BalanceReport, LossScale, RewardBalancer
from mogb_diffusion.clock import Clock
from mogb_diffusion.config import ConfigError, Run, from_yaml, to_plain, to_yaml
from mogb_diffusion.datasets import evaluation_prompts, load_mixture
from mogb_diffusion.distributed import Ranks
from mogb_diffusion.errors import InputError, RewardFailure
from mogb_diffusion.evaluation import Score, draw_pictures, evaluate, evaluation_sampling
from mogb_diffusion.models.sd3 import DTYPES, SD3Model, find_device, load_model
from mogb_diffusion.nft import nft_terms
from mogb_diffusion.policy import make_policy
from mogb_diffusion.policy_schedule import ParameterEMA, old_policy_decay
from mogb_diffusion.rollouts import Epoch, describe_batch, draw, noised, plan_epoch
from mogb_diffusion.scoring import make_scorer
from mogb_diffusion.signals import Signal, SignalMaker
from mogb_diffusion.tracking import Tracker, check_packages

CONFIG = "config.yaml"
_FREE = ("checkpoints", "tracking", "scoring", "name")  # keys that may change when a run goes on


class Trainer:
    """One run on this process.

    Args:
        run: The configuration.
        out: Folder of the run; None writes nothing.
        ranks: The processes.
        model: A model that is there already; None loads that of the configuration.
        tell: Where messages go; None prints nothing.

    Attributes:
        epoch: The next one.
        step: Optimizer steps so far.
        clock: Where the time went.
    """

    def __init__(
        self,
        run: Run,
        out: Path | None = None,
        *,
        ranks: Ranks | None = None,
        model: SD3Model | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.run, self.out, self.ranks = run, out, ranks or Ranks()
        self.tell = tell if tell is not None and self.ranks.first else lambda message: None
        self._check_ranks()
        with self.ranks.together():
            self.mixture = load_mixture(run)
            self.held_out = evaluation_prompts(run)
        self._check_passes()
        with self.ranks.together():
            self.model = model or load_model(run.model, find_device(run.model.device, self.ranks.local))
            device = self.model.device
            self.scorer = make_scorer(run.rewards, run.scoring, device)
            self.examiner = make_scorer((*run.rewards, *run.evaluation.rewards), run.scoring, device)
        spread_over = self.ranks if run.model.shard else None
        with self._locally():
            self.policy = make_policy(self.model.transformer, run.policy, run.seed, spread_over)
        self.signals = SignalMaker(run, sorted(self.scorer.special))
        scale = LossScale.of(DTYPES[run.model.dtype])
        parameters = self.policy.parameters
        self.balancer = RewardBalancer(run, self.model.transformer, parameters, ranks=self.ranks, scale=scale)
        self.optimizer = torch.optim.AdamW(
            parameters, lr=run.optimizer.lr, betas=(run.optimizer.betas[0], run.optimizer.betas[1]),
            eps=run.optimizer.eps, weight_decay=run.optimizer.weight_decay,
        )  # fmt: skip
        self.ema = ParameterEMA(parameters, run.policy.ema) if run.policy.ema else None
        if run.model.gradient_checkpointing:
            self._checkpoint_gradients()
        self.epoch = self.step = 0
        self.on_policy = True  # the old policy has the weights of the current one
        self.clock = Clock(device)
        self.tracker: Tracker | None = None
        self._began = time.monotonic()
        self._first_epoch = 0
        self._resumed = False

    def train(self, *, resume: bool = False) -> None:
        """Runs all epochs that are left.

        Raises:
            InputError: The folder holds another run, or one to be resumed.
            RewardFailure: A reward failed too often; a checkpoint was saved.
            CheckpointError: The disk is full.
        """
        try:
            self._open(resume)
            self.tell(describe_batch(self.run, self.ranks.size))
            if self.run.model.text_encoders == "precompute":
                self._precompute()
            if not self._resumed:
                self.examine("before")
            for epoch in range(self.epoch, self.run.epochs):
                self.train_epoch(epoch)
            if not self.run.epochs:
                self.save()
        finally:
            self.close()

    def train_epoch(self, epoch: int) -> None:
        """One round of rollouts and updates."""
        plan = plan_epoch(self.run, self.mixture, epoch)
        clean = self.roll_out(plan)
        rewards = self.collect_rewards(plan)
        signal = self.signals(rewards, plan.rows, epoch)
        reports = [self.update(plan, clean, signal, samples) for samples in self.updates(plan)]
        decay = self.follow()
        self.epoch = epoch + 1
        self.log_epoch(plan, rewards, signal, reports, decay)
        self.examine_on_schedule()
        self.save_on_schedule()

    @torch.no_grad()
    def roll_out(self, plan: Epoch) -> Tensor:
        """Pictures by the old policy, handed to the rewards as they come; their clean latents ``[B, C, H, W]``."""
        mine = list(self.ranks.mine(len(plan)))
        size = self.run.batch.sampling_batch or self.run.batch.micro_batch
        pieces = []
        with self._locally():
            self.model.prepare([self.mixture.rows[row].text for row in dict.fromkeys(plan.rows)])
            for start in range(0, len(mine), size):
                samples = mine[start : start + size]
                prompts = [self.mixture.rows[plan.rows[i]] for i in samples]
                with self.clock("sampling"), nullcontext() if self.on_policy else self.policy.old():
                    noise = plan.noise(samples, self.model.latent_shape, self.model.dtype)
                    pieces.append(draw(self.model, prompts, noise, self.run.sampling))
                    images = self.model.decode(pieces[-1])
                self.scorer.submit(images, prompts)
        empty = torch.zeros(0, *self.model.latent_shape, dtype=self.model.dtype, device=self.model.device)
        return self.ranks.gather(torch.cat(pieces) if pieces else empty, len(plan))

    def collect_rewards(self, plan: Epoch) -> Float64[Tensor, "K B"]:
        """The rewards of all pictures of the epoch, on every rank.

        Raises:
            RewardFailure: One failed too often in a row.
        """
        with self.clock("rewards"), self.ranks.together():
            mine = self.scorer.collect()
        for message in self.scorer.messages:
            self.tell(message)
        if self.ranks.any(bool(self.scorer.broken)):
            self.save()
            reason = self.scorer.broken or "A reward failed on another rank."
            raise RewardFailure(f"{reason} The run stopped with a checkpoint at epoch {self.epoch}: add --resume.")
        return self.ranks.gather(mine.mT.contiguous(), len(plan)).mT.contiguous()

    def updates(self, plan: Epoch) -> list[list[int]]:
        """The samples of every optimizer step of the epoch."""
        return plan.updates(self.run.batch.updates_per_epoch)

    def update(self, plan: Epoch, clean: Tensor, signal: Signal, samples: list[int]) -> BalanceReport | None:
        """One optimizer step on some pictures; None if it was skipped because a gradient was not finite."""
        self.optimizer.zero_grad(set_to_none=True)
        try:
            report = self.differentiate(plan, clean, signal, samples)
        except NonFiniteError as error:
            self.optimizer.zero_grad(set_to_none=True)
            self.balancer.scale.update(False)
            self.tell(f"step {self.step} is skipped: {error}")
            self._log_step(None, math.nan, plan.number)
            return None
        self.balancer.scale.update(True)
        with self.clock("optimizer"):
            norm = self._clip()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.ema is not None:
                self.ema.update()
        self.step += 1
        self.on_policy = False
        self._log_step(report, norm, plan.number)
        return report

    def differentiate(self, plan: Epoch, clean: Tensor, signal: Signal, samples: list[int]) -> BalanceReport:
        """Forward and backward passes of one optimizer step, micro-batch by micro-batch; the direction in ``.grad``.

        Raises:
            NonFiniteError: On any rank; on all of them.
        """
        run, mine = self.run, list(self.ranks.share(samples))
        size, columns = run.batch.micro_batch, run.trained_timesteps
        batches = [mine[start : start + size] for start in range(0, len(mine), size)]
        update = self.balancer.start(signal, samples, len(batches) * columns, columns, plan.number)
        failure: NonFiniteError | None = None
        with self._locally():
            try:
                for batch in batches:
                    times = plan.times(batch, self.model.sigmas(run.sampling.steps)[:-1], columns)
                    text = self.model.encode([self.mixture.rows[plan.rows[i]].text for i in batch])
                    for column in range(columns):
                        noise = plan.training_noise(batch, column, self.model.latent_shape, self.model.dtype)
                        self._micro_step(update, clean[batch], noise, times[:, column], text, batch)
            except NonFiniteError as error:
                failure = error
        if self.ranks.any(failure is not None):
            update.drop()
            raise failure or NonFiniteError("gradient", None)
        with self.clock("solve"):
            return update.finish()

    def follow(self) -> float:
        """The old policy moves towards the current one; returns its decay."""
        choice = self.run.policy
        overrides = {
            name: value
            for name, value in (("flat", choice.old_flat), ("rate", choice.old_rate), ("hold", choice.old_hold))
            if value is not None
        }
        decay = old_policy_decay(self.step, choice.old_schedule, **overrides)  # type: ignore[arg-type]
        self.policy.move_old(decay)
        self.on_policy = self.on_policy or decay == 0
        self.balancer.end_epoch()
        return decay

    def examine_on_schedule(self) -> None:
        """Evaluation and pictures, where they are due."""
        last = self.epoch == self.run.epochs
        every, grids = self.run.evaluation.every, self.run.tracking.samples_every
        if last or (every and self.epoch % every == 0):
            self.examine("after" if last else f"epoch-{self.epoch:04d}")
        elif grids and self.epoch % grids == 0:
            self._save_pictures(f"epoch-{self.epoch:04d}")

    def examine(self, name: str) -> dict[str, Score]:
        """Held-out rewards and a grid of pictures, with the averaged weights where there are some."""
        scores: dict[str, Score] = {}
        if self.held_out:
            with self.clock("evaluation"), self.averaged():
                scores, _ = evaluate(self.model, self.examiner, self.held_out, self.run, self.ranks)
            values = {"name": name, "scores": {key: asdict(score) for key, score in scores.items()}}
            self._log("evaluation", self.epoch, values)
            told = ", ".join(f"{key} {score.mean:.3f} ± {score.error:.3f}" for key, score in scores.items())
            self.tell(f"held out, {name}: {told}")
        self._save_pictures(name)
        return scores

    def save_on_schedule(self) -> None:
        """A checkpoint, where it is due."""
        every = self.run.checkpoints.every
        if self.epoch == self.run.epochs or (every and self.epoch % every == 0):
            self.save()

    def save(self) -> None:
        """Writes a checkpoint; see :mod:`mogb_diffusion.checkpoint`.

        Raises:
            CheckpointError: It could not be written; on every rank.
        """
        if self.out is None:
            return
        with self.clock("checkpoints"):
            state = sharding.gathered(self.state_dict(), self.ranks.first)
            with self.averaged():
                whole = self.policy.gathered(self.ranks.first)
            keep_last = self.run.checkpoints.keep_last
            with self.ranks.together():
                if self.ranks.first:
                    checkpoint.save(self.out, self.step, state, lambda to: self._export(to, whole), keep_last=keep_last)

    def export(self, folder: Path) -> None:
        """Writes the trained weights, averaged where there is an average, in the form that diffusers loads.

        Every rank takes part where the weights are spread over them; the first one writes.
        """
        with self.averaged():
            whole = self.policy.gathered(self.ranks.first)
        with self.ranks.together():
            if self.ranks.first:
                self._export(folder, whole)

    def _export(self, folder: Path, whole: dict[str, Tensor] | None) -> None:
        with self.averaged():
            self.policy.export(self.model.pipeline, folder, whole)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the current policy has the averaged weights, where there are some."""
        with nullcontext() if self.ema is None else self.ema.applied():
            yield

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on; of weights that are spread over the ranks, this rank's part."""
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "step": self.step,
            "on_policy": self.on_policy,
            "lines": 0 if self.tracker is None else self.tracker.lines,
            "policy": self.policy.tensors(),
            "optimizer": checkpoint.optimizer_state(self.optimizer),
            "balancer": self.balancer.state_dict(),
        }
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        if self.signals.running is not None:
            state["advantages"] = self.signals.running.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave, with whole tensors."""
        self.policy.load(state["policy"])
        parameters = self.policy.parameters
        self.optimizer.load_state_dict(sharding.optimizer_state_for(parameters, state["optimizer"]))
        self.balancer.load_state_dict(state["balancer"])
        if self.ema is not None:
            self.ema.load_state_dict(sharding.averages_for(parameters, state["ema"]))
        if self.signals.running is not None:
            self.signals.running.load_state_dict(state["advantages"])
        self.epoch, self.step = int(state["epoch"]), int(state["step"])
        self.on_policy = bool(state["on_policy"])
        self._first_epoch = self.epoch

    def log_epoch(
        self,
        plan: Epoch,
        rewards: Float64[Tensor, "K B"],
        signal: Signal,
        reports: Sequence[BalanceReport | None],
        decay: float,
    ) -> None:
        """One line of ``metrics.jsonl``, and one for the eye."""
        names = self.run.reward_names
        means = {name: _mean(row) for name, row in zip(names, rewards, strict=True)}
        flat = {name: _flat_share(row, plan.rows) for name, row in zip(names, rewards, strict=True)}
        failures = {name: {k: n for k, n in counts.items() if n} for name, counts in self.scorer.counts.items()}
        values = {
            "rewards": means,
            "silent_groups": flat,
            "clamp_hits": dict(zip(signal.names, signal.clamp_hits.tolist(), strict=True)),
            "failures": {name: counts for name, counts in failures.items() if counts},
            "old_decay": decay,
            "skipped": sum(report is None for report in reports),
            "seconds": self.clock.take() | {"scoring": self.scorer.seconds},
        }
        self._log("epoch", self.epoch, values)
        self.tell(self._summary(means, [report for report in reports if report is not None]))

    def close(self) -> None:
        """Ends threads and files."""
        self.scorer.close()
        self.examiner.close()
        if self.tracker is not None:
            self.tracker.close()
            self.tracker = None

    def _micro_step(
        self, update: Any, clean: Tensor, noise: Tensor, times: Tensor, text: Any, samples: Sequence[int]
    ) -> None:
        """Forward passes of the policies on one micro-batch at one time, and what backward passes it needs."""
        latents = noised(clean, noise, times)
        times = times.to(latents)
        with update.micro_step():
            with self.clock("forward"):
                velocity = self.model.velocity(latents, times, text)
            with self.clock("other policies"), torch.no_grad():
                old = velocity.detach()
                if not self.on_policy:
                    with self.policy.old():
                        old = self.model.velocity(latents, times, text)
                reference = None
                if self.run.loss.kl_weight > 0:
                    with self.policy.reference():
                        reference = self.model.velocity(latents, times, text)
            with self.clock("backward"):
                terms = nft_terms(velocity, old, noised=latents, clean=clean, time=times.cpu(), beta=self.run.loss.beta)
                distance = None
                if reference is not None:
                    distance = (velocity - reference).double().square().flatten(1).mean(dim=1)
                update.add(terms, distance, samples)

    def _clip(self) -> float:
        """Clips the direction; returns its norm before that."""
        limit = self.run.optimizer.max_grad_norm or math.inf
        norm: Any = torch.nn.utils.clip_grad_norm_(self.policy.parameters, limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _log(self, kind: str, epoch: int, values: dict[str, Any]) -> None:
        """Adds a line to the metrics. A full disk stops every rank."""
        with self.ranks.together():
            if self.tracker is not None:
                self.tracker.log(kind, epoch, self.step, values)

    def _log_step(self, report: BalanceReport | None, norm: float, epoch: int) -> None:
        if report is None:
            self._log("step", epoch, {"skipped": True})
            return
        names = report.names

        def named(values: Any) -> dict[str, float] | None:
            return None if values is None else dict(zip(names, values.tolist(), strict=True))

        values = {
            "solve": report.kind, "alpha": named(report.shares), "beta": named(report.coefficients),
            "norms": named(report.norms), "cosines": named(report.cosines), "min_cosine": report.min_cosine,
            "conflicts": report.conflicts, "left_out": list(report.left_out), "scale": report.scale,
            "passes": report.passes, "grad_norm": norm, "note": report.note,
        }  # fmt: skip
        if self.balancer.scale.enabled:
            values["loss_scale"] = self.balancer.scale.value
        self._log("step", epoch, values)

    def _summary(self, means: dict[str, float], reports: Sequence[BalanceReport]) -> str:
        parts = [" ".join(f"{name} {mean:.3f}" for name, mean in means.items())]
        if reports:
            last = reports[-1]
            parts.append("alpha " + "/".join(f"{share:.2f}" for share in last.shares.tolist()))
            worst = min((r.min_cosine for r in reports if r.cosines is not None), default=math.nan)
            if math.isfinite(worst):
                parts.append(f"worst cos {worst:+.2f}")
        done = self.epoch - self._first_epoch
        left = (time.monotonic() - self._began) / max(done, 1) * (self.run.epochs - self.epoch)
        return f"epoch {self.epoch}/{self.run.epochs} | {' | '.join(parts)} | {_duration(left)} left"

    def _save_pictures(self, name: str) -> None:
        if self.out is None:
            return
        prompts = self.held_out or [self.mixture.rows[n % len(self.mixture)] for n in range(self.run.tracking.samples)]
        prompts, how = prompts[: self.run.tracking.samples], evaluation_sampling(self.run)
        with self.clock("evaluation"), self.averaged():
            with self._locally():
                if self.ranks.first or self.run.model.shard:  # then all of them hold the weights together
                    images = draw_pictures(self.model, prompts, how, self.run.seed)
            with self.ranks.together():
                if self.tracker is not None:
                    self.tracker.save_grid(images, name)

    def _locally(self) -> AbstractContextManager[None]:
        """For passes through the model: what fails on one rank fails on all of them, unless the weights are spread.

        Then a pass gathers them, and a rank that fails within it leaves the others waiting for its part.
        """
        return nullcontext() if self.run.model.shard else self.ranks.together()

    def _precompute(self) -> None:
        """Encodes every prompt of the run, if there is room for them.

        Raises:
            InputError: The embeddings are more than the main memory that is free.
        """
        texts = [prompt.text for prompt in (*self.mixture.rows, *self.held_out)]
        with self.ranks.together():
            readiness.check_embeddings(len({"", *texts}), self.model.embedding_bytes(), readiness.local_ranks())
        with self.ranks.together():
            self.model.precompute(texts)

    def _open(self, resume: bool) -> None:
        """Finds what is there, and begins to write. What fails on one rank fails on all of them."""
        if self.out is None:
            return
        last: tuple[Path, dict[str, Any]] | None = None
        with self.ranks.together():
            check_packages(self.run.tracking)
            if self.ranks.first:
                last = self._find(resume)
        step = round(self.ranks.max(float(last[1]["step"]) if last is not None else -1.0))
        keep = 0
        if step >= 0:
            with self.ranks.together():
                folder = self.out / checkpoint.folder_name(step)
                state = checkpoint.load(folder) if last is None else last[1]
                self.load_state_dict(state)
                self._resumed, keep = True, int(state["lines"])
            self.tell(f"resumed from {folder} at epoch {self.epoch}")
        self._began = time.monotonic()
        with self.ranks.together():
            if self.ranks.first:
                self.out.mkdir(parents=True, exist_ok=True)
                self.tracker = Tracker(self.out, self.run.tracking, self.run.name, keep=keep)
                checkpoint.write_whole(self.out / CONFIG, to_yaml(self.run))  # last: from here on the folder is a run

    def _find(self, resume: bool) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to go on from; for the rank that writes."""
        assert self.out is not None
        checkpoint.restore(self.out)
        present = (self.out / CONFIG).exists() or bool(checkpoint.found(self.out))
        if not present:
            return None
        if not resume:
            raise InputError(f"{self.out} holds a run: add --resume to go on with it, or name another --out.")
        self._check_same()
        last = checkpoint.newest(self.out, self.tell)
        if last is None:
            self.tell(f"{self.out} has no whole checkpoint: the run starts from its beginning.")
        return last

    def _check_same(self) -> None:
        assert self.out is not None
        path = self.out / CONFIG
        if not path.exists():
            return
        before, now = to_plain(from_yaml(path.read_text(), str(path))), to_plain(self.run)
        if not (self.run.balancing.stages or self.run.balancing.final_uniform):
            before["epochs"] = now["epochs"]  # else its parts are shares of them
        if (key := _first_difference(before, now)) is not None:
            raise InputError(
                f"{path} differs from this configuration in {key}: a run goes on as it began. Name another --out."
            )

    def _check_ranks(self) -> None:
        per_update = self.run.batch.images // self.run.batch.updates_per_epoch
        if per_update < self.ranks.size:
            raise ConfigError(
                "batch", f"an update has only {per_update} pictures for {self.ranks.size} ranks; use fewer "
                "updates_per_epoch or more groups."
            )  # fmt: skip

    def _check_passes(self) -> None:
        """Ranks that hold the weights together gather them together: each needs as many forward passes as the others.

        Raises:
            ConfigError: The pictures do not fall on the ranks that way.
        """
        batch, size = self.run.batch, self.ranks.size
        if not self.run.model.shard or size == 1:
            return
        per_update = {
            len(samples) for samples in plan_epoch(self.run, self.mixture, 0).updates(batch.updates_per_epoch)
        }
        parts = [("batch.micro_batch", count, batch.micro_batch) for count in sorted(per_update)]
        parts.append(("batch.sampling_batch", batch.images, batch.sampling_batch or batch.micro_batch))
        if self.held_out:
            parts.append(("evaluation.batch", len(self.held_out), self.run.evaluation.batch))
        for path, count, at_once in parts:
            passes = {-(-share // at_once) for share in (count // size, -(-count // size))}
            if len(passes) > 1 or 0 in passes:
                raise ConfigError(
                    path, f"with model.shard every rank needs equally many passes, but {count} pictures on {size} "
                    f"ranks, {at_once} at once, are {min(passes)} or {max(passes)}; let the ranks divide the pictures, "
                    "or change how many are taken at once.",
                )  # fmt: skip

    def _checkpoint_gradients(self) -> None:
        balancer = self.balancer

        def recompute(function: Any, *args: Any) -> Any:
            if balancer.takes_rows:
                return balancer.engine.checkpoint(function, *args)
            return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)

        self.model.pipeline.transformer.enable_gradient_checkpointing(gradient_checkpointing_func=recompute)


def _mean(row: Float64[Tensor, " B"]) -> float:
    values = row[~row.isnan()]
    return float(values.mean()) if len(values) else math.nan


def _flat_share(row: Float64[Tensor, " B"], rows: Sequence[int]) -> float:
    """The share of the groups, among those that a reward applies to, in which it does not vary."""
    prompts = torch.tensor(list(rows))
    flat = []
    for prompt in dict.fromkeys(rows):
        values = row[prompts == prompt]
        values = values[~values.isnan()]
        if len(values):
            flat.append(float(values.max() == values.min()))
    return sum(flat) / len(flat) if flat else math.nan


def _first_difference(before: Any, now: Any, path: str = "") -> str | None:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*before, *now)):
            if not path and key in _FREE:
                continue
            found = _first_difference(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
            if found is not None:
                return found
        return None
    return None if before == now else path


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
