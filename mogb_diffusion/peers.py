"""LoRAs that DiffusionNFT, Flow-GRPO and other users of PEFT have saved, in the form that diffusers loads in full.

Such a checkpoint is a folder ``checkpoints/checkpoint-N/lora/`` with ``adapter_config.json`` and
``adapter_model.safetensors``, whose keys begin with ``base_model.model.``. Given to ``pipe.load_lora_weights`` as it
is, it changes nothing, or works without its alpha. Nothing is unpickled but plain tensors.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mogb_diffusion.errors import InputError
from mogb_diffusion.trained import WEIGHTS

_CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", WEIGHTS, "adapter_model.bin", "adapter_model.pt", "pytorch_lora_weights.bin")
_PREFIXES = ("base_model.model.", "module.", "_orig_mod.", "transformer.")
_KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<which>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_NEEDED = ("r", "lora_alpha", "target_modules")
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq")  # initializations that change the weights of the model itself


@dataclass(frozen=True, eq=False)
class Peer:
    """A LoRA, understood.

    Attributes:
        source: The file of the weights.
        weights: ``transformer_blocks.0.attn.to_q.lora_A.weight`` and so on, as they were.
        options: Of PEFT's ``LoraConfig``: rank, alpha, target layers, and what differs by layer.
        base_model: Its name, if the checkpoint says so.
        step: Of the folder's name, if it has a number.
    """

    source: Path
    weights: dict[str, Tensor]
    options: dict[str, Any]
    base_model: str | None
    step: int | None

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that it changes."""
        return tuple(dict.fromkeys(key.rpartition(".lora_")[0] for key in self.weights))


def read_peer(path: Path, *, adapter: str | None = None, alpha: float | None = None) -> Peer:
    """Finds, reads and checks a LoRA.

    Args:
        path: A file, its folder, or a folder above it (``lora/``, ``checkpoints/``, the last ``checkpoint-N``).
        adapter: Which one, where there are several, such as ``old``.
        alpha: Where no configuration says it.

    Raises:
        InputError: Nothing is found, it is a pickle of more than tensors, its layout is unknown, or weights are missing
            or have another rank than the configuration says.
    """
    file = _find(path, adapter)
    layers = _by_layer(file, _read(file), adapter)
    given = _configuration(file)
    if given is None:
        if alpha is None:
            raise InputError(f"{file} comes without {_CONFIG}: say the alpha it was trained with, with --alpha.")
        [rank, *others] = {pair["A"].shape[0] for pair in layers.values() if "A" in pair} or {0}
        if others:
            raise InputError(f"{file} has layers of rank {rank} and {others[0]}: it needs its {_CONFIG}.")
        given = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(layers)}
    elif alpha is not None:
        raise InputError(f"--alpha {alpha:g}: {file} says its alpha itself, {given.get('lora_alpha')}.")
    options = _checked_options(file, given)
    _check_layers(file, layers, options)
    weights = {f"{layer}.lora_{which}.weight": layers[layer][which] for layer in layers for which in "AB"}
    if not isinstance(options["target_modules"], list):  # one pattern: the layers that it meant
        options["target_modules"] = sorted(layers)
    number = next((re.search(r"-(\d+)$", part) for part in reversed(file.parts) if re.search(r"-(\d+)$", part)), None)
    base = given.get("base_model_name_or_path")
    return Peer(
        file, weights, options, base if isinstance(base, str) and base else None, int(number[1]) if number else None
    )


def check_fit(peer: Peer, transformer: nn.Module, name: str) -> None:
    """That every layer exists in a transformer, with this size; on the meta device, too.

    Raises:
        InputError: One does not.
    """
    modules = dict(transformer.named_modules())
    for layer in peer.layers:
        module = modules.get(layer)
        if not isinstance(module, nn.Linear):
            raise InputError(f"{peer.source}: {name} has no layer {layer}: the LoRA is of another model.")
        wanted = (peer.weights[f"{layer}.lora_B.weight"].shape[0], peer.weights[f"{layer}.lora_A.weight"].shape[1])
        if wanted != (module.out_features, module.in_features):
            raise InputError(
                f"{peer.source}: {layer} is for a layer of {list(wanted)}, but that of {name} has "
                f"{[module.out_features, module.in_features]}: the LoRA is of another model."
            )


def write_peer(peer: Peer, out: Path) -> Path:
    """Writes :data:`~mogb_diffusion.trained.WEIGHTS`, with alpha and ranks, for ``pipe.load_lora_weights``."""
    from diffusers import StableDiffusion3Pipeline
    from peft import LoraConfig

    metadata = LoraConfig(**peer.options).to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])
    StableDiffusion3Pipeline.save_lora_weights(
        out, transformer_lora_layers={key: tensor.contiguous() for key, tensor in peer.weights.items()},
        transformer_lora_adapter_metadata=metadata,
    )  # fmt: skip
    return out / WEIGHTS


def _find(path: Path, adapter: str | None) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"{path} does not exist.")
    folder = path
    while (file := _weights_in(folder, adapter)) is None:
        numbered = sorted((int(match[1]), inner) for inner in folder.iterdir()
                          if (match := re.fullmatch(r"checkpoint-(\d+)", inner.name)) and inner.is_dir())  # fmt: skip
        deeper = [folder / name for name in ("lora", "checkpoints", "peft") if (folder / name).is_dir()]
        if not deeper and not numbered:
            raise InputError(f"{path} holds no LoRA: none of {', '.join(_FILES[:3])} is in it, in lora/ or below.")
        folder = deeper[0] if deeper else numbered[-1][1]
    return file


