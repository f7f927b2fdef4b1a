"""Whether a run can start here: weights, disk, prompts and rewards, without asking the network for anything."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mogb_diffusion import config, memory
from mogb_diffusion.errors import InputError
from mogb_diffusion.models import architectures

GIB = 2**30
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")
HUB = "https://huggingface.co"
ASK_SERVERS = ("remote", "unifiedreward")


@dataclass(frozen=True)
class Weights:
    """Something published that a run reads.

    Attributes:
        source: A hub name, or a path.
        purpose: What it is for.
        file: The one that is read; empty for a whole repository.
        licence: In a few words; empty where it is not known here.
        size: Bytes to fetch, where known.
        gated: Its page asks for consent before anything can be fetched.
        weighty: It has weights, not a tokenizer and settings alone.
    """

    source: str
    purpose: str
    file: str = ""
    licence: str = ""
    size: float = 0.0
    gated: bool = False
    weighty: bool = True

    @property
    def where(self) -> str:
        """The folder or file where it lies here; empty if it does not."""
        path = Path(self.source).expanduser()
        if self.is_local or path.exists():
            return str(path) if path.exists() else ""
        return _in_cache(self)

    @property
    def is_local(self) -> bool:
        """Whether it is named as a path, and not as something of the hub."""
        return self.source.startswith((".", "/", "~")) or self.source.count("/") > 1 or (
            self.source.endswith(WEIGHT_FILES)
        )  # fmt: skip

    @property
    def remedy(self) -> str:
        """How to get it."""
        if self.is_local:
            return f"put it at {self.source}"
        fetch = f"hf download {self.source}{f' {self.file}' if self.file else ''}"
        if self.gated:
            return f"accept its licence at {HUB}/{self.source}, then: hf auth login; {fetch}"
        return f"{fetch}   ({HUB}/{self.source})"


def pipeline_weights(choice: config.Model) -> Weights | None:
    """Those of the pipeline; None where they are in the package."""
    if choice.source in ("tiny", "tiny-random") or choice.source.endswith(".safetensors"):
        return None
    if choice.source != architectures.SD35_MEDIUM:
        return Weights(choice.source, "pipeline")
    size = 2.0 * (2_243_171_520 + sum(memory.TEXT_ENCODERS.values()) + memory.AUTOENCODER)
    return Weights(choice.source, "pipeline", licence="Stability AI Community", size=size, gated=True)


def reward_weights(reward: config.Reward) -> tuple[Weights, ...]:
    """Those of a reward with the options that it has; none for rewards that are not known here."""
    given, name = reward.options, reward.key
    vit_h, vit_l = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openai/clip-vit-large-patch14"
    sizes = {key: 4.0 * value for key, value in memory.NETWORKS.items()}
    large = Weights(str(given.get("clip" if reward.name == "geneval" else "model", vit_l)), name, licence="MIT",
                    size=sizes["ViT-L/14"])  # fmt: skip
    if reward.name == "pickscore":
        return (
            Weights(str(given.get("model", "yuvalkirstain/PickScore_v1")), name, licence="MIT",
                    size=sizes["ViT-H/14 of PickScore"]),
            Weights(str(given.get("tokenizer", vit_h)), f"{name}, tokenizer", licence="MIT", weighty=False),
        )  # fmt: skip
    if reward.name in ("clip", "clipscore"):
        return (large,)
    if reward.name == "hpsv2":
        own = given.get("weights")
        file = Weights(str(own), name) if own else Weights(
            "xswu/HPSv2", name, "HPS_v2.1_compressed.pt", "Apache-2.0", sizes["ViT-H/14 of HPSv2.1"] / 2
        )  # fmt: skip
        shape = Weights(str(given.get("config", vit_h)), f"{name}, settings and tokenizer", licence="MIT",
                        weighty=False)  # fmt: skip
        return (file, shape)
    if reward.name == "aesthetic":
        head = str(given.get("weights") or "./sac+logos+ava1-l14-linearMSE.pth")
        return (Weights(head, name, licence="Apache-2.0"), large)
    if reward.name == "imagereward":
        own = given.get("weights")
        return (
            Weights(str(own), name) if own else Weights("THUDM/ImageReward", name, "ImageReward.pt", "Apache-2.0"),
            Weights(str(given.get("tokenizer", "bert-base-uncased")), f"{name}, tokenizer",
                    licence="Apache-2.0", weighty=False),
        )  # fmt: skip
    if reward.name == "geneval":
        detector = str(given.get("model", "facebook/mask2former-swin-small-coco-instance"))
        return (Weights(detector, name, licence="as on its page", size=sizes["Mask2Former"]), large)
    return ()


def _in_cache(weights: Weights) -> str:
    """The snapshot of a repository in the hub's cache, if it holds what is read; no network is used."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return ""
    if weights.file:
        found = try_to_load_from_cache(weights.source, weights.file)
        return found if isinstance(found, str) else ""
    for mark in ("model_index.json", "config.json", "tokenizer_config.json", "tokenizer.json", "vocab.json"):
        found = try_to_load_from_cache(weights.source, mark)
        if isinstance(found, str):
            folder = Path(found).parent
            return str(folder) if not weights.weighty or _is_whole(folder) else ""
    return ""


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot has weights: a pipeline in each of its parts."""
    import json

    index = folder / "model_index.json"
    parts = [folder]
    if index.exists():
        named = json.loads(index.read_text())
        networks = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
        parts = [folder / name for name in networks if isinstance(named.get(name), list) and named[name][0]]
    return all(
        part.is_dir() and any(path.suffix in WEIGHT_FILES and path.exists() for path in part.iterdir())
        for part in parts
    )


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Within the block the hub's libraries look into their cache alone."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants = sys.modules.get("huggingface_hub.constants")
    was = getattr(constants, "HF_HUB_OFFLINE", None)
    if constants is not None:
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
        if constants is not None:
            constants.HF_HUB_OFFLINE = was  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Tried:
    """What became of a reward.

    Attributes:
        name: Of the reward.
        report: In one line.
        specialist: It applies to some prompts only.
        fails: It could not score, although nothing that it reads is missing.
    """

    name: str
    report: str
    specialist: bool = False
    fails: bool = False


def try_reward(reward: config.Reward, pictures: int = 4) -> Tried:
    """Lets a reward score built-in pictures, if what it reads is there."""
    from mogb_diffusion.rewards import load
    from mogb_diffusion.rewards.throughput import measure
    from mogb_diffusion.scoring import is_specialist

    name, special = reward.key, bool(reward.specialist)
    if reward.name in ASK_SERVERS:
        return Tried(name, "asks a server, which is not tried here", special)
    if lacking := [weights.source for weights in reward_weights(reward) if not weights.where]:
        return Tried(name, f"not tried: {', '.join(lacking)} missing", special)
    try:
        with offline():
            made = load(reward.name, **reward.options)
            special = is_specialist(reward, made)
            measured = measure(made, pictures=pictures)
    except InputError as error:
        return Tried(name, str(error), special, fails=True)
    except Exception as error:  # of somebody's own reward: anything
        reason = " ".join(str(error).split())[:200]
        return Tried(name, f"fails: {type(error).__name__}: {reason}", special, fails=True)
    scores = " ".join(f"{score:.3f}" for score in measured.scores.tolist())
    return Tried(name, f"{measured.pictures_per_second:.1f} pictures/s; built-in pictures score {scores}", special)


def missing_prompts(sources: Sequence[config.Prompts]) -> list[tuple[str, str]]:
    """The files of prompts that do not exist, with what to do."""
    missing = []
    for source in sources:
        if source.path is not None and not Path(source.path).exists():
            own = "DiffusionNFT's file of this name" if source.format == "geneval" else (
                "a file with one prompt a line, such as DiffusionNFT's of this name"
            )  # fmt: skip
            drawn = _draw_command(source)
            missing.append((source.path, f"{own}, or {drawn}" if drawn else own))
    return list(dict.fromkeys(missing))


def _draw_command(source: config.Prompts) -> str:
    """The command that draws prompts of a kind; empty where there is none."""
    path = Path(str(source.path))
    kind = "geneval" if source.format == "geneval" else "ocr" if "ocr" in path.parts else ""
    if not kind:
        return ""
    command = f"mkdir -p {path.parent}; mogb-diffusion prompts {kind} --out {path}"
    if "test" not in path.name:
        return f"{command} --n 2000"
    return f"{command} --n 500 --seed 1 --apart-from {path.with_name(path.name.replace('test', 'train'))}"


def checkpoint_bytes(run: config.Run, trained: int) -> float:
    """What the checkpoints of a run take on disk at most, one more than are kept while it is written."""
    copies = 2 + 2 + 1 + (1 if run.policy.ema else 0)  # current and old; AdamW; the export; the average
    kept = run.checkpoints.keep_last or -(-run.epochs // max(run.checkpoints.every, 1))
    return (kept + 1) * copies * 4.0 * trained


def free_bytes(folder: Path) -> float:
    """What is free on the disk that a folder is or would be on."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return float(shutil.disk_usage(folder).free)


def local_ranks() -> int:
    """The processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_main_memory() -> float | None:
    """Bytes of main memory that programs can still have; None where this system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return None


def check_embeddings(prompts: int, size: float, processes: int) -> None:
    """Whether the embeddings of prompts have room in main memory; silent where it is unknown how much is free.

    Args:
        prompts: How many are kept.
        size: Bytes of each.
        processes: On this machine: each keeps all of them.

    Raises:
        InputError: They have none.
    """
    need, free = prompts * size * processes, free_main_memory()
    if free is not None and need > free:
        shared = f" in each of {processes} processes" if processes > 1 else ""
        raise InputError(
            f"model.text_encoders: precompute keeps {prompts} prompts of {size / 1e6:.1f} MB{shared}, "
            f"{need / 1e9:.1f} GB of main memory, and {free / 1e9:.1f} GB are free: set it to offload."
        )


def hub_cache() -> Path:
    """Where the hub's libraries keep what they fetch."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return Path.home()
    where: Any = constants.HF_HUB_CACHE
    return Path(where)
