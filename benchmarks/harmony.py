"""How well one direction serves every reward: MARBLE's Table S1 on the tiny model, in sample and held out.

At fixed weights, mini-batches are drawn by the policy, and each gives one gradient per reward and one direction per
method. *In sample* is what the paper measures: the cosines of a direction with the gradients that it was made of. For
min-norm methods the smallest of them cannot be negative, whatever the data, so that a conflict rate of 0 % there is an
identity. *Held out* are the cosines with the mean gradient of all other mini-batches: would the step improve rewards on
average? ``signal`` is the share of a gradient that is not noise, |E g|² / E |g|², estimated without bias.

    python benchmarks/harmony.py                            # at the base model
    python benchmarks/harmony.py --run runs/tiny            # and with the weights of a finished run
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import provenance, table, write

import mogb
from mogb_diffusion import checkpoint
from mogb_diffusion.advantages import gdpo_advantages, summed_advantages
from mogb_diffusion.config import load_run
from mogb_diffusion.nft import nft_terms, nft_weights, optimality
from mogb_diffusion.rollouts import noised, plan_epoch
from mogb_diffusion.trainer import Trainer

METHODS = ("mgda", "pcgrad", "cagrad", "nash_mtl", "upgrad", "imtl_g", "aligned_mtl", "fairgrad", "config", "dualproj")
REFRESH, DECAY = 10, 0.7


def gather(trainer: Trainer, batches: int) -> tuple[np.ndarray, list[str]]:
    """Inner products ``[batches, rows, batches, rows]`` of slopes: K rewards, then the sum's and gdpo's."""
    rows = []
    run = trainer.run
    for number in range(batches):
        plan = plan_epoch(run, trainer.mixture, 10_000 + number)
        clean = trainer.roll_out(plan)
        rewards = trainer.collect_rewards(plan)
        signal = trainer.signals(rewards, plan.rows, number)
        combined = [make(rewards, list(plan.rows)) for make in (summed_advantages, gdpo_advantages)]
        extra = optimality(torch.stack(combined), max_advantage=run.loss.max_advantage)
        rows.append(slopes(trainer, plan, clean, signal, extra))
        print(f"\r{number + 1}/{batches} mini-batches", end="", flush=True)
    print()
    stacked = torch.cat(rows)
    products = torch.zeros(len(stacked), len(stacked), dtype=torch.float64)
    for part in stacked.split(1 << 14, dim=1):
        wide = part.double()
        products += wide @ wide.mT
    size = len(rows[0])
    return products.numpy().reshape(batches, size, batches, size), list(run.reward_names)


def slopes(trainer: Trainer, plan: Any, clean: torch.Tensor, signal: Any, extra: torch.Tensor) -> torch.Tensor:
    """The part of each gradient that depends on its advantages, ``[K + 2, N]``, on policy."""
    run, columns = trainer.run, trainer.run.trained_timesteps
    every = nft_weights(signal.optimality, beta=run.loss.beta, scale=run.loss.max_advantage, mask=signal.applies)
    sums = nft_weights(extra, beta=run.loss.beta, scale=run.loss.max_advantage)
    weights = torch.cat([every, sums])
    weights[:, :, 1] = 0
    engine, jacobian = trainer.balancer.engine, None
    samples = list(range(len(plan)))
    for start in range(0, len(samples), run.batch.micro_batch):
        batch = samples[start : start + run.batch.micro_batch]
        times = plan.times(batch, trainer.model.sigmas(run.sampling.steps)[:-1], columns)
        text = trainer.model.encode([trainer.mixture.rows[plan.rows[i]].text for i in batch])
        for column in range(columns):
            noise = plan.training_noise(batch, column, trainer.model.latent_shape, trainer.model.dtype)
            latents = noised(clean[batch], noise, times[:, column])
            with engine:
                velocity = trainer.model.velocity(latents, times[:, column].float(), text)
                terms = nft_terms(
                    velocity, velocity.detach(), noised=latents, clean=clean[batch], time=times[:, column],
                    beta=run.loss.beta,
                )  # fmt: skip
                jacobian = engine.gradients(terms, weights[:, batch] / columns, store="dense", add_to=jacobian)
    assert jacobian is not None
    return torch.cat([block.flatten(1) for block in jacobian.blocks], dim=1).float()


def directions(products: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """The weights of every method on the rows of every mini-batch, ``[batches, rows]``."""
    batches, rows = products.shape[:2]
    found = {name: np.zeros((batches, rows)) for name in ("weighted_sum", "gdpo", "fixed")}
    found["weighted_sum"][:, size] = 1
    found["gdpo"][:, size + 1] = 1
    found["fixed"][:, :size] = 1 / size
    exact, amortized = np.zeros((batches, rows)), np.zeros((batches, rows))
    solver, averaged = mogb.make("marble", decay=0.0), mogb.make("marble", decay=DECAY)
    for b in range(batches):
        gramian = torch.from_numpy(products[b, :size, b, :size].copy())
        exact[b, :size] = solver.weights(gramian).numpy()
        if b % REFRESH == 0:
            kept = averaged.weights(gramian).numpy()
        amortized[b, :size] = kept
    found |= {"marble (every 10th)": amortized, "marble_exact": exact}
    for name in METHODS:
        method = mogb.make(name, **({"ignore_zero": True} if name == "mgda" else {}))
        found[name] = np.zeros((batches, rows))
        for b in range(batches):
            gramian = torch.from_numpy(products[b, :size, b, :size].copy())
            found[name][b, :size] = method.weights(gramian).numpy()
    return found


def judge(products: np.ndarray, size: int, weights: np.ndarray) -> dict[str, float]:
    """Cosines of the directions with the gradients of their own mini-batch, and with the mean of the others."""
    batches = len(products)
    own, held = np.zeros((batches, size)), np.zeros((batches, size))
    everything = products[:, :size].sum(axis=2)  # [batches, size, rows]: with the sum over all batches
    for b in range(batches):
        mine = products[b, :, b, :]
        length = np.sqrt(max(weights[b] @ mine @ weights[b], 1e-300))
        norms = np.sqrt(mine.diagonal()[:size])
        norms[norms <= 0] = np.nan  # a reward that says nothing about this mini-batch
        own[b] = (mine[:size] @ weights[b]) / norms / length
        others = np.array(
            [sum(products[b, :, c, k] @ weights[b] for c in range(batches) if c != b) for k in range(size)]
        )
        total = np.array([
            everything[:, k, k].sum() - 2 * everything[b, k, k] + products[b, k, b, k] for k in range(size)
        ])  # fmt: skip
        held[b] = others / np.sqrt(np.maximum(total, 1e-300)) / length
    worst = np.nanmin(own, axis=1)
    return {
        "in_min": float(worst.mean()), "in_mean": float(np.nanmean(own)),
        "in_var": float(np.nanvar(own, axis=1).mean()), "in_conflict": float((worst < -1e-9).mean()),
        "out_min": float(held.min(axis=1).mean()),
        "out_mean": float(held.mean()), "out_conflict": float((held.min(axis=1) < 0).mean()),
    }  # fmt: skip


def signal_shares(products: np.ndarray, size: int) -> list[float]:
    """|E g|² / E |g|² of every reward."""
    batches = len(products)
    shares = []
    for k in range(size):
        gramian = products[:, k, :, k]
        squares = gramian.diagonal().mean()
        between = (gramian.sum() - gramian.trace()) / (batches * (batches - 1))
        shares.append(float(between / squares) if squares > 0 else float("nan"))
    return shares


def measure(trainer: Trainer, batches: int) -> dict[str, Any]:
    """Everything at the weights that the trainer has."""
    products, names = gather(trainer, batches)
    size = len(names)
    found = {name: judge(products, size, weights) for name, weights in directions(products, size).items()}
    signal = dict(zip(names, signal_shares(products, size), strict=True))
    mean = np.einsum("akbl->kl", products[:, :size, :, :size])
    lengths = np.sqrt(np.maximum(mean.diagonal(), 1e-300))
    return {"methods": found, "signal": signal, "cosines": (mean / np.outer(lengths, lengths)).tolist(), "names": names}


def as_markdown(results: dict[str, Any]) -> str:
    """One table per place."""
    parts = []
    for place, found in results.items():
        header = ("direction", "min cos", "mean cos", "variance", "conflicts", "held out: min", "mean", "conflicts")
        rows = [
            (
                name, f"{r['in_min']:+.3f}", f"{r['in_mean']:+.3f}", f"{r['in_var']:.4f}", f"{r['in_conflict']:.0%}",
                f"{r['out_min']:+.3f}", f"{r['out_mean']:+.3f}", f"{r['out_conflict']:.0%}",
            )
            for name, r in found["methods"].items()
        ]  # fmt: skip
        shares = ", ".join(f"{name} {share:.3f}" for name, share in found["signal"].items())
        cosines = table(
            ("cosines of mean gradients", *found["names"]),
            [(name, *(f"{c:+.2f}" for c in row)) for name, row in zip(found["names"], found["cosines"], strict=True)],
        )
        parts.append(
            f"### {place}\n\n{table(header, rows)}\n\nSignal share of a mini-batch's gradient: {shares}.\n\n{cosines}"
        )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", metavar="DIR", help="folder of a finished run of the same recipe")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--batches", type=int, default=50, metavar="N")
    parser.add_argument("--groups", type=int, default=6, metavar="N", help="prompts of a mini-batch")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--name", default="harmony", help="of the result files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = load_run(options.recipe, [*options.set, f"batch.groups={options.groups}", "batch.updates_per_epoch=1"])
    trainer = Trainer(run)
    results = {}
    with torch.no_grad():  # an adapter that starts at zero has no gradient in one of its halves: begin a step away
        for number, param in enumerate(trainer.policy.parameters):
            if not bool(param.any()):
                param += 1e-3 * torch.randn(param.shape, generator=torch.Generator().manual_seed(number))
    trainer.follow()
    results["At the base model"] = measure(trainer, options.batches)
    if options.run:
        found = checkpoint.newest(Path(options.run), print)
        if found is None:
            raise SystemExit(f"{options.run} has no checkpoint.")
        trainer.load_state_dict(found[1])
        trainer.policy.move_old(0)
        trainer.on_policy = True
        results["After training"] = measure(trainer, options.batches)
    payload = {"provenance": provenance(run.seed), "batches": options.batches, "results": results}
    head = (
        f"{options.batches} mini-batches of {options.groups} prompts x {run.batch.images_per_prompt} pictures x "
        f"{run.trained_timesteps} times of the tiny model; slopes of five rewards. Columns 2 to 5 are in sample, as "
        "the paper measures: for min-norm methods no conflicts there are an identity. The last three are held out.\n\n"
    )
    write(options.name, payload, head + as_markdown(results))


if __name__ == "__main__":
    main()
