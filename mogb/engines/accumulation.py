"""Micro-batches: their Jacobians add up, and the sum is balanced once.

The loss values add up as the gradients do. Whoever wants the mean over M micro-batches divides every loss by M, as with
ordinary accumulation.

Shapes: K = objectives.
"""

import copy
from typing import Any

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from mogb.base import Solution
from mogb.engines.differentiate import Update
from mogb.engines.rows import Rows
from mogb.engines.step import Source
from mogb.jacobian import Jacobian


class Pending:
    """A step that is under way: what its micro-batches gave so far.

    Args:
        source: The first micro-batch.
        solution: Weights that are known beforehand: then every micro-batch goes into ``.grad`` at once, and no rows
            are kept.
        undo: What brings the method's state back, if the step is dropped.
    """

    def __init__(self, source: Source, solution: Solution | None, undo: Any) -> None:
        self.solution = solution
        self.undo = undo
        self.passes = 0
        self.skipped = False
        self._names = source.names
        self._scale = source.scale
        self._values: Float64[np.ndarray, " K"] = np.zeros(len(source.values))
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: dict[tuple[int, int], Update] = {}

    def check(self, source: Source) -> None:
        """Raises ValueError if a micro-batch does not belong to the same step."""
        if len(source.values) != len(self._values) or source.names != self._names:
            raise ValueError(
                f"A micro-batch has {len(source.values)} objectives ({source.names}), but those before it had "
                f"{len(self._values)} ({self._names}): all micro-batches of a step need the same ones, in the same "
                "order."
            )
        if source.scale != self._scale:
            raise ValueError(
                f"The scale of the gradients changed from {self._scale} to {source.scale} within one step: call "
                "scaler.update() only after the last micro-batch."
            )

    def add_rows(self, source: Source) -> None:
        """Differentiates a micro-batch, and adds its rows to those held."""
        rows = source.rows(list(self._rows.values()))
        if rows.jacobian is not None:
            self._rows |= {id(p): (p, block) for p, block in zip(rows.params, rows.jacobian.blocks, strict=True)}
        for k, (param, grad) in rows.own:
            before = self._own.get((id(param), k))
            self._own[id(param), k] = (param, grad if before is None else before[1] + grad)
        self.count(source, rows.passes)

    def count(self, source: Source, passes: int) -> None:
        """Counts a micro-batch."""
        self._values = self._values + source.values
        self.passes += passes

    def total(self, last: Source) -> tuple[Source, Rows]:
        """All micro-batches as one batch: a source that knows the values, and the rows."""
        whole = copy.copy(last)
        whole.values = self._values
        reached: dict[int, set[int]] = {}
        for key, k in self._own:
            reached.setdefault(key, set()).add(k)
        own = []
        for (key, k), (param, grad) in self._own.items():
            if key in self._rows or len(reached[key]) > 1:  # of one objective here, of several elsewhere
                if key not in self._rows:
                    self._rows[key] = (param, grad.new_zeros((len(self._values), *param.shape)))
                self._rows[key][1][k] += grad
            else:
                own.append((k, (param, grad)))
        params = tuple(param for param, _ in self._rows.values())
        blocks = tuple(block for _, block in self._rows.values())
        return whole, Rows(params, Jacobian(blocks) if blocks else None, tuple(own), self.passes)
