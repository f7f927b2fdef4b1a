"""What balancing costs in a training run: MARBLE's Table 2, for K = 5, 16 and 64 rewards.

Every mode trains the same model on the same prompts with random rewards, one epoch after the other in turn, so that
what else the machine does falls on all of them. Times are medians over the epochs after the first; ``update`` is an
optimizer step without sampling and rewards, ``epoch`` is everything. Memory is the peak of an update: of live tensor
bytes on a CPU, of the allocator on a GPU.

    python benchmarks/diffusion_step.py
    python benchmarks/diffusion_step.py --model mid
    python benchmarks/diffusion_step.py --model sd35-medium --device cuda --epochs 6
"""

import argparse
from typing import Any

import numpy as np
import torch
from _common import provenance, table, write
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mogb_diffusion.config import Run, load_run, override
from mogb_diffusion.models import tiny
from mogb_diffusion.models.sd3 import DTYPES, SD3Model
from mogb_diffusion.rollouts import plan_epoch
from mogb_diffusion.seeds import keyed_generator
from mogb_diffusion.trainer import Trainer

MODES = {
    "weighted_sum": "{mode: weighted_sum}",
    "marble (N = 10)": "{mode: marble, refresh_every: 10}",
    "marble_spread": "{mode: marble_spread, fraction: 0.1}",
    "marble_exact": "{mode: marble_exact}",
    "marble_every_step": "{mode: marble_every_step}",
}
UPDATE = ("forward", "other policies", "backward", "solve", "optimizer")


class RandomReward:
    """Random numbers that depend on the number of the call alone."""

    def __init__(self, number: int) -> None:
        self.number, self.calls = number, 0

    def __call__(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
        self.calls += 1
        return torch.rand(len(prompts), generator=keyed_generator("reward", self.number, self.calls))


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


def make_model(name: str, run: Run) -> SD3Model:
    """The model that is timed: random weights in its true shape."""
    dtype, device = DTYPES[run.model.dtype], run.model.device
    pipeline = tiny.build(0)
    if name != "tiny":
        from diffusers import SD3Transformer2DModel

        shapes: dict[str, dict[str, Any]] = {
            "mid": {
                "sample_size": 32, "num_layers": 6, "num_attention_heads": 8, "attention_head_dim": 64,
                "pos_embed_max_size": 32, "in_channels": 3, "out_channels": 3, "caption_projection_dim": 512,
                "joint_attention_dim": 64, "pooled_projection_dim": 64, "qk_norm": "rms_norm",
            },
            "sd35-medium": {
                "sample_size": 64, "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64,
                "pos_embed_max_size": 384, "in_channels": 16, "out_channels": 16, "caption_projection_dim": 1536,
                "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm",
                "dual_attention_layers": tuple(range(13)),
            },
        }  # fmt: skip
        torch.manual_seed(0)
        with torch.device(device):
            pipeline.transformer = SD3Transformer2DModel(**shapes[name])
    model = SD3Model(pipeline, device=device, dtype=dtype, max_sequence_length=1)
    if name == "sd35-medium":
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


def make_trainer(options: argparse.Namespace, mode: str, rewards: int) -> Trainer:
    listed = ", ".join(
        f"{{name: 'diffusion_step:RandomReward', label: r{k}, options: {{number: {k}}}}}" for k in range(rewards)
    )
    size = {"tiny": (48, 48), "mid": (8, 8), "sd35-medium": (9, 36)}[options.model]
    run = override(
        load_run("tiny"),
        [
            "name=step", f"rewards=[{listed}]", "evaluation.prompts=[]", f"balancing={MODES[mode]}",
            f"batch.micro_batch={size[0]}", "batch.images_per_prompt=4", f"batch.groups={size[1] // 4}",
            f"model.device={options.device}", f"model.dtype={options.dtype}", "batch.updates_per_epoch=1",
            f"epochs={options.epochs}", f"policy.old_schedule={'copy' if options.on_policy else 'linear'}",
            "policy.old_hold=0.5" if not options.on_policy else "seed=0",
            f"policy.rank={32 if options.model == 'sd35-medium' else 16}",
            f"model.gradient_checkpointing={str(options.checkpointing).lower()}", *options.set,
        ],
    )  # fmt: skip
    trainer = Trainer(run, model=make_model(options.model, run))
    trainer.clock._wait = options.device.startswith("cuda")
    if not options.on_policy:  # begin off policy: the old one a little behind
        trainer.on_policy = False
        with torch.no_grad():
            for number, param in enumerate(trainer.policy.parameters):
                noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(number))
                param += 0.01 * noise.to(param)
    return trainer


