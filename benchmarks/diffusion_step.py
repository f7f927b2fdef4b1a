"""What balancing costs in a training run: MARBLE's Table 2, for K = 5, 16 and 64 rewards.

Every mode trains the same model on the same pictures with random rewards, one update after the other in turn, so that
what else the machine does falls on all of them. ``update`` is an optimizer step without sampling and rewards; ``epoch``
adds the sampling and the rewards of its pictures, which are the same for every mode and timed once a round. On a CPU
time is that of the process, not that of the wall. A speed is the median over the rounds of what weighted_sum took in
the same round, over what the mode took; ``marble`` is one refresh and nine steps between. Memory is the peak of an
update: of live tensor bytes on a CPU, of the allocator on a GPU.

Cases, each with a number of rewards:

============  =====================================================================================================
off           the old policy lags behind and the reference is asked, as in SD3.5's recipes: three forward passes
no_kl         off policy without the distance to the reference, as in the recipe ``tiny``: two forward passes
on            the old policy is the current one, no reference: one forward pass
saved         ``off`` with gradient checkpointing
============  =====================================================================================================

An update has ten micro-steps, so that ``marble_spread`` with its share of a tenth is what it says.

    python benchmarks/diffusion_step.py
    python benchmarks/diffusion_step.py --model mid --rounds 5
    python benchmarks/diffusion_step.py --model sd35-medium --device cuda --rounds 3
    python benchmarks/diffusion_step.py --model sd35-medium --blocks 2 --side 8 --pictures 2 --cases off:5 --rounds 1
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from _common import provenance, table, write
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mogb_diffusion.clock import Clock
from mogb_diffusion.config import Run, load_run, override
from mogb_diffusion.models import tiny
from mogb_diffusion.models.architectures import SD35_MEDIUM_TRANSFORMER
from mogb_diffusion.models.sd3 import DTYPES, SD3Model
from mogb_diffusion.rollouts import Epoch, plan_epoch
from mogb_diffusion.seeds import keyed_generator
from mogb_diffusion.trainer import Trainer

MODES = {
    "weighted_sum": "{mode: weighted_sum}",
    "marble": "{mode: marble, refresh_every: 10}",
    "marble_spread": "{mode: marble_spread, fraction: 0.1}",
    "marble_exact": "{mode: marble_exact}",
    "marble_every_step": "{mode: marble_every_step}",
}
CASES = "off:5,off:16,off:64,no_kl:5,on:5,on:16,on:64,saved:5"
UPDATE = ("forward", "other policies", "backward", "solve", "optimizer")
MICRO_STEPS = 10
PICTURES = {"tiny": 16, "mid": 2, "sd35-medium": 9}  # of a micro-step
SHAPES: dict[str, dict[str, Any]] = {
    "mid": {
        "sample_size": 16, "num_layers": 6, "num_attention_heads": 8, "attention_head_dim": 64,
        "pos_embed_max_size": 16, "in_channels": 3, "out_channels": 3, "caption_projection_dim": 512,
        "joint_attention_dim": 64, "pooled_projection_dim": 64, "qk_norm": "rms_norm",
    },
    "sd35-medium": {**SD35_MEDIUM_TRANSFORMER, "sample_size": 64},  # pictures of 512 pixels
}  # fmt: skip


class RandomReward:
    """Random numbers that depend on the number of the call alone."""

    def __init__(self, number: int) -> None:
        self.number, self.calls = number, 0

    def __call__(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
        self.calls += 1
        return torch.rand(len(prompts), generator=keyed_generator("reward", self.number, self.calls))


class ProcessClock(Clock):
    """Seconds of this process; of the wall on a GPU, which it waits for."""

    def _now(self) -> float:
        return super()._now() if self._wait else time.process_time()


class LivePeak(TorchDispatchMode):
    """The peak of live tensor bytes; what is dead is only looked for where the peak would rise."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                before = self._alive.get(storage._cdata, (None, 0))[1]
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self._now += storage.nbytes() - before
        if self._now > self.peak:
            self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
            self._now = sum(size for _, size in self._alive.values())
            self.peak = max(self.peak, self._now)
        return result


def make_model(options: argparse.Namespace, run: Run) -> SD3Model:
    """The model that is timed: random weights in its true shape."""
    dtype, device = DTYPES[run.model.dtype], run.model.device
    pipeline: Any = tiny.build(0)
    if options.model != "tiny":
        from diffusers import SD3Transformer2DModel

        shape = dict(SHAPES[options.model])
        if options.side:
            shape["sample_size"] = options.side
        if options.blocks:
            shape["num_layers"] = options.blocks
            dual = shape.get("dual_attention_layers", ())
            shape["dual_attention_layers"] = tuple(layer for layer in dual if layer < options.blocks - 1)
        torch.manual_seed(0)
        with torch.device(device):
            pipeline.transformer = SD3Transformer2DModel(**shape)
    model = SD3Model(pipeline, device=device, dtype=dtype, max_sequence_length=1)
    if options.model == "sd35-medium":
        _stand_in(model, device)
    return model


