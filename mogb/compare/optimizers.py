r"""SGD and Adam on plain arrays ``[S, N]``, one row per starting point; the same numbers as ``torch.optim``.

Adam, at step t, with the published constants:

.. math::

    m \leftarrow \beta_1 m + (1 - \beta_1) d, \quad v \leftarrow \beta_2 v + (1 - \beta_2) d^2, \quad
    x \leftarrow x - \frac{\eta}{1 - \beta_1^t} \, \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

Shapes: S = starting points, N = numbers in x.
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float64

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8

Step = Callable[[Float64[np.ndarray, "S N"]], Float64[np.ndarray, "S N"]]


def make_optimizer(name: str, lr: float, shape: tuple[int, int]) -> Step:
    """A function from the direction of a step to what has to be subtracted from x.

    Raises:
        ValueError: An unknown name.
    """
    if name == "sgd":
        return lambda direction: lr * direction
    if name == "adam":
        return _Adam(lr, shape)
    raise ValueError(f"Unknown optimizer {name!r}. Known ones: adam, sgd.")


class _Adam:
    def __init__(self, lr: float, shape: tuple[int, int]) -> None:
        self.lr = lr
        self.mean, self.square = np.zeros(shape), np.zeros(shape)
        self.time = 0

    def __call__(self, direction: Float64[np.ndarray, "S N"]) -> Float64[np.ndarray, "S N"]:
        self.time += 1
        self.mean *= BETA_1
        self.mean += (1 - BETA_1) * direction
        self.square *= BETA_2
        self.square += (1 - BETA_2) * direction * direction
        root = np.sqrt(self.square)
        root /= math.sqrt(1 - BETA_2**self.time)
        root += EPSILON
        return (self.lr / (1 - BETA_1**self.time)) * self.mean / root
