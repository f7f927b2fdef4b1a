r"""How slowly the old policy and the averaged weights follow the policy in training.

.. math::  old \leftarrow d \cdot old + (1 - d) \cdot current

The *old* policy draws the rollouts and moves once an epoch, with a decay d that depends on the optimizer steps so far.
The *average* is what is evaluated and saved; it moves at every optimizer step, fast at first.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from mogb_diffusion import checks

DecaySchedule = Literal["copy", "linear", "delayed_linear"]

# schedule: (flat, rate, hold) of the reference's types 0, 1 and 2
_SCHEDULES = {"copy": (0, 0.0, 0.0), "linear": (0, 0.001, 0.5), "delayed_linear": (75, 0.0075, 0.999)}


def old_policy_decay(
    step: int,
    schedule: DecaySchedule = "copy",
    *,
    flat: int | None = None,
    rate: float | None = None,
    hold: float | None = None,
) -> float:
    r"""How much of the old policy stays: :math:`d = \min(rate \cdot \max(step - flat, 0),\ hold)`.

    ========================  =========  =====  ======  =====  =================================================
    schedule                  reference  flat   rate    hold   meaning
    ========================  =========  =====  ======  =====  =================================================
    ``copy``                  type 0     0      0       0      the old policy is always a copy: on-policy
    ``linear``                type 1     0      0.001   0.5    reaches 0.5 at step 500
    ``delayed_linear``        type 2     75     0.0075  0.999  a copy for 75 steps, 0.999 from step 209
    ========================  =========  =====  ======  =====  =================================================

    Args:
        step: Optimizer steps so far, >= 0.
        schedule: Which row gives the defaults.
        flat: Steps during which the decay is 0.
        rate: Its growth per step after that, >= 0.
        hold: Where it stops growing, in [0, 1]. MARBLE's released script uses ``linear`` with ``hold=0.95``.

    Raises:
        ValueError: A value out of its range, an unknown schedule, or an override of ``copy``, which has no parameters.
    """
    checks.choice("schedule", schedule, _SCHEDULES)
    if schedule == "copy" and not (flat is None and rate is None and hold is None):
        raise ValueError("schedule='copy' has no flat, rate or hold: its decay is always 0. Use schedule='linear'.")
    defaults = _SCHEDULES[schedule]
    steps = checks.number("step", step, low=0)
    flat_steps = checks.number("flat", defaults[0] if flat is None else flat, low=0)
    growth = checks.number("rate", defaults[1] if rate is None else rate, low=0)
    limit = checks.number("hold", defaults[2] if hold is None else hold, low=0, high=1)
    return min(max(steps - flat_steps, 0) * growth, limit)


def warmup_decay(step: int, decay: float) -> float:
    r"""The decay of an average that is young: :math:`\min((1 + s) / (10 + s),\ decay)` after s optimizer steps."""
    steps = checks.number("step", step, low=0)
    return min((1 + steps) / (10 + steps), checks.number("decay", decay, low=0, high=1))


@torch.no_grad()
def move_towards(averages: Iterable[Tensor], parameters: Iterable[Tensor], decay: float) -> None:
    """Sets every average, in place, to ``decay * average + (1 - decay) * parameter``; decay 0 copies bit for bit."""
    decay = checks.number("decay", decay, low=0, high=1)
    for average, parameter in _pairs(averages, parameters):
        if decay == 0:
            average.copy_(parameter)
        else:
            average.lerp_(parameter.to(average), 1 - decay)


class ParameterEMA:
    """An exponential average of parameters, for evaluation and saving.

    The averages are copies of their own on every device: on the CPU, too, nothing that is done to them reaches the
    parameters in training. They are kept in float32 or wider, where small steps do not vanish.

    Args:
        parameters: Whose average to keep; the first average is their value now.
        decay: What stays of the average at every update, in [0, 1].
        warmup: Use :func:`warmup_decay`, so that the start is soon forgotten.

    Examples:
        >>> weight = torch.zeros(1)
        >>> ema = ParameterEMA([weight])
        >>> weight += 1
        >>> ema.update()  # the decay of the first update is (1 + 1) / (10 + 1)
        >>> with ema.applied():
        ...     round(weight.item(), 4)
        0.8182
        >>> weight.item()
        1.0
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float = 0.9, *, warmup: bool = True) -> None:
        self._parameters = list(parameters)
        if not self._parameters:
            raise ValueError("parameters must hold at least one tensor. Is everything frozen?")
        self.decay = checks.number("decay", decay, low=0, high=1)
        self.warmup = warmup
        self.step = 0
        self._applied = False
        self.averages = [
            parameter.detach().to(checks.at_least_float32(parameter), copy=True) for parameter in self._parameters
        ]

    def update(self) -> None:
        """Moves the averages; call it after every optimizer step."""
        if self._applied:
            raise RuntimeError("update() inside applied() would average the average. Leave the with block first.")
        self.step += 1
        move_towards(
            self.averages, self._parameters, warmup_decay(self.step, self.decay) if self.warmup else self.decay
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the parameters hold the averages; after it, also on errors, their own values bit for bit."""
        if self._applied:
            raise RuntimeError("applied() is already active: it does not nest.")
        kept = [parameter.detach().clone() for parameter in self._parameters]
        self._applied = True
        try:
            move_towards(self._parameters, self.averages, 0)
            yield
        finally:
            move_towards(self._parameters, kept, 0)
            self._applied = False

    def state_dict(self) -> dict[str, Tensor | int]:
        """The number of updates and the averages, copied."""
        averages = {f"averages.{index}": average.clone() for index, average in enumerate(self.averages)}
        return {"step": self.step} | averages

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Takes over what :meth:`state_dict` gave, copied; ``decay`` and ``warmup`` stay those of this instance.

        Raises:
            ValueError: Another number of tensors, or other shapes. Nothing is changed then.
        """
        wanted = {"step"} | {f"averages.{index}" for index in range(len(self.averages))}
        if set(state) != wanted:
            raise ValueError(
                f"state must hold step and {len(self.averages)} averages, but has {len(state)} entries: "
                f"{', '.join(sorted(set(state) ^ wanted)[:5])} missing or unknown. Load it for the same parameters."
            )
        loaded = [torch.as_tensor(state[f"averages.{index}"]) for index in range(len(self.averages))]
        move_towards(self.averages, loaded, 0)
        self.step = int(state["step"])


def _pairs(averages: Iterable[Tensor], parameters: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Both, side by side, after a check of all of them: a failure leaves every tensor as it was."""
    first, second = list(averages), list(parameters)
    if len(first) != len(second):
        raise ValueError(f"averages and parameters must be as many, but there are {len(first)} and {len(second)}.")
    for index, (average, parameter) in enumerate(zip(first, second, strict=True)):
        checks.same_shape(f"parameters[{index}]", parameter, f"averages[{index}]", average)
    return list(zip(first, second, strict=True))
