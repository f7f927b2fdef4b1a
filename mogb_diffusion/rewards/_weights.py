"""Where the weights of a reward lie: on its device, or on the CPU between calls."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mogb_diffusion.errors import InputError


class Weights:
    """A frozen network that is on its device while it is used.

    With ``offload`` its weights lie on the CPU between calls, so that several rewards, or a reward and the model that
    is trained, take turns on one GPU. They are read only: each call copies them to the device, and nothing back.

    Args:
        model: The network, on the CPU.
        device: Where it runs.
        offload: Whether it leaves the device after each call.

    Raises:
        InputError: ``offload`` is neither True nor False.
    """

    def __init__(self, model: nn.Module, device: torch.device, offload: bool = False) -> None:
        if not isinstance(offload, bool):
            raise InputError(f"offload must be true or false, but got {offload!r}.")
        self.device = device
        self.offload = offload
        self.model: Any = model.eval().requires_grad_(False)
        if not offload:
            self.model.to(device)
        self.dtype: torch.dtype = next(self.model.parameters()).dtype
        self._places: list[tuple[Any, str, Tensor]] = [
            (held, name, tensor)
            for module in self.model.modules()
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]
        self._users = 0  # rewards that share the weights score in threads of their own
        self._lock = threading.Lock()

    @contextmanager
    def on_device(self) -> Iterator[Any]:
        """The network, on its device until the last user is done; may be nested."""
        self._enter()
        try:
            yield self.model
        finally:
            self._leave()

    def _enter(self) -> None:
        with self._lock:
            if self.offload and self._users == 0:
                try:
                    self._unpack()
                except BaseException:  # the device is full: leave nothing there
                    self._park()
                    raise
            self._users += 1

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self.offload and self._users == 0:
                self._park()

    def _unpack(self) -> None:
        copies: dict[Tensor, Tensor] = {}  # shared weights stay shared
        for held, name, home in self._places:
            if home not in copies:
                moved = home.detach().to(self.device)
                copies[home] = nn.Parameter(moved, requires_grad=False) if isinstance(home, nn.Parameter) else moved
            held[name] = copies[home]

    def _park(self) -> None:
        for held, name, home in self._places:
            held[name] = home