def one_epoch(trainer: Trainer, epoch: int) -> dict[str, float]:
    trainer.train_epoch(epoch)
    return trainer.clock.take()


def peak(trainer: Trainer, epoch: int) -> float:
    """MiB of one update."""
    plan = plan_epoch(trainer.run, trainer.mixture, epoch)
    clean = trainer.roll_out(plan)
    signal = trainer.signals(trainer.collect_rewards(plan), plan.rows, epoch)
    if trainer.model.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        trainer.update(plan, clean, signal, trainer.updates(plan)[0])
        return torch.cuda.max_memory_allocated() / 2**20
    with LivePeak() as live:
        trainer.update(plan, clean, signal, trainer.updates(plan)[0])
    return live.peak / 2**20


def measure(options: argparse.Namespace, rewards: int) -> dict[str, dict[str, float]]:
    modes = [mode for mode in MODES if mode != "marble_every_step" or rewards <= options.most_passes]
    trainers = {mode: make_trainer(options, mode, rewards) for mode in modes}
    seconds: dict[str, list[dict[str, float]]] = {mode: [] for mode in modes}
    for epoch in range(options.epochs):
        for mode, trainer in trainers.items():
            seconds[mode].append(one_epoch(trainer, epoch))
        print(f"\rK = {rewards}: {epoch + 1}/{options.epochs} epochs", end="", flush=True)
    print()
    found = {}
    for mode, epochs in seconds.items():
        phases = {
            phase: typical(mode, [e.get(phase, 0.0) for e in epochs]) for phase in ("sampling", "rewards", *UPDATE)
        }
        phases["update"] = sum(phases[phase] for phase in UPDATE)
        phases["epoch"] = phases["update"] + phases["sampling"] + phases["rewards"]
        phases["peak_mib"] = peak(trainers[mode], options.epochs)
        found[mode] = phases
    for trainer in trainers.values():
        trainer.close()
    return found


def typical(mode: str, seconds: list[float]) -> float:
    """The median over the epochs after the first; solves and the steps between them apart where a mode amortizes."""
    if not mode.startswith("marble ("):
        return float(np.median(seconds[1:] or seconds))
    solved, between = seconds[10::10] or seconds[:1], [s for n, s in enumerate(seconds) if n % 10]
    return float(0.1 * np.median(solved) + 0.9 * np.median(between or solved))


def as_markdown(results: dict[str, dict[str, dict[str, float]]]) -> str:
    header = ("K", "mode", "update, speed", "epoch, speed", "memory", *("sampling", "rewards", *UPDATE))
    rows = []
    for size, modes in results.items():
        base = modes["weighted_sum"]
        for mode, phases in modes.items():
            rows.append((
                size, mode, f"{base['update'] / phases['update']:.2f}", f"{base['epoch'] / phases['epoch']:.2f}",
                f"{phases['peak_mib'] / base['peak_mib']:.2f}",
                *(f"{1000 * phases[phase]:.0f}" for phase in ("sampling", "rewards", *UPDATE)),
            ))  # fmt: skip
    return table(header, rows) + "\n\nSpeed and memory relative to weighted_sum; phases in milliseconds per epoch."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "mid", "sd35-medium"), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help="default: bfloat16 on a GPU")
    parser.add_argument("--rewards", default="5,16,64", help="numbers of rewards, with commas between")
    parser.add_argument("--epochs", type=int, default=11, metavar="N")
    parser.add_argument("--on-policy", action="store_true", help="the old policy is a copy: one pass for all rewards")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--most-passes", type=int, default=64, metavar="K", help="marble_every_step only up to this K")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--name", help="of the result files; default: diffusion_step_<model>")
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    if options.device == "cpu":
        torch.set_num_threads(1)
    results = {size: measure(options, int(size)) for size in options.rewards.split(",")}
    meta = provenance(0)
    if options.device.startswith("cuda"):
        meta["machine"] += f", {torch.cuda.get_device_name()}"
    payload = {"provenance": meta, "options": vars(options), "results": results}
    where = "on policy" if options.on_policy else "off policy"
    saved = ", gradient checkpointing" if options.checkpointing else ""
    head = f"{options.model}, {options.dtype}, {where}{saved}, {options.epochs} epochs of one update.\n\n"
    write(options.name or f"diffusion_step_{options.model.replace('-', '_')}", payload, head + as_markdown(results))


if __name__ == "__main__":
    main()
