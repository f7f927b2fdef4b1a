"""Numbers of a method that the user's optimizer learns, such as the log variances of uncertainty weighting.

Shapes: K = objectives.
"""

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn


class LearnedVector:
    """One number per objective, learned by the user's optimizer from slopes that the method knows in closed form.

    Unless ``init`` gives one number per objective, its size is that of the first losses it meets; until then the
    parameter is empty. Optimizers that make their state at their first step take it as it is: of those in torch, all
    but Adagrad.

    Attributes:
        parameter: Float64 on the CPU. The object never changes, so that an optimizer can hold on to it; its ``.grad``
            is set, not added to, by every solve.

    Args:
        init: Where all numbers start, or where each of them does.
    """

    def __init__(self, init: float | tuple[float, ...]) -> None:
        self.init = init
        self.parameter = nn.Parameter(torch.empty(0, dtype=torch.float64))
        self._handed_out = False
        self._unheard = 0
        self.restart()

    def hand_out(self) -> nn.Parameter:
        """The parameter, for an optimizer."""
        self._handed_out = True
        return self.parameter

    def restart(self) -> None:
        """Back to the initial numbers. Who holds the parameter goes on holding it."""
        start = torch.tensor(self.init if isinstance(self.init, tuple) else (), dtype=torch.float64)
        self.load(start)
        self._unheard = 0

    def save(self) -> Tensor:
        """A copy of the numbers; empty as long as the number of objectives is unknown."""
        return self.parameter.detach().clone()

    def load(self, values: Tensor) -> None:
        """Takes the numbers over in place."""
        self.parameter.grad = None
        self.parameter.data = torch.as_tensor(values).detach().to("cpu", torch.float64, copy=True)

    def values(self, method: str, size: int) -> Float64[np.ndarray, " K"]:
        """The numbers for K objectives.

        Raises:
            ValueError: They are for another number of objectives.
            RuntimeError: This is the second call, and no optimizer can have got hold of the parameter.
        """
        if not self._handed_out and self._unheard > 0:
            raise RuntimeError(
                f"{method!r} learns its weights, but nobody called parameters(): they would stay where they are. Give "
                "[*model.parameters(), *method.parameters()] to the optimizer before the second step."
            )
        if self.parameter.numel() == 0 and not isinstance(self.init, tuple):
            self.parameter.data = torch.full((size,), float(self.init), dtype=torch.float64)
        if self.parameter.numel() != size:
            raise ValueError(
                f"{method!r} learns numbers for {self.parameter.numel()} objectives, but got {size}. Call reset() "
                "when the objectives change, or use one instance for each set of objectives."
            )
        self._unheard += 1
        return self.parameter.detach().numpy().copy()

    def learn(self, slope: Float64[np.ndarray, " K"]) -> None:
        """Sets the gradient that the optimizer follows."""
        self.parameter.grad = torch.from_numpy(slope.copy())


def initial_numbers(init: object, name: str) -> float | tuple[float, ...]:
    """An option that holds one finite number, or one for every objective.

    Raises:
        ValueError: A number that is not finite, or no number at all.
    """
    values = np.asarray(init, dtype=np.float64)
    if values.ndim > 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"{name} must be a finite number, or one per objective, but got {init!r}.")
    return float(values) if values.ndim == 0 else tuple(values.tolist())
