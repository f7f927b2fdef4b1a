"""What a configuration may say to others, and what one by others may do here.

The header of a LoRA comes with a file that anybody can have made. From it comes what builds the model and draws
pictures, and rewards of this package with plain options; never code, a path, an address or a token. In the other
direction nothing secret and no path of this machine leaves it in a header or on a page.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mogb_diffusion.config import Reward, Run, build, parse_yaml
from mogb_diffusion.errors import InputError
from mogb_diffusion.rewards import BUILT_IN

NO_REWARD = Reward(name="world_aesthetic", label="no reward")  # in the place of rewards that were not taken
_PLAIN_MODEL = ("source", "seed", "dtype", "device", "max_sequence_length", "resolution", "text_encoders")
_PLAIN_EVALUATION = ("images", "batch", "steps", "solver", "guidance")
_WORDS = ("metric", "dtype", "device", "scale")  # options of rewards whose texts name no file
_SECRET_KEY = re.compile(r"token(?!iz)|key|passw|secret|credential|auth|bearer", re.IGNORECASE)
_SECRET = re.compile(r"\b(hf_|gh[opsu]_|github_pat_|sk-|xox[abp]-|AKIA)\w{8,}|bearer\s+\S", re.IGNORECASE)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE = re.compile(r"\.(pt|pth|bin|ckpt|safetensors|onnx|json|jsonl|ya?ml|txt|csv)$", re.IGNORECASE)


def taken_run(config: Any, file: Path, *, other_model: bool = False) -> tuple[Run, list[str]]:
    """The part of a header's configuration that is taken, and what was left out.

    Args:
        config: As in the header.
        file: It is from, for messages.
        other_model: Whether the user names the model.

    Raises:
        InputError: The header is none of ours, or its model is a path.
    """
    if not isinstance(config, Mapping) or not isinstance(config.get("model", {}), Mapping):
        raise InputError(f"{file}: the configuration in its header is none: name one with --recipe.")
    dropped: list[str] = []
    plain: dict[str, Any] = {key: config[key] for key in ("name", "seed", "policy", "sampling") if key in config}
    plain["model"] = _part(config.get("model"), _PLAIN_MODEL)
    source = plain["model"].get("source", "tiny")
    if other_model:
        plain["model"]["source"] = "tiny"
    elif source not in ("tiny", "tiny-random") and not is_hub_name(source):
        raise InputError(
            f"{file}: its header names the model {source!r}, which is no name on the hub, and a path is not taken from "
            "a header: say where it is with --set model.source=PATH, or name a configuration with --recipe."
        )
    evaluation = config.get("evaluation")
    plain["evaluation"] = _part(evaluation, _PLAIN_EVALUATION)
    tests = evaluation if isinstance(evaluation, Mapping) else {}
    plain["evaluation"]["prompts"] = _prompts(tests.get("prompts"), "evaluation.prompts", dropped)
    plain["evaluation"]["rewards"] = _rewards(tests.get("rewards"), dropped)
    plain["rewards"] = _rewards(config.get("rewards"), dropped) or [{"name": NO_REWARD.name, "label": NO_REWARD.label}]
    plain["prompts"] = _prompts(config.get("prompts"), "prompts", dropped) or [{"format": "world"}]
    try:
        return build(Run, plain), dropped
    except InputError as error:
        raise InputError(f"{file}: the configuration in its header: {error} Name another one with --recipe.") from None


def reward_keys(config: Any) -> list[str]:
    """What a configuration calls the rewards that are trained; only texts."""
    rewards = config.get("rewards") if isinstance(config, Mapping) else None
    named = [item for item in _items(rewards) if isinstance(item.get("name"), str)]
    return [str(item.get("label") or item["name"].rpartition(":")[2]) for item in named]


def is_hub_name(source: Any) -> bool:
    """Whether it can only mean a repository on the hub: ``owner/name``, and no file of this machine."""
    return isinstance(source, str) and bool(_HUB_NAME.fullmatch(source)) and not _is_path(source)


def shareable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without tokens, keys and addresses, and with files by their names alone."""
    found: dict[str, Any] = scrubbed(config)
    for part in (found, found.get("evaluation")):
        for prompts in _items(part.get("prompts")) if isinstance(part, dict) else []:
            if isinstance(prompts.get("path"), str):
                prompts["path"] = file_name(prompts["path"])
    return found