def _stand_in(model: SD3Model, device: str) -> None:
    """Embeddings of the shapes of SD3.5's encoders, and pictures of its decoder's shape: neither is timed."""
    from mogb_diffusion.models.sd3 import Text

    def encode(texts: Any) -> Text:
        tokens = torch.randn(1, 205, 4096, generator=torch.Generator().manual_seed(0))
        pooled = torch.randn(1, 2048, generator=torch.Generator().manual_seed(1))
        size = len(texts)
        return Text(tokens.to(device).expand(size, -1, -1), pooled.to(device).expand(size, -1))

    model.encode = encode  # type: ignore[method-assign]
    model.decode = lambda latents: latents[:, :3].float().sigmoid()  # type: ignore[method-assign]


def make_trainer(options: argparse.Namespace, case: str, rewards: int, mode: str) -> Trainer:
    listed = ", ".join(
        f"{{name: 'diffusion_step:RandomReward', label: r{k}, options: {{number: {k}}}}}" for k in range(rewards)
    )
    size = options.pictures or PICTURES[options.model]
    run = override(
        load_run("tiny"),
        [
            "name=step", f"rewards=[{listed}]", "evaluation.prompts=[]", f"balancing={MODES[mode]}",
            f"batch={{micro_batch: {size}, images_per_prompt: {size}, groups: {MICRO_STEPS // 2}, timesteps: 2}}",
            f"model.device={options.device}", f"model.dtype={options.dtype}",
            f"policy.rank={32 if options.model == 'sd35-medium' else 16}", "policy.ema=0",
            f"loss.kl_weight={1e-4 if case in ('off', 'saved') else 0.0}",
            f"model.gradient_checkpointing={str(case == 'saved').lower()}", *options.set,
        ],
    )  # fmt: skip
    trainer = Trainer(run, model=make_model(options, run))
    trainer.clock = ProcessClock(trainer.model.device, exact=True)
    with torch.no_grad():  # apart from the old policy and from the reference
        for number, param in enumerate(trainer.policy.parameters):
            param += 0.01 * torch.randn(param.shape, generator=torch.Generator().manual_seed(number)).to(param)
    return trainer


def rollouts(trainer: Trainer, number: int) -> tuple[Epoch, torch.Tensor, torch.Tensor]:
    """The pictures of a round and their rewards."""
    plan = plan_epoch(trainer.run, trainer.mixture, number)
    trainer.on_policy = True
    clean = trainer.roll_out(plan)
    return plan, clean, trainer.collect_rewards(plan)


def update(
    trainer: Trainer, case: str, plan: Epoch, clean: torch.Tensor, rewards: torch.Tensor, step: int | None
) -> None:
    """One optimizer step; ``step`` is its number for an amortized mode."""
    trainer.on_policy = case == "on"
    if step is not None:
        trainer.balancer.step = step
    signal = trainer.signals(rewards, plan.rows, plan.number)
    trainer.update(plan, clean, signal, trainer.updates(plan)[0])