def _weights_in(folder: Path, adapter: str | None) -> Path | None:
    """PEFT saves the adapter ``default`` in the folder itself, and each other one in a folder of its name."""
    places = [folder / adapter] if adapter and adapter != "default" else [folder]
    found = [place / name for place in places for name in _FILES if (place / name).is_file()]
    if found:
        return found[0]
    named = sorted(inner for inner in folder.iterdir() if (inner / _CONFIG).is_file() and inner.name != "lora")
    if adapter is None and len(named) == 1:
        return _weights_in(named[0], None)
    if named:
        raise InputError(f"{folder} holds the adapters {', '.join(n.name for n in named)}: name one with --adapter.")
    return None


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if file.suffix == ".safetensors":
        try:
            return load_file(str(file))
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} cannot be read as safetensors: {' '.join(str(error).split())}.") from None
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # whatever a file that is no dictionary of tensors makes of it
        raise InputError(
            f"{file} is a pickle that holds more than tensors, or is damaged. It is not opened, because that could run "
            "code: save it again as safetensors where it comes from."
        ) from None
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise InputError(f"{file} is no dictionary of tensors.")
    return {str(key): tensor for key, tensor in found.items()}


def _by_layer(file: Path, tensors: Mapping[str, Tensor], adapter: str | None) -> dict[str, dict[str, Tensor]]:
    """The two matrices of every layer, of one adapter."""
    sorted_out: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        bare, before = key, ""
        while bare != before:
            before = bare
            for prefix in _PREFIXES:
                bare = bare.removeprefix(prefix)
        match = _KEY.fullmatch(bare)
        if match is None or tensor.ndim != 2:
            raise InputError(
                f"{file} has a layout that is not known: {key} {list(tensor.shape)}. Known are matrices "
                "<layer>.lora_A.weight and <layer>.lora_B.weight, as PEFT and diffusers write them."
            )
        pair = sorted_out.setdefault(match["adapter"] or "default", {}).setdefault(match["layer"], {})
        pair[match["which"]] = tensor
    if not sorted_out:
        raise InputError(f"{file} holds no tensor.")
    wanted = adapter or ("default" if "default" in sorted_out else None)
    if len(sorted_out) == 1:
        return next(iter(sorted_out.values()))
    if wanted not in sorted_out:
        raise InputError(f"{file} holds the adapters {', '.join(sorted(sorted_out))}: name one with --adapter.")
    return sorted_out[wanted]


def _configuration(file: Path) -> dict[str, Any] | None:
    """From ``adapter_config.json``, or from the head of a file that diffusers wrote."""
    path = file.parent / _CONFIG
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is no JSON: {error}.") from None
        if not isinstance(found, dict):
            raise InputError(f"{path} must hold an object.")
        return found
    if file.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(str(file), "pt") as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata")
    if text is None:
        return None
    return {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}


def _checked_options(file: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """What matters of a configuration of PEFT, of any version."""
    where = f"{file.parent / _CONFIG}"
    if missing := [name for name in _NEEDED if given.get(name) in (None, [], "")]:
        raise InputError(f"{where} does not say {' and '.join(missing)}.")
    if str(given.get("peft_type", "LORA")).upper() != "LORA":
        raise InputError(f"{where} is of the kind {given['peft_type']!r}, but only LORA can be imported.")
    refused = {name: given[name] for name in ("use_dora", "lora_bias", "modules_to_save", "layer_replication")
               if given.get(name)}  # fmt: skip
    if given.get("bias", "none") != "none":
        refused["bias"] = given["bias"]
    if str(given.get("init_lora_weights", "")).startswith(_CHANGE_BASE):
        refused["init_lora_weights"] = given["init_lora_weights"]
    if refused:
        told = ", ".join(f"{name}: {value!r}" for name, value in refused.items())
        raise InputError(f"{where} has {told}: such weights are more than a LoRA, and cannot be imported.")
    options = {name: given[name] for name in _NEEDED}
    for name in ("rank_pattern", "alpha_pattern", "use_rslora"):
        if given.get(name):
            options[name] = given[name]
    return options


def _check_layers(file: Path, layers: Mapping[str, Mapping[str, Tensor]], options: Mapping[str, Any]) -> None:
    from peft.utils.other import get_pattern_key

    ranks = options.get("rank_pattern", {})
    for layer, pair in layers.items():
        if missing := [which for which in "AB" if which not in pair]:
            raise InputError(f"{file}: {layer}.lora_{missing[0]}.weight is missing.")
        rank = ranks.get(get_pattern_key(list(ranks), layer), options["r"])
        found = (pair["A"].shape[0], pair["B"].shape[1])
        if found != (rank, rank):
            raise InputError(
                f"{file}: {layer} has the ranks {found[0]} (lora_A) and {found[1]} (lora_B), "
                f"but its configuration says {rank}."
            )
    targets = options["target_modules"]
    if isinstance(targets, list):
        unused = [t for t in targets if not any(layer == t or layer.endswith(f".{t}") for layer in layers)]
        if unused:
            raise InputError(f"{file}: its configuration names {', '.join(unused[:3])}, but it has no weights for it.")
    numbers = sorted({int(match[1]) for layer in layers if (match := re.search(r"blocks\.(\d+)\.", layer))})
    if numbers and (gaps := sorted(set(range(numbers[-1])) - set(numbers))):
        raise InputError(f"{file}: blocks 0 to {numbers[-1]} have weights, but {gaps[0]} has none.")