def scrubbed(value: Any) -> Any:
    """Plain values without secrets and addresses; paths become file names.

    Entries of mappings and lists that must not be told are left out; a text alone becomes ``...``.
    """
    if isinstance(value, Mapping):
        kept = {key: item for key, item in value.items() if not (_is_secret(key, item) or _is_hidden(item))}
        return {key: scrubbed(item) for key, item in kept.items()}
    if isinstance(value, list | tuple):
        return [scrubbed(item) for item in value if not _is_hidden(item)]
    if isinstance(value, str):
        return "..." if _is_hidden(value) else file_name(value) if _is_path(value) else value
    return value


def shareable_assignment(assignment: str) -> str:
    """A ``key=value`` of a command line, as it may be told."""
    path, _, text = assignment.partition("=")
    key = path.rpartition(".")[2]
    given = {key: parse_yaml(text, f"--set {path}")}
    told = scrubbed(given)
    if told == given:
        return assignment
    return f"{path}={told[key]}" if isinstance(told.get(key), str) else f"{path}=..."


def file_name(text: str) -> str:
    """The last part of a path, of whichever system."""
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1]


def _is_secret(key: Any, value: Any) -> bool:
    """An entry whose key speaks of a secret; weights of rewards are none, whatever their names."""
    return bool(_SECRET_KEY.search(str(key))) and not (isinstance(value, bool | float) or value is None)


def _is_hidden(value: Any) -> bool:
    return isinstance(value, str) and bool(_ADDRESS.search(value) or _SECRET.search(value))


def _is_path(text: str) -> bool:
    """Whether a text names a file rather than a word, a sentence or a repository."""
    if not text.strip() or "\n" in text or len(text) > 1000:
        return False
    if re.match(r"[/\\~.]|[A-Za-z]:[/\\]", text):
        return True
    if "/" not in text and "\\" not in text:
        return False
    try:
        exists = Path(text).exists()
    except (OSError, ValueError):
        exists = False
    return exists or "\\" in text or bool(_FILE.search(text)) or (text.count("/") > 1 and " " not in text)


def _part(config: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: config[name] for name in names if name in config} if isinstance(config, Mapping) else {}


def _items(found: Any) -> list[Any]:
    return [item for item in found if isinstance(item, Mapping)] if isinstance(found, list | tuple) else []


def _prompts(given: Any, where: str, dropped: list[str]) -> list[dict[str, Any]]:
    """Those of the tiny world: a path is not taken."""
    kept = []
    for item in _items(given):
        if item.get("path") is None and item.get("format") == "world":
            kept.append(_part(item, ("format", "kind", "split", "count", "weight")))
        else:
            dropped.append(f"{where} of a file")
    return kept


def _rewards(given: Any, dropped: list[str]) -> list[dict[str, Any]]:
    """Those of this package, with options that are numbers or known words; a label must not be another's name."""
    kept = []
    for item in _items(given):
        name, label = item.get("name"), item.get("label")
        if not isinstance(name, str) or name not in BUILT_IN or name == "remote":
            dropped.append(f"the reward {str(name)[:80]!r}")
            continue
        taken = _part(item, ("name", "weight", "specialist", "batch_size"))
        if (
            isinstance(label, str)
            and label.isprintable()
            and ":" not in label
            and (label not in BUILT_IN or name in (label, f"world_{label}"))
        ):
            taken["label"] = label
        options = item.get("options")
        options = options if isinstance(options, Mapping) else {}
        taken["options"] = {key: value for key, value in options.items() if _is_plain(key, value)}
        if others := sorted(repr(str(key)[:40]) for key in options if key not in taken["options"]):
            dropped.append(f"{', '.join(others)} of the reward {name!r}")
        kept.append(taken)
    return kept


def _is_plain(key: Any, value: Any) -> bool:
    if isinstance(value, bool | int | float) or value is None:
        return True
    return key in _WORDS and isinstance(value, str) and bool(re.fullmatch(r"[a-z0-9_:]+", value))
