r"""How much memory a run takes on each GPU, and for prompts in main memory, from shapes alone.

Bytes of a forward pass that the backward pass needs, per picture and block of ``SD3Transformer2DModel`` with adapters
on its joint attention. S and T are its image and text tokens, D its width, h its heads, r the rank, c the bytes of a
number in the dtype of the computation, n the bytes in which layer norms keep their input (4, but 2 under a CPU's
autocast), and q those in which RMSNorm does (4 in float32; 6 in half precision: the input and its float32 copy):

===============  ===================================================================================================
attention        :math:`4 (S + T) D c + 4 (S + T) h` (query, key, value, output; the log-sum-exp), as fused kernels do
adapters' input  :math:`a (S + T) D c + (S + T') D c`, a = 1 in float32, 3 in half precision: autocast casts thrice
adapters         :math:`r (4 S + 3 T + T') c`
query, key norm  :math:`2 (S + T) (D q + 4 h)`
layer norms      :math:`2 (S + T') D n`, and :math:`T D n` in the last block
feed-forward     :math:`4 (S + T') D c`
second attention :math:`4 S D c + 4 S h + 2 S (D q + 4 h)`, in dual blocks
===============  ===================================================================================================

with :math:`T' = T`, except in the last block, whose text ends there (:math:`T' = 0`). The first block gets pictures
without gradient: one layer norm of each stream and its second attention keep nothing. With gradient checkpointing, the
block's inputs :math:`(S + T) D c` remain, and one whole block. All of it is tested against what PyTorch really keeps.

Where every weight trains, there are no adapters, nothing of the first block is without gradient, and a block keeps
:math:`(S + T') D (7 c + 2 n) + 2 (S + T) D c` more (the inputs of both layers of the feed-forward, what scales and
gates multiply, and what RMSNorm does; :math:`T D n` more in the last), and :math:`(a + 4) S D c` in dual blocks.

What libraries take for themselves (the CUDA context, workspaces of convolutions, gaps of the allocator) comes on top:
leave a tenth free.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from mogb_diffusion import config
from mogb_diffusion.models import architectures

GIB = 2**30
REMEMBERED = 256  # embeddings of prompts, unless all of them are
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Parameters of what is not trained; tested against the architectures.
TEXT_ENCODERS = {"text_encoder": 123_650_304, "text_encoder_2": 694_659_840, "text_encoder_3": 4_762_310_656}
AUTOENCODER = 83_819_683
NETWORKS = {"ViT-H/14 of PickScore": 986_109_441, "ViT-H/14 of HPSv2.1": 986_109_441, "ViT-L/14": 427_616_513,
            "Mask2Former": 68_741_083}  # fmt: skip
REWARDS = {
    "pickscore": ("ViT-H/14 of PickScore",),
    "hpsv2": ("ViT-H/14 of HPSv2.1",),
    "clip": ("ViT-L/14",),
    "clipscore": ("ViT-L/14",),
    "aesthetic": ("ViT-L/14",),
    "geneval": ("Mask2Former", "ViT-L/14"),
}
WITHOUT_NETWORK = ("ocr", "world_preference", "world_aesthetic", "world_alignment", "world_text", "world_composition")
SUMMED_MODES = (*config.SUM_MODES, *config.CONSTANT_MODES)


@dataclass(frozen=True)
class Shape:
    """What the memory of a transformer depends on.

    Attributes:
        layers: Blocks.
        width: D.
        heads: h.
        image_tokens: S.
        text_tokens: T.
        dual: The numbers of the blocks with a second attention.
        rms_norm: Whether queries and keys are normalized.
        parameters: Of the transformer, without adapters.
        trained: Of one set of adapters; all of them where every weight trains.
        rank: Of the adapters; 0 where every weight trains.
        text_width: Of the embedding of a token of a prompt.
        pooled_width: Of the pooled embedding of a prompt.
    """

    layers: int
    width: int
    heads: int
    image_tokens: int
    text_tokens: int
    dual: tuple[int, ...]
    rms_norm: bool
    parameters: int
    trained: int
    rank: int
    text_width: int = 4096
    pooled_width: int = 2048


@dataclass(frozen=True)
class Part:
    """Something that takes memory.

    Attributes:
        name: What it is.
        size: Bytes.
        when: ``always``, or the phase that needs it: ``training``, ``sampling`` or ``encoding``.
    """

    name: str
    size: float
    when: str = "always"


@dataclass(frozen=True)
class Estimate:
    """The memory of a run on one GPU.

    Attributes:
        parts: What takes it.
        unknown: Rewards whose networks are not known here.
    """

    parts: tuple[Part, ...]
    unknown: tuple[str, ...] = ()

    def phase(self, name: str) -> float:
        """Bytes while a phase lasts."""
        return sum(part.size for part in self.parts if part.when in ("always", name))

    @property
    def peak(self) -> float:
        """Bytes in the phase that needs most."""
        return max(self.phase(name) for name in ("training", "sampling", "encoding"))


def estimate(run: config.Run, shape: Shape, *, ranks: int = 1, on_gpu: bool = True) -> Estimate:
    """The memory of a run.

    Args:
        run: The configuration.
        shape: Of its transformer.
        ranks: Processes: more than one exchange gradients, from one flat copy. With ``model.shard`` they share what
            trains, and its copies.
        on_gpu: Where it runs; autocast differs, and so does where rewards with ``device: auto`` are.
    """
    width, side = BYTES[run.model.dtype], run.model.resolution or 0
    trained = max(4, width) * shape.trained / (ranks if run.model.shard else 1)
    micro, sampled = run.batch.micro_batch, run.batch.sampling_batch or run.batch.micro_batch
    doubled = 2 if run.sampling.guidance > 1 else 1
    narrow = width if width == 2 else 4
    away = run.model.text_encoders != "resident"
    encoders = narrow * sum(TEXT_ENCODERS.values())
    rows = kept_rows(run) * trained * (2 if ranks > 1 else 1)
    networks, unknown = reward_networks(run, on_gpu)
    parts = (
        *_policies(run, shape, trained, ranks),
        Part("AdamW", 2 * trained),
        Part("autoencoder, float32", 4 * AUTOENCODER),
        Part("text encoders", encoders, "encoding" if away else "always"),
        *(Part(name, size, when) for name, size, when in networks),
        Part("gradient", trained, "training"),
        *((Part(f"gradients of {len(run.rewards)} rewards", rows, "training"),) if rows else ()),
        Part(f"activations of {micro} pictures", kept_activations(run, shape, on_gpu=on_gpu), "training"),
        Part("working memory of a pass", micro * working(shape, width), "training"),
        Part(f"sampling of {sampled} pictures", doubled * sampled * working(shape, width), "sampling"),
        Part("decoding of them", sampled * decoding(side), "sampling"),
    )
    return Estimate(parts, unknown)


def _policies(run: config.Run, shape: Shape, trained: float, ranks: int) -> tuple[Part, ...]:
    """The weights of the transformer: frozen with two sets of adapters, or three times all of them."""
    if run.policy.kind == "lora":
        kept = [Part(f"transformer, {run.model.dtype}", BYTES[run.model.dtype] * shape.parameters)]
        kept.append(Part("adapters, current and old", 2 * trained))
        averaged = "adapters"
    else:
        dtype = "float64" if run.model.dtype == "float64" else "float32"
        kept = [Part(f"transformer, {dtype}: current, old and reference", 3 * trained)]
        averaged = "weights"
        if run.model.shard and ranks > 1:
            kept.append(Part("gathered weights of two blocks", 2 * BYTES[dtype] * shape.parameters / shape.layers))
    return (*kept, *((Part(f"average of the {averaged}", trained),) if run.policy.ema else ()))


def embedding_bytes(run: config.Run, shape: Shape) -> int:
    """What the embedding of a prompt takes, in the dtype of the text encoders: T tokens, and what is pooled."""
    return BYTES[run.model.dtype] * (shape.text_tokens * shape.text_width + shape.pooled_width)


def main_memory(run: config.Run, shape: Shape, prompts: int, processes: int = 1) -> tuple[Part, ...]:
    """Main memory for prompts, of all processes on a machine; nothing where the text encoders are resident.

    Args:
        run: The configuration.
        shape: Of its transformer.
        prompts: How many different ones the run has, the empty one included.
        processes: On the machine: each has its own encoders and embeddings.
    """
    if run.model.text_encoders == "resident":
        return ()
    at_once = max(run.batch.groups, 128)  # of an epoch, or of a part of the evaluation
    kept = prompts if run.model.text_encoders == "precompute" else min(prompts, REMEMBERED + at_once)
    encoders = BYTES[run.model.dtype] * sum(TEXT_ENCODERS.values())
    embedding, of = embedding_bytes(run, shape), f", {processes} times" if processes > 1 else ""
    until = " until the prompts are encoded" if run.model.text_encoders == "precompute" else ""
    return (
        Part(f"text encoders{until}{of}", float(encoders * processes)),
        Part(f"{kept} prompts of {embedding / 1e6:.1f} MB{of}", float(kept * embedding * processes)),
    )


def kept_activations(run: config.Run, shape: Shape, *, on_gpu: bool = True) -> float:
    """Bytes that a micro-batch keeps for its backward pass."""
    half = BYTES[run.model.dtype] == 2
    blocks = [kept_by_block(shape, number, half=half, on_gpu=on_gpu) for number in range(shape.layers)]
    micro = run.batch.micro_batch
    casts = BYTES[run.model.dtype] * shape.trained if half else 0  # of the adapters' weights
    if run.model.gradient_checkpointing:
        tokens = shape.image_tokens + shape.text_tokens
        inputs = shape.layers * tokens * shape.width * BYTES[run.model.dtype]
        return micro * (inputs + max(blocks)) + casts / shape.layers
    last_norm = (1 if shape.rank else 2) * shape.image_tokens * shape.width * _norm_bytes(half, on_gpu)
    return micro * (sum(blocks) + last_norm) + casts


def kept_by_block(shape: Shape, number: int, *, half: bool, on_gpu: bool = True) -> float:
    """Bytes that one block keeps of one picture, as in the table above."""
    s, t, d, h = shape.image_tokens, shape.text_tokens, shape.width, shape.heads
    first, last = number == 0 and shape.rank > 0, number == shape.layers - 1
    after = 0 if last else t
    c, n = 2 if half else 4, _norm_bytes(half, on_gpu)
    normed = (d * (6 if half else 4) + 4 * h) if shape.rms_norm else 0
    kept = 4 * (s + t) * d * c + 4 * (s + t) * h
    kept += (3 if half else 1) * (s + t) * d * c + (s + after) * d * c
    kept += shape.rank * (4 * s + 3 * t + after) * c
    kept += 2 * (s + t) * normed
    kept += (2 * (s + after) + (t if last else 0) - (s + t if first else 0)) * d * n
    kept += 4 * (s + after) * d * c
    if number in shape.dual and not first:
        kept += 4 * s * d * c + 4 * s * h + 2 * s * normed
    if not shape.rank:
        scaled = 2 * c if shape.rms_norm else 0
        kept += (s + after) * d * (7 * c + 2 * n) + (s + t) * d * scaled + (t * d * n if last else 0)
        kept += s * d * ((5 if half else 3) * c + scaled) if number in shape.dual else 0
    return kept


def working(shape: Shape, width: int) -> float:
    """Bytes that a pass has in hand, per picture: the inside of a feed-forward layer twice, and three streams."""
    tokens = shape.image_tokens + shape.text_tokens
    return (8 * shape.image_tokens + 3 * tokens) * shape.width * width


def decoding(side: int, channels: int = 256) -> float:
    """Bytes that decoding has in hand, per picture: three float32 maps of full size, of the last width but one."""
    return 3 * channels * side * side * 4


def kept_rows(run: config.Run) -> int:
    """Gradients that are kept at once for balancing: one per reward, what is common, and the direction."""
    if run.balancing.mode in SUMMED_MODES or run.balancing.mode.startswith("single:"):
        return 0
    common = 1 if run.balancing.solved_on == "slope" or run.loss.kl_weight > 0 else 0
    return len(run.rewards) + common + 1


def reward_networks(run: config.Run, on_gpu: bool) -> tuple[tuple[tuple[str, float, str], ...], tuple[str, ...]]:
    """The networks of the rewards on this device, (name, bytes, when), each once; and rewards that are not known."""
    found: dict[tuple[str, str], tuple[str, float, str]] = {}
    unknown = []
    for reward in (*run.rewards, *run.evaluation.rewards):
        device = str(reward.options.get("device", "cpu"))
        if reward.name not in REWARDS:
            unknown += [] if reward.name in WITHOUT_NETWORK else [reward.key]
        elif device.startswith("cuda") or (device == "auto" and on_gpu):
            dtype = str(reward.options.get("dtype", "float32"))
            when = "sampling" if reward.options.get("offload") else "always"
            for network in REWARDS[reward.name]:
                size = BYTES[dtype] * NETWORKS[network]
                found[network, dtype] = (f"{network}, {dtype}", size, when)
    return tuple(found.values()), tuple(unknown)


def known_architecture(source: str) -> Mapping[str, Any] | None:
    """The configuration of the transformer of a pipeline, where it is known or lies in a folder; None otherwise."""
    import json
    from pathlib import Path

    if source == architectures.SD35_MEDIUM:
        return architectures.SD35_MEDIUM_TRANSFORMER
    path = Path(source) / "transformer" / "config.json"
    if path.exists():
        read = json.loads(path.read_text())
        return {key: value for key, value in read.items() if not key.startswith("_")}
    return None


def shape_of(run: config.Run, architecture: Mapping[str, Any]) -> Shape:
    """The shape of a run's transformer."""
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in architecture.items()
    }
    parameters, linears = _built(tuple(sorted(options.items())))
    ends = tuple(f".{target}" for target in run.policy.targets)
    rank = run.policy.rank if run.policy.kind == "lora" else 0
    trained = sum(rank * (into + out) for name, into, out in linears if name.endswith(ends)) if rank else parameters
    side = (run.model.resolution or 8 * int(options["sample_size"])) // 8 // int(options.get("patch_size", 2))
    heads = int(options["num_attention_heads"])
    return Shape(
        layers=int(options["num_layers"]), width=heads * int(options["attention_head_dim"]), heads=heads,
        image_tokens=side * side, text_tokens=architectures.CLIP_TOKENS + (run.model.max_sequence_length or 128),
        dual=tuple(options.get("dual_attention_layers", ())), rms_norm=options.get("qk_norm") == "rms_norm",
        parameters=parameters, trained=trained, rank=rank, text_width=int(options.get("joint_attention_dim", 4096)),
        pooled_width=int(options.get("pooled_projection_dim", 2048)),
    )  # fmt: skip


@cache
def _built(options: tuple[tuple[str, Any], ...]) -> tuple[int, tuple[tuple[str, int, int], ...]]:
    """Parameters, and (name, inputs, outputs) of every linear layer, of a transformer that holds no numbers."""
    from torch import nn

    transformer = architectures.build_transformer(dict(options))
    linears = tuple(
        (f".{name}", module.in_features, module.out_features)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
    )
    return sum(param.numel() for param in transformer.parameters()), linears


def _norm_bytes(half: bool, on_gpu: bool) -> int:
    return 2 if half and not on_gpu else 4
