r"""Specialists: a policy-gradient bandit in which most samples carry signal for one reward only.

Our own smallest form of what multi-reward training of image generators meets (MARBLE, 2026): a prompt with writing in
it says something to the text reward and little to the others, the rewards come in different sizes, and the sum of
their gradients points against some reward in most mini-batches.

A context c is drawn uniformly, then an action a from the policy

.. math::  \pi_x(a \mid c) = \operatorname{softmax}_a \bigl(
           \sqrt{1 - \rho} \, \theta_{ca} + \sqrt{\rho} \, \eta_a \bigr), \qquad x = (\theta, \eta)

Every context has preferences :math:`\theta_c` of its own, and all share habits :math:`\eta`. Reward k pays
:math:`s_k q_{ca}` in the contexts of its own and in a few that pay every reward, and 0 elsewhere; q is 1 for the best
action of c and 0 for the worst. The scales s_k fall from ``spread`` to 1. In most contexts of reward k the best action
is k, so rewards pull the habits apart: their gradients conflict, although they want nothing that excludes another.

.. math::  f_k(x) = -\mathbb E_{c, a} [ s_k q_{ca} \, 1(k \text{ pays in } c) ]

**Truth.** Every context can learn its own best action, so all rewards reach their maxima together: the front is the
single point :math:`-s_k \cdot` (share of contexts in which k pays), approached as x grows. The losses and gradients
without a generator are exact expectations.

**Mini-batches.** With a generator, ``groups`` contexts and ``group_size`` actions in each are drawn; a sample's reward
has Gaussian noise of ``noise`` times s_k, in all contexts. The gradient is the policy gradient
:math:`-\frac1B \sum_b A_{kb} \nabla \log \pi(a_b \mid c_b)` whose advantages A are rewards minus the mean of the
*other* samples of the group: an unbiased estimate of the exact gradient.

**What the diagnostic means.** For a direction d and the gradients g_k of one mini-batch, look at cos(d, g_k): its
minimum, mean and variance over k, and how often the minimum is negative. That the min-norm point of the *same*
mini-batch never conflicts is an identity (:math:`d \cdot g_k \ge \|d\|^2`), not evidence. Evidence is the held-out
form: the direction of a mini-batch against the exact gradients, ``jacobian(x)`` without a generator. At the first
starting point, over 500 mini-batches (``mogb.metrics.harmony``):

=====================  =======  ========  ========  =============  ================  ==================
direction              min cos  mean cos  variance  conflict rate  held-out min cos  held-out conflicts
=====================  =======  ========  ========  =============  ================  ==================
weighted sum           -0.10    0.27      0.184     73 %           -0.23             97 %
min-norm, raw          0.05     0.35      0.129     0 %            -0.11             97 %
mean of units          0.36     0.49      0.010     0 %            0.07              21 %
min-norm of units      0.48     0.48      0.000     0 %            0.09              16 %
=====================  =======  ========  ========  =============  ================  ==================

(MARBLE prints -0.13, 0.46, 0.161, 80 % for the weighted sum of its five rewards.) The raw min-norm point shows that the
identity proves nothing: no conflict in its own mini-batch, and as many as the weighted sum with the exact gradients.
Once all rewards are close to their maxima the exact gradients vanish and every method's held-out cosines are noise.

Shapes: S = starting points, C = contexts, A = actions, P = groups in a mini-batch, M = samples in a group.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from mogb.problems.base import PlotWindow, Problem, Settings, seeded


@dataclass(frozen=True, kw_only=True)
class Specialists(Problem, name="specialists"):
    """A contextual bandit with one specialist reward per kind of context.

    Attributes:
        objectives: K, the number of rewards.
        contexts: C.
        actions: A.
        shared: Share of the contexts in which every reward pays.
        habit: Share of the contexts of reward k in which action k is the best one; elsewhere it is drawn.
        coupling: rho, the part of the logits that all contexts share, in [0, 1).
        spread: The largest scale over the smallest.
        noise: Standard deviation of a sample's reward, in units of its scale.
        groups: P, contexts drawn for a mini-batch.
        group_size: M, actions drawn in each, at least 2.
        seed: Of the contexts.
    """

    reference: ClassVar = "ours; after the sample-level mismatch of MARBLE, arXiv 2605.06507"

    objectives: int = 4
    contexts: int = 40
    actions: int = 4
    shared: float = 0.05
    habit: float = 0.9
    coupling: float = 0.2
    spread: float = 100.0
    noise: float = 0.1
    groups: int = 32
    group_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"objectives": 1, "contexts": self.objectives, "actions": 2, "groups": 1, "group_size": 2}
        for option, value in least.items():
            if getattr(self, option) < value:
                raise ValueError(f"{option} must be at least {value}, but got {getattr(self, option)}.")
        for option in ("shared", "habit", "coupling"):
            if not 0 <= getattr(self, option) <= 1:
                raise ValueError(f"{option} must be between 0 and 1, but got {getattr(self, option)}.")
        if self.coupling == 1:
            raise ValueError("coupling must be below 1, so that every context can learn its own best action.")
        if self.contexts - self._num_shared < self.objectives and self._num_shared == 0:
            raise ValueError(f"contexts must leave one to every reward, but got {self.contexts}.")
        if not 1 <= self.spread < math.inf:
            raise ValueError(f"spread must be a finite number of at least 1, but got {self.spread}.")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must be a finite number of at least 0, but got {self.noise}.")

    @property
    def num_objectives(self) -> int:
        return self.objectives

    @property
    def dim(self) -> int:
        return self.contexts * self.actions + self.actions

    @property
    def settings(self) -> Settings:
        return Settings(optimizer="adam", lr=0.03, steps=600, quick_steps=150, quick_lr=0.03, tolerance=0.1)

    @property
    def stochastic(self) -> bool:
        return True

    def starts(self) -> Float64[Tensor, "S N"]:
        """The uniform policy, and two random ones with a fixed seed."""
        uniform = torch.zeros(1, self.dim, dtype=torch.float64)
        return torch.cat([uniform, self.sample_starts(2, seeded(self.seed + 1))])

    def sample_starts(self, count: int, generator: torch.Generator) -> Float64[Tensor, "S N"]:
        """Gaussian with standard deviation 1/2."""
        return 0.5 * torch.randn(count, self.dim, generator=generator, dtype=torch.float64)

    def losses(self, x: Float64[Tensor, "... N"], generator: torch.Generator | None = None) -> Float64[Tensor, "... K"]:
        log_policy = self._logits(x).log_softmax(-1)
        if generator is None:
            return -torch.einsum("...ca,kca->...k", log_policy.exp(), _rewards(self)) / self.contexts
        flat = log_policy.reshape(-1, self.contexts, self.actions)
        contexts, actions = self._sample(flat.detach().exp(), generator)
        rewards, advantages = self._score(contexts, actions, generator)
        taken = flat.flatten(1).gather(1, contexts * self.actions + actions)
        score = -(advantages * (taken - taken.detach())[:, None]).mean(-1)  # zero, but its gradient is the estimate
        return (score - rewards.mean(-1)).reshape(*x.shape[:-1], self.objectives)

    def pareto_front(self, count: int) -> Float64[Tensor, "1 K"]:
        """The best values of all rewards at once, which no finite x attains."""
        return -self.units[None]

    @property
    def units(self) -> Float64[Tensor, " K"]:
        """The best value of every reward."""
        return _rewards(self).amax(-1).mean(-1)

    def distance_to_front(self, losses: Float64[Tensor, "... K"]) -> Float64[Tensor, "..."]:
        """The norm of what is missing in every reward, as shares of their best values; exact."""
        return (losses / self.units + 1).norm(dim=-1)

    @property
    def reference_point(self) -> Float64[Tensor, " K"]:
        """No reward at all."""
        return torch.zeros(self.objectives, dtype=torch.float64)

    @property
    def true_hypervolume(self) -> float:
        """The whole box, since all rewards approach their best values together."""
        return float(self.units.prod())

    @property
    def plot_window(self) -> PlotWindow | None:
        if self.objectives < 2:
            return None
        best = self.units.tolist()
        return PlotWindow(losses=((-1.05 * best[0], 0.0), (-1.05 * best[-1], 0.0)))

    def _jacobian(
        self, x: Float64[Tensor, "S N"], generator: torch.Generator | None
    ) -> tuple[Float64[Tensor, "S K"], Float64[Tensor, "S K N"]]:
        policy = self._logits(x).softmax(-1)
        if generator is None:
            rewards = _rewards(self)
            expected = torch.einsum("sca,kca->skc", policy, rewards)
            slopes = -policy[:, None] * (rewards - expected[..., None]) / self.contexts
            return -expected.mean(-1), self._pull_back(slopes)
        contexts, actions = self._sample(policy, generator)
        rewards, advantages = self._score(contexts, actions, generator)
        # The advantages of a group sum to 0, so that the policy in "indicator minus policy" cancels.
        cells = (contexts * self.actions + actions)[:, None].expand_as(advantages)
        slopes = policy.new_zeros(len(x), self.objectives, self.contexts * self.actions)
        slopes.scatter_add_(2, cells, advantages / -advantages.shape[-1])
        return -rewards.mean(-1), self._pull_back(slopes.unflatten(-1, (self.contexts, self.actions)))

    @property
    def _num_shared(self) -> int:
        return round(self.shared * self.contexts)

    def _logits(self, x: Tensor) -> Tensor:
        own, habits = x[..., : -self.actions], x[..., None, -self.actions :]
        own = own.unflatten(-1, (self.contexts, self.actions))
        return math.sqrt(1 - self.coupling) * own + math.sqrt(self.coupling) * habits

    def _pull_back(self, slopes: Tensor) -> Tensor:
        """From slopes in the logits, ``[S, K, C, A]``, to slopes in x."""
        own, habits = math.sqrt(1 - self.coupling) * slopes.flatten(2), math.sqrt(self.coupling) * slopes.sum(2)
        return torch.cat([own, habits], dim=2)

    def _sample(
        self, policy: Float64[Tensor, "S C A"], generator: torch.Generator
    ) -> tuple[Int64[Tensor, "S B"], Int64[Tensor, "S B"]]:
        """Contexts and actions of B = P M samples, group after group."""
        count = len(policy)
        contexts = torch.randint(self.contexts, (count, self.groups), generator=generator)
        chances = policy.gather(1, contexts[..., None].expand(-1, -1, self.actions)).flatten(0, 1)
        actions = torch.multinomial(chances, self.group_size, replacement=True, generator=generator)
        return contexts.repeat_interleave(self.group_size, dim=1), actions.reshape(count, -1)

    def _score(
        self, contexts: Int64[Tensor, "S B"], actions: Int64[Tensor, "S B"], generator: torch.Generator
    ) -> tuple[Float64[Tensor, "S K B"], Float64[Tensor, "S K B"]]:
        """Noisy rewards, and how far each exceeds the mean of the others of its group."""
        exact = _rewards(self)[:, contexts, actions].transpose(0, 1)
        draws = torch.randn(exact.shape, generator=generator, dtype=torch.float64)
        rewards = exact + self.noise * _scales(self)[:, None] * draws
        grouped = rewards.unflatten(-1, (self.groups, self.group_size))
        centred = grouped - grouped.mean(-1, keepdim=True)
        return rewards, (centred * (self.group_size / (self.group_size - 1))).flatten(-2)


@lru_cache(maxsize=8)
def _scales(problem: Specialists) -> Tensor:
    return torch.logspace(math.log10(problem.spread), 0.0, problem.objectives, dtype=torch.float64)


@lru_cache(maxsize=8)
def _rewards(problem: Specialists) -> Float64[Tensor, "K C A"]:
    """Mean rewards: scale, times whether the reward pays in the context, times the quality of the action."""
    generator = seeded(problem.seed)
    contexts, actions, shared = problem.contexts, problem.actions, problem._num_shared
    owner = (torch.arange(contexts) - shared) % problem.objectives
    by_habit = torch.rand(contexts, generator=generator, dtype=torch.float64) < problem.habit
    by_habit[:shared] = False
    best = torch.where(by_habit, owner % actions, torch.randint(actions, (contexts,), generator=generator))
    quality = 0.5 * torch.rand(contexts, actions, generator=generator, dtype=torch.float64)
    quality.scatter_(1, best[:, None], 1.0)
    low = quality.amin(1, keepdim=True)
    quality = (quality - low) / (1 - low)
    pays = owner == torch.arange(problem.objectives)[:, None]
    pays[:, :shared] = True
    return _scales(problem)[:, None, None] * pays[..., None] * quality