def peak(call: Callable[[], None], device: torch.device) -> float:
    """MiB."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() / 2**20
    with LivePeak() as live:
        call()
    return live.peak / 2**20


def measure(options: argparse.Namespace, case: str, rewards: int) -> dict[str, Any]:
    """The phases of every mode in every round; the first round warms up and is thrown away."""
    trainers = {mode: make_trainer(options, case, rewards, mode) for mode in options.modes.split(",")}
    sampler = trainers["weighted_sum"]
    calls: dict[str, list[tuple[str, int | None]]] = {mode: [(mode, None)] for mode in trainers}
    if "marble" in calls:
        calls["marble"] = [("marble refresh", 0), ("marble between", 1)]
    seconds: dict[str, list[dict[str, float]]] = {name: [] for parts in calls.values() for name, _ in parts}
    shared: list[dict[str, float]] = []
    memory: dict[str, float] = {}
    for number in range(options.rounds + 1):
        plan, clean, scored = rollouts(sampler, number)
        shared.append(sampler.clock.take())
        for mode, trainer in trainers.items():
            slow = mode == "marble_every_step" and (rewards > 16 or number > max(1, 8 // rewards))
            for name, step in () if slow else calls[mode]:
                update(trainer, case, plan, clean, scored, step)
                seconds[name].append(trainer.clock.take())
                if number == 0:
                    again = partial(update, trainer, case, plan, clean, scored, step)
                    memory[mode] = max(memory.get(mode, 0.0), peak(again, sampler.model.device))
                    trainer.clock.take()
        print(f"\r{case}, K = {rewards}: round {number}/{options.rounds}", end="", flush=True)
    print()
    for trainer in trainers.values():
        trainer.close()
    return {"seconds": seconds, "shared": shared, "memory": memory}


def summarize(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Speeds relative to weighted_sum, memory, and the median of every phase."""
    every = {name: rounds[1:] for name, rounds in found["seconds"].items()}
    if "marble refresh" in every:
        both = zip(every.pop("marble refresh"), every.pop("marble between"), strict=True)
        every["marble"] = [
            {phase: 0.1 * once.get(phase, 0.0) + 0.9 * then.get(phase, 0.0) for phase in UPDATE} for once, then in both
        ]
    shared = found["shared"][1:]
    sampled = np.array([sum(part.get(phase, 0.0) for phase in ("sampling", "rewards")) for part in shared])
    totals = {
        mode: np.array([sum(r.get(phase, 0.0) for phase in UPDATE) for r in rounds]) for mode, rounds in every.items()
    }
    base, summary = totals["weighted_sum"], {}
    for mode in MODES:
        if not every.get(mode):
            continue
        mine = totals[mode]
        size = len(mine)
        ratios = base[:size] / mine
        summary[mode] = {
            "update_speed": float(np.median(ratios)),
            "update_speed_low": float(np.quantile(ratios, 0.25)), "update_speed_high": float(np.quantile(ratios, 0.75)),
            "epoch_speed": float(np.median((base[:size] + sampled[:size]) / (mine + sampled[:size]))),
            "peak_mib": found["memory"].get(mode, float("nan")), "rounds": size,
            **{phase: float(np.median([p.get(phase, 0.0) for p in shared])) for phase in ("sampling", "rewards")},
            **{phase: float(np.median([r.get(phase, 0.0) for r in every[mode]])) for phase in UPDATE},
        }  # fmt: skip
    return summary


def as_markdown(results: dict[str, dict[str, dict[str, float]]]) -> str:
    header = ("case", "mode", "update, speed", "quartiles", "epoch, speed", "memory", *("sampling", "rewards", *UPDATE))
    rows = []
    for case, modes in results.items():
        base = modes["weighted_sum"]
        for mode, found in modes.items():
            rows.append((
                case.replace(":", ", K = "), mode, f"{found['update_speed']:.2f}",
                f"{found['update_speed_low']:.2f} to {found['update_speed_high']:.2f}", f"{found['epoch_speed']:.2f}",
                f"{found['peak_mib'] / base['peak_mib']:.2f}" if found["peak_mib"] > 0 else "",
                *(f"{1000 * found[phase]:.0f}" for phase in ("sampling", "rewards", *UPDATE)),
            ))  # fmt: skip
    return table(header, rows) + "\n\nSpeed and memory relative to weighted_sum; phases in milliseconds of a round."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "mid", "sd35-medium"), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help="default: bfloat16 on a GPU")
    parser.add_argument("--cases", default=CASES, help="case:rewards, with commas between")
    parser.add_argument("--modes", default=",".join(MODES), help="with commas between; weighted_sum is needed")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--pictures", type=int, metavar="N", help="of a micro-step")
    parser.add_argument("--blocks", type=int, metavar="N", help="fewer blocks than the model has")
    parser.add_argument("--side", type=int, metavar="N", help="smaller latents than the model's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--name", help="of the result files; default: diffusion_step_<model>")
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    if not on_gpu:
        torch.set_num_threads(1)
    meta = provenance(0)
    if on_gpu:
        meta["machine"] += f", {torch.cuda.get_device_name()}"
    size = options.pictures or PICTURES[options.model]
    head = (
        f"{options.model}, {options.dtype}; an update is {MICRO_STEPS} micro-steps of {size} pictures; "
        f"{options.rounds} rounds; marble_every_step fewer, and none of K = 64. off: three policies, as in SD3.5's "
        "recipes; no_kl: no reference; on: on policy, no reference; saved: off, with gradient checkpointing.\n\n"
    )
    results: dict[str, dict[str, dict[str, float]]] = {}
    for case in options.cases.split(","):  # written after every one: what is there is kept
        name, rewards = case.split(":")
        results[case] = summarize(measure(options, name, int(rewards)))
        payload = {"provenance": meta, "options": vars(options), "results": results}
        write(options.name or f"diffusion_step_{options.model.replace('-', '_')}", payload, head + as_markdown(results))


if __name__ == "__main__":
    main()
