"""Which engine forms the Gramian: one pass per loss, one vectorized pass, or block by block.

=============  =======================  =========================  ===================================================
engine         backward passes          holds besides activations  when
=============  =======================  =========================  ===================================================
sequential     K                        K × N numbers              always possible
batched        1, vectorized            K × N, K × cotangents      small kernels on an accelerator; needs vmap rules
streaming      K, and one for the       K × the widest block       large N: rows would not fit
               direction
=============  =======================  =========================  ===================================================

``"auto"`` is sequential, unless the rows would take more than a quarter of the device's memory and streaming halves
that. It never batches: measured on CPUs, that pays for plain MLPs alone, takes K-fold activations elsewhere, and can't
always name the objective behind a NaN (docs/engines.md).

Shapes: K = objectives, N = numbers in one gradient.
"""

import os
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch

from mogb.base import Aggregator
from mogb.engines.distributed import Ranks
from mogb.engines.losses import Losses
from mogb.engines.plan import Plan
from mogb.engines.streaming import Segment, Walk, walk_down

Engine: TypeAlias = Literal["auto", "sequential", "batched", "streaming"]


@dataclass(frozen=True, eq=False)
class Choice:
    """An engine for one step.

    Attributes:
        name: ``"sequential"``, ``"batched"`` or ``"streaming"``.
        note: Why it is not the one that was asked for; empty if it is.
        walk: What streaming walks along.
        cuts: Where, between parameters, it cuts the graph.
    """

    name: str
    note: str = ""
    walk: Walk | None = None
    cuts: tuple[int, ...] = ()

    @property
    def streams(self) -> bool:
        """Whether no rows are kept."""
        return self.name == "streaming"

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The parts of the graph, for streaming."""
        assert self.walk is not None
        return self.walk.segments(self.cuts)

    def describe(self) -> str:
        """What all ranks must have in common: the engine, and for streaming the graph, as far as it is walked."""
        if self.walk is None:
            return self.name
        return f"streaming along {self.walk.taken}, cuts at {[cut.position for cut in self.walk.cuts]}"

    def agreed(self, ranks: Ranks) -> "Choice":
        """The first rank's choice: the ranks' batches, and so the widths of their cuts, may differ."""
        if ranks.alone or self.walk is None:
            return self
        flags = np.zeros(len(self.walk.taken) + 1)
        flags[[0, *self.cuts]] = self.streams, *(1.0 for _ in self.cuts)
        flags = ranks.agree(flags)
        cuts = tuple(int(position) for position in flags[1:].nonzero()[0] + 1)
        return Choice("streaming", "", self.walk, cuts) if flags[0] else Choice("sequential", self.note, self.walk)


SEQUENTIAL = Choice("sequential")


def check_engine(engine: object, aggregator: Aggregator, *, groups: object = "whole") -> None:
    """What can be said without losses.

    Raises:
        ValueError: An unknown engine, or one that this method or these groups can't use.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {', '.join(map(repr, get_args(Engine)))}, but got {engine!r}.")
    if engine != "streaming":
        return
    if not aggregator.yields_weights:
        raise ValueError(
            f"engine='streaming' keeps no rows, but {aggregator.name!r} reads whole rows of the Jacobian: use "
            "engine='sequential', or a method that yields weights."
        )
    if not (isinstance(groups, str) and groups == "whole"):
        raise ValueError(
            "engine='streaming' gives one set of weights in one more backward pass, but groups= asks for one set per "
            "group: use engine='sequential'."
        )


def choose(engine: Engine, losses: Losses, plan: Plan, aggregator: Aggregator, *, whole: bool = True) -> Choice:
    """The engine for these losses and parameters; ``whole`` if all of these are balanced together.

    Raises:
        ValueError: An engine that sharded parameters rule out.
    """
    if engine == "sequential" or not plan.shared or aggregator.reads == "losses":
        return SEQUENTIAL
    if plan.sharded:
        if engine != "auto":
            raise ValueError(
                f"engine={engine!r} needs whole parameters in the graph, but they are sharded: use engine='sequential'."
            )
        return SEQUENTIAL
    if engine == "batched":
        return Choice("batched")
    rows = len(losses) * sum(param.numel() * param.element_size() for param in plan.shared)
    may_stream = aggregator.yields_weights and whole
    if engine == "auto" and not (may_stream and rows > memory(plan.shared[0].device) / 4):
        return SEQUENTIAL
    walk = walk_down(losses, plan)
    cuts, width = walk.narrowest()
    saves = len(losses) * width <= rows / 2 if engine == "auto" else len(losses) * width < rows
    if saves:
        return Choice("streaming", walk=walk, cuts=cuts)
    note = "" if engine == "auto" else "streaming would save no memory: no narrow place to cut the graph"
    return Choice("sequential", note, walk)


def memory(device: torch.device) -> float:
    """All bytes of a device: of the accelerator, or of this machine; infinite where that is unknown."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # no POSIX system
        return float("inf")
