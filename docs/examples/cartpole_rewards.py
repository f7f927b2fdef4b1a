"""Four rewards for one policy: a pole that stands, in the middle, at rest, without hectic switching.

    pip install "mogb[plot]" gymnasium
    python docs/examples/cartpole_rewards.py [--methods mgda,upgrad] [--seed 0] [--quick] [--out runs/cartpole]

Gymnasium's CartPole with four rewards a step, each from 0 to 1, and PPO without a critic: the advantage of a step is
its reward to go, less the mean over the batch at the same time. The K losses share the ratios of all steps,

    L_k = shortfall_k - mean_i [ max(A_ki, 0) (min(r_i, 1 + e) - 1) + min(A_ki, 0) (max(r_i, 1 - e) - 1) ],

and are linear in these terms: ``PerSample`` takes all K gradients in one backward pass, whatever K is. (Terms that send
parallel cotangents into the network share a pass, as these do; others take a pass each. The first call takes one more,
to check itself.) Before the step, L_k is the share of reward k that was missed: a loss that methods can read. ``train``
is the loop to copy; what mogb changes in it is marked.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mogb
from mogb.engines.per_sample import PerSample
from mogb.specs import parse_spec

TASKS = ("upright", "centre", "rest", "calm")
METRICS = dict.fromkeys(TASKS, "mean reward, % of the most")
HIGHER_IS_BETTER = dict.fromkeys(TASKS, True)
STEPS, QUICK_STEPS, INNER, LR = 25, 3, 4, 3e-2  # a step here is a rollout, with INNER updates
METHOD_LR = 0.025  # of the parameters that some methods learn (uw, imtl_l)
CARTS, HORIZON, DISCOUNT, CLIP = 32, 150, 0.97, 0.2
EVALUATION_CARTS = 128


@dataclass(frozen=True, eq=False)
class Batch:
    """What B carts did for T steps; after a fall, ``alive`` is 0 and nothing counts.

    Attributes:
        states: ``[T, B, 4]``, scaled to about 1.
        actions: ``[T, B]``, 1 pushes to the right.
        rewards: ``[K, T, B]``.
        alive: ``[T, B]``.
    """

    states: Tensor
    actions: Tensor
    rewards: Tensor
    alive: Tensor


def make_policy() -> nn.Sequential:
    """From a state to the logit of pushing to the right."""
    return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))


@torch.no_grad()
def drive(policy: nn.Module, carts: int, seed: int) -> Batch:
    """Lets carts drive from new starts until they fall, or the time is over."""
    from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv

    environment = CartPoleVectorEnv(num_envs=carts, max_episode_steps=HORIZON + 1)
    generator = torch.Generator().manual_seed(seed)
    scale = np.array([2.4, 2.0, 0.21, 2.0], dtype=np.float32)
    states, actions = np.zeros((HORIZON, carts, 4), np.float32), np.zeros((HORIZON, carts), np.float32)
    rewards, alive = np.zeros((len(TASKS), HORIZON, carts), np.float32), np.zeros((HORIZON, carts), np.float32)
    state, _ = environment.reset(seed=seed)
    standing = np.ones(carts, dtype=bool)
    chance = torch.rand(HORIZON, carts, generator=generator).numpy()
    for t in range(HORIZON):
        states[t], alive[t] = state / scale, standing
        push = torch.sigmoid(policy(torch.from_numpy(states[t]))[:, 0]).numpy()
        actions[t] = chance[t] < push
        state, _, fallen, _, _ = environment.step(actions[t].astype(np.int64))
        standing = standing & ~fallen
        if not standing.any():
            break
        position, speed, angle, _ = np.abs(state / scale).T
        same = actions[t] == actions[t - 1]
        rewards[:, t] = standing * np.stack([1 - angle, 1 - position, 1 - np.minimum(speed, 1), same])
    return Batch(*(torch.from_numpy(array) for array in (states, actions, rewards, alive)))


def advantages_of(batch: Batch) -> Tensor:
    """Discounted rewards to go, less their mean over the carts at the same time: ``[K, T, B]``."""
    to_go = torch.zeros_like(batch.rewards)
    later = torch.zeros_like(batch.rewards[:, 0])
    for t in reversed(range(HORIZON)):
        later = to_go[:, t] = batch.rewards[:, t] + DISCOUNT * later
    return (to_go - to_go.mean(2, keepdim=True)) * batch.alive * (1 - DISCOUNT)


def log_probability(policy: nn.Module, batch: Batch) -> Tensor:
    """Of every action that was taken, one step after the other: ``[T B]``."""
    logits = policy(batch.states.flatten(0, 1))[:, 0]
    return -F.softplus((1 - 2 * batch.actions.flatten()) * logits)


def coefficients_of(batch: Batch) -> Tensor:
    """Of the terms in the K losses: ``[K, T B, 3]``, constants of the batch."""
    advantages = advantages_of(batch).flatten(1)
    shortfall = (1 - batch.rewards).flatten(1)
    return torch.stack([-advantages.clamp(min=0), -advantages.clamp(max=0), shortfall], 2) / advantages.shape[1]


def terms_of(policy: nn.Module, batch: Batch, old: Tensor) -> Tensor:
    """What the losses are linear in, of every step: ``[T B, 3]``."""
    ratio = (log_probability(policy, batch) - old).exp()
    return torch.stack([ratio.clamp(max=1 + CLIP) - 1, ratio.clamp(min=1 - CLIP) - 1, torch.ones_like(ratio)], 1)


def train(
    aggregator: mogb.Aggregator, seed: int = 0, tasks: Sequence[str] = TASKS, steps: int = STEPS, lr: float = LR
) -> tuple[nn.Module, list[mogb.Report]]:
    """Trains a fresh policy for some of the rewards, and returns it with the report of every step."""
    torch.manual_seed(seed)
    policy = make_policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    if learned := aggregator.parameters():  # new: a few methods learn their weights (uw, imtl_l)
        optimizer.add_param_group({"params": learned, "lr": METHOD_LR})
    engine = PerSample(policy)  # new: K gradients from one backward pass
    wanted = [TASKS.index(task) for task in tasks]
    reports = []
    for rollout in range(steps):
        batch = drive(policy, CARTS, seed * 10_000 + rollout)
        coefficients = coefficients_of(batch)[wanted]
        with torch.no_grad():
            old = log_probability(policy, batch)
        for _ in range(INNER):
            optimizer.zero_grad()
            with engine:  # new: hooks, while they are needed
                terms = terms_of(policy, batch, old)
                # new, in place of (coefficients * terms).sum().backward(); many short samples: the rows are small
                reports.append(engine.backward(terms, coefficients, aggregator, names=tasks, rows="keep"))
            optimizer.step()
            if "update" in aggregator.phases:  # new: a method of two phases (famo) looks at what the step did
                with torch.no_grad():
                    aggregator.update(torch.einsum("kij,ij->k", coefficients, terms_of(policy, batch, old)))
        aggregator.end_epoch()  # new: dwa and go4align compare epochs
    return policy, reports


def evaluate(policy: nn.Module, seed: int = 0, split: str = "test", tasks: Sequence[str] = TASKS) -> dict[str, float]:
    """Every reward in percent of the most that there could be, from new starts."""
    first = {"validation": 10**6, "test": 2 * 10**6}[split]
    rewards = drive(policy, EVALUATION_CARTS, first + seed).rewards.double().mean((1, 2))
    return {task: 100 * rewards[TASKS.index(task)].item() for task in tasks}


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains with every method, and for every reward alone, prints a table and draws a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="weighted_sum,mgda,upgrad,nash_mtl", help="see `mogb list`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="an eighth of the rollouts")
    parser.add_argument("--out", type=Path, default=Path("runs/cartpole_rewards"))
    options = parser.parse_args(arguments)
    steps = QUICK_STEPS if options.quick else STEPS
    alone, curves = {}, {}
    for task in TASKS:
        policy, _ = train(mogb.make("weighted_sum"), options.seed, (task,), steps)
        alone |= evaluate(policy, options.seed, tasks=(task,))
    found = {"each reward alone": alone}
    for method in options.methods.split(","):
        policy, reports = train(parse_spec(method).build(options.seed), options.seed, steps=steps)
        found[method] = evaluate(policy, options.seed)
        curves[method] = 100 * (1 - np.stack([report.losses.numpy() for report in reports[::INNER]]))
        spent = sum(report.backward_passes for report in reports)
        print(f"{method}: {len(TASKS)} rewards, {len(reports)} updates, {spent} backward passes")
    print_table(found)
    draw(found, curves, options.out)
    return found


def print_table(found: dict[str, dict[str, float]]) -> None:
    """One row per method: mean rewards of new starts, in percent of the most that there could be."""
    print(" " * 18 + "".join(f"{task + ', %':>14}" for task in TASKS))
    for method, metrics in found.items():
        print(f"{method:18}" + "".join(f"{metrics[task]:14.1f}" for task in TASKS))


def draw(found: dict[str, dict[str, float]], curves: dict[str, np.ndarray], folder: Path) -> None:
    """Writes ``cartpole_rewards.png``: every reward while training, and what a policy for it alone gets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    figure.suptitle("Rewards while training, % of the most; dashed: trained for this reward alone", fontsize=10)
    for k, (task, axis) in enumerate(zip(TASKS, figure.subplots(1, len(TASKS), sharey=True), strict=True)):
        for method, values in curves.items():
            axis.plot(np.arange(len(values)) + 1, values[:, k], label=method)
        axis.axhline(found["each reward alone"][task], color="#666666", linestyle="--", linewidth=1)
        axis.set(title=task, xlabel="rollouts", ylim=(0, 102))
    figure.axes[0].legend(fontsize=7)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "cartpole_rewards.png", dpi=120)
    print(f"Picture: {folder / 'cartpole_rewards.png'}")


if __name__ == "__main__":
    main()
