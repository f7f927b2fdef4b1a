r"""What a toy problem is. Read this file first.

A problem is a small set of K losses over a vector x whose truth is known: where the Pareto set and front are, how large
the hypervolume is. It knows nothing of methods, and imports torch alone.

A new problem is one frozen dataclass in one file of this package, registered by the ``name=`` of its class. The same
class with other options may be registered under more names with ``variants=``::

    @dataclass(frozen=True, kw_only=True)
    class Valley(Problem, name="valley", variants={"valley_scaled": {"scales": (0.1, 1.0)}}): ...

Everything is float64. Losses are minimized. Shapes: K = objectives, N = numbers in x, S = starting points.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float64
from torch import Tensor

REGISTRY: dict[str, tuple[type["Problem"], Mapping[str, Any]]] = {}
"""Name -> class and the options that the name stands for."""

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The protocol under which a problem is run: the published one where there is one.

    Attributes:
        optimizer: ``"adam"`` (betas 0.9 and 0.999) or ``"sgd"`` (no momentum).
        lr: Learning rate.
        steps: Number of steps of a full run.
        quick_steps: Number of steps of a short look.
        quick_lr: Learning rate of a short look.
        tolerance: A run has arrived once :meth:`Problem.distance_to_front` is at most this.
        hard: Why gradients struggle here (many local minima, vanishing or infinite slopes); empty where they do not.
    """

    optimizer: Literal["adam", "sgd"]
    lr: float
    steps: int
    quick_steps: int
    quick_lr: float
    tolerance: float
    hard: str = ""


@dataclass(frozen=True, kw_only=True)
class PlotWindow:
    """What a picture should show.

    Attributes:
        x: Limits of the two axes of x; None unless x has two coordinates.
        losses: Limits of the axes of the first objectives (two or three of them).
        log: Whether the losses are better seen on logarithmic axes.
    """

    x: tuple[Interval, Interval] | None = None
    losses: tuple[Interval, ...]
    log: bool = False


class Problem(ABC):
    """K losses over a vector x, with their truth.

    Attributes:
        name: As in the registry.
        reference: A short citation of where the problem comes from.
        settings: How it is run.
    """

    name: str = ""  # of the class; an instance made under the name of a variant carries that name
    reference: ClassVar[str]

    def __init_subclass__(
        cls, name: str | None = None, variants: Mapping[str, Mapping[str, Any]] | None = None, **kwargs: Any
    ) -> None:
        """Registers the class under ``name``, and under the names of ``variants`` with other options."""
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.name = name
            REGISTRY[name] = (cls, {})
        REGISTRY.update({key: (cls, options) for key, options in (variants or {}).items()})

    @property
    @abstractmethod
    def num_objectives(self) -> int:
        """K."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """N, the length of x."""

    @property
    @abstractmethod
    def settings(self) -> Settings: ...

    @property
    def stochastic(self) -> bool:
        """Whether a generator changes what :meth:`losses` and :meth:`jacobian` return."""
        return False

    @abstractmethod
    def starts(self) -> Float64[Tensor, "S N"]:
        """The fixed starting points: the published ones where there are any."""

    @abstractmethod
    def sample_starts(self, count: int, generator: torch.Generator) -> Float64[Tensor, "S N"]:
        """Random starting points, drawn as in the literature."""

    @abstractmethod
    def losses(self, x: Float64[Tensor, "... N"], generator: torch.Generator | None = None) -> Float64[Tensor, "... K"]:
        """The K losses at every x: differentiable, exact without a generator.

        Args:
            x: Points, batched over leading dimensions.
            generator: The source of the noise of a stochastic problem; None switches the noise off.
        """

    def jacobian(
        self, x: Float64[Tensor, "S N"], generator: torch.Generator | None = None
    ) -> tuple[Float64[Tensor, "S K"], Float64[Tensor, "S K N"]]:
        """The losses and their gradients at every x, detached.

        On a bounded problem, the components of x that sit on a bound and that *every* gradient would push out are 0:
        no step can use them, and left in they would keep every point of a front on the boundary from being stationary.
        """
        losses, rows = self._jacobian(x.detach(), generator)
        if self.box is not None:
            lower, upper = self.box
            pinned = ((x <= lower) & (rows >= 0).all(1)) | ((x >= upper) & (rows <= 0).all(1))
            rows = rows.masked_fill(pinned[:, None], 0.0)
        return losses, rows

    @property
    def box(self) -> tuple[Float64[Tensor, " N"], Float64[Tensor, " N"]] | None:
        """Lower and upper bounds of x; None where x is free."""
        return None

    def project(self, x: Float64[Tensor, "... N"]) -> Float64[Tensor, "... N"]:
        """The nearest point in the box; x itself where there is none."""
        return x if self.box is None else torch.clamp(x, *self.box)

    def pareto_set(self, count: int) -> Float64[Tensor, "M N"] | None:
        """About ``count`` points of the Pareto set (fewer where it is a single point); None where it is not known."""
        return None

    def pareto_front(self, count: int) -> Float64[Tensor, "M K"] | None:
        """About ``count`` points of the Pareto front; None where it is not known."""
        points = self.pareto_set(count)
        return None if points is None else self.losses(points)

    @property
    def units(self) -> Float64[Tensor, " K"]:
        """What counts as 1 in each objective when distances are measured: its range over the front, say.

        It makes distances comparable between objectives, and between a problem and its rescaled variant.
        """
        return torch.ones(self.num_objectives, dtype=torch.float64)

    def distance_to_front(self, losses: Float64[Tensor, "... K"]) -> Float64[Tensor, "..."] | None:
        """Distance to the Pareto front, every objective measured in its :attr:`units`; None where it is not known."""
        return None

    @property
    def reference_point(self) -> Float64[Tensor, " K"] | None:
        """Where the hypervolume is measured from; None where no hypervolume is known."""
        return None

    @property
    def true_hypervolume(self) -> float | None:
        """The hypervolume of the whole front with respect to :attr:`reference_point`."""
        return None

    @property
    def plot_window(self) -> PlotWindow | None:
        """Limits for pictures; None where there is nothing to see in two or three dimensions."""
        return None

    def _jacobian(
        self, x: Float64[Tensor, "S N"], generator: torch.Generator | None
    ) -> tuple[Float64[Tensor, "S K"], Float64[Tensor, "S K N"]]:
        """One backward pass per objective serves all points, since the losses at one point depend on no other."""
        leaf = x.clone().requires_grad_()
        with torch.enable_grad():
            losses = self.losses(leaf, generator)
            totals = losses.sum(0).unbind()
            last = len(totals) - 1
            rows = [torch.autograd.grad(total, leaf, retain_graph=k < last)[0] for k, total in enumerate(totals)]
        return losses.detach(), torch.stack(rows, dim=1)


def uniform(count: int, lower: Tensor, upper: Tensor, generator: torch.Generator) -> Float64[Tensor, "S N"]:
    """Points drawn uniformly from a box."""
    draws = torch.rand(count, len(lower), generator=generator, dtype=torch.float64)
    return lower + (upper - lower) * draws


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU with a seed of its own."""
    return torch.Generator().manual_seed(seed)
