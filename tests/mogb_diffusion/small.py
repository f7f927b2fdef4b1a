"""A small velocity model and one step of balancing, for tests that need no Stable Diffusion."""

import torch
from torch import nn

from mogb_diffusion import config
from mogb_diffusion.balancing import RewardBalancer
from mogb_diffusion.flow import noised
from mogb_diffusion.nft import nft_terms
from mogb_diffusion.recipes import recipe
from mogb_diffusion.signals import SignalMaker

SHAPE = (3, 2, 2)
ROWS = [0, 0, 0, 0, 1, 1, 1, 1]  # two prompts of four pictures
TIMES = 2


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Velocity(nn.Module):
    """Two linear layers on latent and time, sample by sample."""

    def __init__(self, dtype=torch.float64, seed=0):
        super().__init__()
        self.first, self.second = nn.Linear(13, 9, dtype=dtype), nn.Linear(9, 12, dtype=dtype)
        with torch.no_grad():
            for number, param in enumerate(self.parameters()):
                param.copy_(torch.randn(param.shape, generator=generator(seed + number), dtype=torch.float64) * 0.4)

    def forward(self, latents, time):
        inputs = torch.cat([latents.flatten(1), time[:, None]], dim=1)
        return self.second(torch.tanh(self.first(inputs))).view_as(latents)


def make_run(mode="marble_exact", *, kl_weight=0.0, epochs=10, rewards=3, loss=None, **options):
    base = recipe("tiny")
    names = ("preference", "aesthetic", "text", "composition", "alignment")[:rewards]
    plain = config.to_plain(base)
    plain |= {
        "epochs": epochs,
        "rewards": [{"name": f"x:{name}", "label": name} for name in names],
        "loss": {"beta": 0.5, "kl_weight": kl_weight} | (loss or {}),
        "balancing": {"mode": mode} | options,
    }
    return config.build(config.Run, plain)


def make_rewards(seed=1, rewards=3, silent=()):
    """[K, B]; the last reward applies to the second prompt only; silent ones are constant."""
    values = torch.rand(rewards, len(ROWS), generator=generator(seed), dtype=torch.float64)
    values[-1, :4] = float("nan")
    for row in silent:
        values[row] = 0.5
    return values


class Step:
    """Everything that a step of balancing needs, and the direction that it gives."""

    def __init__(self, run, *, on_policy=False, dtype=torch.float64, rewards=None, specialists=(), ranks=None):
        self.run = run
        self.model, self.old = Velocity(dtype), Velocity(dtype, seed=0 if on_policy else 100)
        self.reference = Velocity(dtype, seed=200)
        self.values = make_rewards(rewards=len(run.rewards)) if rewards is None else rewards
        self.clean = torch.randn(len(ROWS), *SHAPE, generator=generator(2), dtype=torch.float64).to(dtype)
        self.noise = torch.randn(TIMES, len(ROWS), *SHAPE, generator=generator(3), dtype=torch.float64).to(dtype)
        self.time = torch.rand(TIMES, len(ROWS), generator=generator(4), dtype=torch.float64).to(dtype)
        self.signals = SignalMaker(run, specialists)
        self.balancer = RewardBalancer(run, self.model, tuple(self.model.parameters()), ranks=ranks)

    def signal(self, epoch=0):
        return self.signals(self.values, ROWS, epoch)

    def terms(self, samples, column):
        """Terms (u, s) and distance of a micro-batch."""
        time, noise, clean = self.time[column, samples], self.noise[column, samples], self.clean[samples]
        latents = noised(clean, noise, time)
        velocity = self.model(latents, time)
        with torch.no_grad():
            old, reference = self.old(latents, time), self.reference(latents, time)
        terms = nft_terms(velocity, old, noised=latents, clean=clean, time=time, beta=self.run.loss.beta)
        distance = None
        if self.run.loss.kl_weight:
            distance = (velocity - reference).double().square().flatten(1).mean(1)
        return terms, distance

    def run_update(self, micro_batch=8, epoch=0, signal=None, samples=tuple(range(8))):
        """One optimizer step's balancing; the report and the direction as one vector."""
        parts = [list(samples[start : start + micro_batch]) for start in range(0, len(samples), micro_batch)]
        for param in self.model.parameters():
            param.grad = None
        update = self.balancer.start(signal or self.signal(epoch), samples, len(parts) * TIMES, TIMES, epoch)
        for part in parts:
            for column in range(TIMES):
                with update.micro_step():
                    update.add(*self.terms(part, column), part)
        report = update.finish()
        return report, torch.cat([param.grad.flatten() for param in self.model.parameters()])

    def gradient(self, loss):
        grads = torch.autograd.grad(loss, tuple(self.model.parameters()))
        return torch.cat([grad.flatten() for grad in grads])
