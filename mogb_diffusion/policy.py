"""The three policies of a run in one transformer: current (trains), old (draws rollouts), reference (frozen start).

With LoRA they are two sets of adapters and none; with full fine-tuning three sets of weights, which may be spread over
the ranks (:mod:`mogb_diffusion.sharding`). Outside of the context
managers the current policy is active, and only its parameters ever require a gradient. The old policy goes through the
same layers in the same dtype as the current one, so that equal weights give equal velocities to the bit.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mogb_diffusion import config, sharding
from mogb_diffusion.distributed import Ranks
from mogb_diffusion.errors import InputError
from mogb_diffusion.policy_schedule import move_towards
from mogb_diffusion.seeds import keyed_generator

CURRENT, OLD = "default", "old"  # of the adapters; PEFT and diffusers call the first one default, too


class TrainedPolicy(ABC):
    """What the trainer needs to know of a policy.

    Attributes:
        names: Of the parameters in training.
        parameters: The parameters in training.
    """

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]

    def __init__(self) -> None:
        self._inside = ""

    @contextmanager
    def old(self) -> Iterator[None]:
        """Within the block the transformer is the old policy."""
        with self._switched("old"):
            yield

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within the block the transformer is the reference."""
        with self._switched("reference"):
            yield

    @contextmanager
    def _switched(self, name: str) -> Iterator[None]:
        if self._inside:
            raise RuntimeError(f"The {self._inside} policy is active: leave its with block before entering {name}().")
        self._inside = name
        try:
            self._enter(name)
            yield
        finally:
            self._leave(name)
            self._inside = ""

    @abstractmethod
    def _enter(self, name: str) -> None: ...

    @abstractmethod
    def _leave(self, name: str) -> None: ...

    @property
    @abstractmethod
    def old_parameters(self) -> tuple[Tensor, ...]:
        """Those of the old policy, in the order of :attr:`parameters`."""

    def move_old(self, decay: float) -> None:
        """Old <- decay * old + (1 - decay) * current."""
        move_towards(self.old_parameters, self.parameters, decay)

    def tensors(self) -> dict[str, Tensor]:
        """Current and old weights, for a checkpoint."""
        current = {f"current.{name}": param.detach() for name, param in zip(self.names, self.parameters, strict=True)}
        old = {f"old.{name}": param.detach() for name, param in zip(self.names, self.old_parameters, strict=True)}
        return current | old

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what :meth:`tensors` gave.

        Raises:
            InputError: Weights of another policy.
        """
        wanted = self.tensors()
        given = {name: tensor for name, tensor in tensors.items() if name.startswith(("current.", "old."))}
        if set(given) != set(wanted) or any(given[name].shape != wanted[name].shape for name in given):
            raise InputError("The saved weights are those of another policy: use the configuration of their run.")
        for name, tensor in given.items():
            wanted[name].copy_(sharding.part_of(tensor, wanted[name]))

    def gathered(self, keep: bool) -> dict[str, Tensor] | None:
        """The whole current weights, where they are spread over the ranks; None where every rank has them.

        All ranks take part. One that does not ``keep`` them gets empty tensors.
        """
        return None

    @abstractmethod
    def export(self, pipeline: Any, folder: Path, whole: Mapping[str, Tensor] | None = None) -> None:
        """Writes the current weights in the form that diffusers loads; those of :meth:`gathered`, where given."""


class LoraPolicy(TrainedPolicy):
    """Adapters of PEFT in a diffusers transformer.

    Args:
        transformer: Frozen; gets two sets of adapters, of equal weights.
        choice: Rank, alpha and targets.
        seed: Of the adapters' first weights.

    Raises:
        InputError: No layer of the transformer is a target.
    """

    def __init__(self, transformer: Any, choice: config.Policy, seed: int) -> None:
        super().__init__()
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer

        ends = tuple(f".{target}" for target in choice.targets)
        if not any(
            name.endswith(ends) for name, module in transformer.named_modules() if isinstance(module, nn.Linear)
        ):
            raise InputError(f"policy.targets: no layer of the transformer ends in {', '.join(choice.targets)}.")
        self.lora = LoraConfig(
            r=choice.rank, lora_alpha=choice.alpha, init_lora_weights="gaussian",  # type: ignore[arg-type]
            target_modules=list(choice.targets),
        )  # fmt: skip
        self._transformer = transformer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_generator(seed, "lora").initial_seed())
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # two sets are meant
                for name in (CURRENT, OLD):
                    self._transformer.add_adapter(self.lora, name)
        self._layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
        found = {name: param for name, param in transformer.named_parameters() if "lora_" in name}
        for param in found.values():  # adapters train in float32 or wider whatever the dtype of the frozen weights
            param.data = param.data.to(torch.promote_types(param.dtype, torch.float32))
        mine = {name: param for name, param in found.items() if f".{CURRENT}." in name}
        self.names = tuple(name.replace(f".{CURRENT}.", ".") for name in mine)
        self.parameters = tuple(mine.values())
        self._old = tuple(found[name.replace(f".{CURRENT}.", f".{OLD}.")] for name in mine)
        self._activate(CURRENT)
        self.move_old(0)

    @property
    def old_parameters(self) -> tuple[Tensor, ...]:
        return self._old

    def _enter(self, name: str) -> None:
        self._activate(OLD if name == "old" else None)

    def _leave(self, name: str) -> None:
        self._activate(CURRENT)

    def _activate(self, adapter: str | None) -> None:
        for layer in self._layers:
            layer.enable_adapters(adapter is not None)
            if adapter is not None:
                layer.set_adapter(adapter)
        for param in self.parameters:  # PEFT changes these as a side effect of both calls
            param.requires_grad_(True)
        for param in self._old:
            param.requires_grad_(False)

    def export(self, pipeline: Any, folder: Path, whole: Mapping[str, Tensor] | None = None) -> None:
        """``pytorch_lora_weights.safetensors``, with alpha: ``pipe.load_lora_weights(folder)`` has full strength."""
        from peft.utils import get_peft_model_state_dict

        weights = get_peft_model_state_dict(self._transformer, adapter_name=CURRENT)
        metadata = self.lora.to_dict()
        metadata["target_modules"] = sorted(metadata["target_modules"])
        pipeline.save_lora_weights(
            folder, transformer_lora_layers={name: tensor.contiguous() for name, tensor in weights.items()},
            transformer_lora_adapter_metadata=metadata,
        )  # fmt: skip


class FullPolicy(TrainedPolicy):
    """Every weight of the transformer trains; old and reference are copies that take their place.

    Args:
        transformer: Its parameters are kept in float32 or wider.
        ranks: The processes that its weights are spread over, one part each; None leaves them whole.
    """

    def __init__(self, transformer: nn.Module, ranks: Ranks | None = None) -> None:
        super().__init__()
        nn.Module.to(transformer, torch.promote_types(next(transformer.parameters()).dtype, torch.float32))
        for param in transformer.parameters():
            param.requires_grad_(True)
        self._kind: Any = type(transformer)
        self.is_spread = ranks is not None and ranks.size > 1
        if ranks is not None and self.is_spread:
            sharding.shard(transformer, ranks)
        named = dict(transformer.named_parameters())
        self.names, self.parameters = tuple(named), tuple(named.values())
        self._copies = {
            name: tuple(param.detach().clone() for param in self.parameters) for name in ("old", "reference")
        }
        self._transformer: Any = transformer

    @property
    def old_parameters(self) -> tuple[Tensor, ...]:
        return self._copies["old"]

    def _enter(self, name: str) -> None:
        self._exchange(name)

    def _leave(self, name: str) -> None:
        self._exchange(name)

    @torch.no_grad()
    def _exchange(self, name: str) -> None:
        if self.is_spread:  # gathered weights are copies of these very tensors, so that their contents change places
            sharding.unload(self._transformer)
            for param, copy in zip(self.parameters, self._copies[name], strict=True):
                mine, other = sharding.local_part(param), sharding.local_part(copy)
                kept = mine.clone()
                mine.copy_(other)
                other.copy_(kept)
            return
        for param, copy in zip(self.parameters, self._copies[name], strict=True):
            param.data, copy.data = copy.data, param.data

    def gathered(self, keep: bool) -> dict[str, Tensor] | None:
        if not self.is_spread:
            return None
        whole: dict[str, Tensor] = sharding.gathered(dict(self._transformer.state_dict()), keep)
        return whole

    def export(self, pipeline: Any, folder: Path, whole: Mapping[str, Tensor] | None = None) -> None:
        """``transformer/``, for ``SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")``."""
        module = self._transformer
        if whole is not None:
            with torch.device("meta"):
                module = self._kind.from_config(dict(self._transformer.config))
            module.load_state_dict(whole, assign=True)
        module.save_pretrained(folder / "transformer")


def make_policy(transformer: nn.Module, choice: config.Policy, seed: int, ranks: Ranks | None = None) -> TrainedPolicy:
    """The policy that a configuration names; with ranks, its weights are spread over them."""
    return LoraPolicy(transformer, choice, seed) if choice.kind == "lora" else FullPolicy(transformer, ranks)
