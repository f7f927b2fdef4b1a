"""What a run, a LoRA or a recipe gives to draw pictures with: a model and its weights, and no reward.

A LoRA of this package carries its configuration in the header of its file (:data:`HEADER`), so that the folder alone
says which model it belongs to and how its pictures were drawn. A header is not trusted, as a folder of a run is: see
:mod:`mogb_diffusion.headers` for what is taken from it.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mogb_diffusion import checkpoint as checkpoint_files
from mogb_diffusion.config import Run, from_yaml, load_run, override, to_plain
from mogb_diffusion.errors import InputError
from mogb_diffusion.headers import file_name, reward_keys, shareable, taken_run
from mogb_diffusion.models.sd3 import SD3Model, find_device, load_model
from mogb_diffusion.policy import TrainedPolicy, make_policy
from mogb_diffusion.policy_schedule import ParameterEMA

CONFIG, WEIGHTS, HEADER = "config.yaml", "pytorch_lora_weights.safetensors", "mogb_diffusion"
_ADAPTER = "default"


@dataclass(frozen=True, eq=False)
class Trained:
    """A model with trained weights.

    Attributes:
        name: For tables.
        folder: Where results go; None for a recipe's base model.
        run: The configuration.
        model: What draws.
        policy: Of a run; None for a LoRA, and for a base model.
        weights: Within this block the model draws with the trained weights, averaged where there is an average.
        base: Within this block it draws without them.
        epoch: When the weights were saved; None if nobody knows.
        step: The same, in optimizer steps.
        changed: Whether there are trained weights.
        header: What a LoRA says about itself; empty for one that says nothing, None for a run and a base model.
    """

    name: str
    folder: Path | None
    run: Run
    model: SD3Model
    policy: TrainedPolicy | None
    weights: Callable[[], AbstractContextManager[None]]
    base: Callable[[], AbstractContextManager[None]]
    epoch: int | None = None
    step: int | None = None
    changed: bool = True
    header: Mapping[str, Any] | None = None

    @property
    def imported(self) -> str | None:
        """Where a LoRA that was made elsewhere comes from, as far as it says; None for one of this package."""
        if self.header is None or ("config" in self.header and "imported" not in self.header):
            return None
        return file_name(str(self.header.get("imported", "")))[:200] or "elsewhere"

    @property
    def described(self) -> dict[str, Any]:
        """The configuration that the weights were trained with, or are said to be, as it may be told to others."""
        if self.header is not None and isinstance(self.header.get("config"), Mapping):
            return shareable(self.header["config"])
        return shareable(to_plain(self.run))


@dataclass(frozen=True)
class Source:
    """Where a model's weights are, before anything is loaded.

    Attributes:
        kind: ``run``, ``lora`` or ``base``.
        folder: Of the run or of the LoRA; None for a base model.
        run: The configuration.
        name: For tables.
        checkpoint: Of a run; None is the newest whole one.
        file: Of a LoRA.
        epoch: Of a LoRA, as its header says.
        step: The same, in optimizer steps.
        header: What a LoRA says about itself; nothing of it is trusted.
        from_header: Whether the configuration is the part of the header's that is taken.
        dropped: What was left out of it.
    """

    kind: str
    folder: Path | None
    run: Run
    name: str
    checkpoint: str | None = None
    file: Path | None = None
    epoch: int | None = None
    step: int | None = None
    header: Mapping[str, Any] = field(default_factory=dict)
    from_header: bool = False
    dropped: tuple[str, ...] = ()

    @property
    def trained_on(self) -> list[str] | None:
        """Names of rewards, those of a LoRA as it says; None where nobody knows."""
        if self.kind == "base":
            return []
        if self.kind == "run":
            return list(self.run.reward_names)
        is_own = isinstance(self.header.get("config"), Mapping) and "imported" not in self.header
        return reward_keys(self.header["config"]) if is_own else None

    def load(self, local_rank: int = 0, tell: Callable[[str], None] = print) -> Trained:
        """Loads the model and its weights.

        Raises:
            InputError: Something cannot be loaded.
            CheckpointError: The checkpoint is damaged.
        """
        if self.dropped:
            tell(
                f"{self.name}: not taken from its header: {'; '.join(dict.fromkeys(self.dropped))}. Ask for it with "
                "--recipe FILE, or for rewards with --metrics and --option."
            )
        model = load_model(self.run.model, find_device(self.run.model.device, local_rank))
        if self.kind == "run":
            return _from_run(self, model, tell)
        if self.kind == "lora":
            return _from_lora(self, model)
        return Trained(self.name, None, self.run, model, None, nullcontext, nullcontext, changed=False)


def find_source(
    target: str,
    *,
    checkpoint: str | None = None,
    recipe: str | None = None,
    assignments: tuple[str, ...] | list[str] = (),
    device: str | None = None,
    recipes: bool = False,
) -> Source:
    """What a word on the command line means: a folder of a run, a checkpoint in one, a LoRA, or a recipe.

    Args:
        target: The word.
        checkpoint: Of a run, such as ``checkpoint-000040``.
        recipe: The configuration of a LoRA that carries none: a recipe or a file.
        assignments: Changes of the configuration, such as ``evaluation.guidance=4.5``.
        device: Another one than that of the configuration.
        recipes: Whether a recipe or a YAML file means its base model.

    Raises:
        InputError: Nothing of the kind; the message says what is missing.
    """
    from mogb_diffusion.recipes import RECIPES

    path = Path(target)
    parent = path.parent if path.name.startswith(checkpoint_files.PREFIX) else path
    for folder, name in ((path, checkpoint), (parent, path.name)):
        if (folder / CONFIG).exists():
            run = from_yaml((folder / CONFIG).read_text(encoding="utf-8"), str(folder / CONFIG))
            title = folder.resolve().name + (f"/{name}" if name else "")
            return Source("run", folder, _adjusted(run, assignments, device), title, name)
    if (file := _lora_file(path)) is not None:
        return _lora_source(file, recipe, assignments, device)
    if recipes and (target in RECIPES or path.suffix in (".yaml", ".yml")):
        run = load_run(target, assignments)
        return Source("base", None, _adjusted(run, (), device), run.name)
    if (path / "adapter_config.json").exists() or (path / "lora").is_dir():
        raise InputError(f"{target} is a checkpoint of PEFT: bring it here first with mogb-diffusion import-peer.")
    other = "LoRA or recipe" if recipes else "LoRA"
    raise InputError(f"{target} is no folder of a run: it has no {CONFIG}. It is no {other} either.")


def read_header(file: Path) -> dict[str, Any]:
    """What a LoRA of this package says about itself; empty for another one.

    Raises:
        InputError: The file is damaged, or no safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as opened:
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read as safetensors: {' '.join(str(error).split())}.") from None
    try:
        found = json.loads(metadata.get(HEADER, "{}"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{file}: the entry {HEADER!r} of its header is no JSON object.")
    return found


def write_header(file: Path, found: dict[str, Any]) -> None:
    """Adds :data:`HEADER` to a safetensors file; tensors and other entries stay as they are."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(str(file), "pt") as opened:
        metadata = dict(opened.metadata() or {})
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no dict
    staging = file.with_suffix(".new")
    save_file(tensors, str(staging), metadata=metadata | {HEADER: json.dumps(found)})
    staging.replace(file)


def header_of(trained: Trained) -> dict[str, Any]:
    """What a LoRA says about itself: configuration, epoch, step, and where it was imported from, if it was.

    Tokens, addresses and paths of this machine are left out.
    """
    found = {"config": trained.described, "epoch": trained.epoch, "step": trained.step}
    return found if trained.imported is None else found | {"imported": trained.imported}


def _from_run(source: Source, model: SD3Model, tell: Callable[[str], None]) -> Trained:
    assert source.folder is not None
    state = _state(source.folder, source.checkpoint, tell)
    policy = make_policy(model.transformer, source.run.policy, source.run.seed)
    policy.load(state["policy"])
    average = None
    if source.run.policy.ema:
        average = ParameterEMA(policy.parameters, source.run.policy.ema)
        average.load_state_dict(state["ema"])
    return Trained(
        source.name, source.folder, source.run, model, policy, nullcontext if average is None else average.applied,
        policy.reference, int(state["epoch"]), int(state["step"]),
    )  # fmt: skip


def _state(folder: Path, name: str | None, tell: Callable[[str], None]) -> dict[str, Any]:
    if name is not None:
        if not (folder / name).is_dir():
            names = ", ".join(path.name for path in checkpoint_files.found(folder)) or "none"
            raise InputError(f"{folder} has no {name}. There are: {names}.")
        return checkpoint_files.load(folder / name)
    if (last := checkpoint_files.newest(folder, tell)) is None:
        raise InputError(f"{folder} has no whole checkpoint yet.")
    return last[1]


def _from_lora(source: Source, model: SD3Model) -> Trained:
    from peft.utils import set_peft_model_state_dict

    assert source.file is not None
    transformer = model.pipeline.transformer
    try:
        model.pipeline.load_lora_weights(str(source.file.parent), weight_name=source.file.name, adapter_name=_ADAPTER)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{source.file} does not fit {source.run.model.source!r}: {reason}") from None
    found = {name: param for name, param in transformer.named_parameters() if ".lora_" in name}
    if not found:
        raise InputError(f"{source.file} changes no layer of {source.run.model.source!r}: it is of another model.")
    for param in found.values():  # float32 or wider, as in training, whatever the dtype of the frozen weights
        param.requires_grad_(False)
        param.data = param.data.to(torch.promote_types(param.dtype, torch.float32))
    weights = {key.removeprefix("transformer."): tensor for key, tensor in _tensors(source.file).items()}
    set_peft_model_state_dict(transformer, weights, adapter_name=_ADAPTER)

    @contextmanager
    def base() -> Iterator[None]:
        transformer.disable_adapters()
        try:
            yield
        finally:
            transformer.enable_adapters()

    return Trained(
        source.name, source.folder, source.run, model, None, nullcontext, base, source.epoch, source.step,
        header=source.header,
    )  # fmt: skip


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(str(file))


def _lora_source(file: Path, recipe: str | None, assignments: Any, device: str | None) -> Source:
    header = read_header(file)
    dropped: list[str] = []
    if recipe is not None:
        run = load_run(recipe)
    elif "config" in header:
        other = any(assignment.partition("=")[0].strip() == "model.source" for assignment in assignments)
        run, dropped = taken_run(header["config"], file, other_model=other)
    else:
        raise InputError(f"{file} does not say which model it belongs to: name a configuration with --recipe.")
    name = file.parent.name if file.name == WEIGHTS else file.stem
    return Source(
        "lora", file.parent, _adjusted(run, assignments, device), name, None, file,
        _count(header.get("epoch")), _count(header.get("step")), header, recipe is None, tuple(dropped),
    )  # fmt: skip


def _count(given: Any) -> int | None:
    return given if isinstance(given, int) and not isinstance(given, bool) else None


def _lora_file(path: Path) -> Path | None:
    if path.suffix == ".safetensors" and path.is_file():
        return path
    return path / WEIGHTS if (path / WEIGHTS).is_file() else None


def _adjusted(run: Run, assignments: Any, device: str | None) -> Run:
    run = override(run, assignments) if assignments else run
    return replace(run, model=replace(run.model, device=device)) if device else run
