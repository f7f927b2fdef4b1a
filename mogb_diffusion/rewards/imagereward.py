r"""ImageReward: human preference for a picture of a prompt (Xu et al., NeurIPS 2023, arXiv 2304.05977).

A BLIP reads the picture, then the prompt with cross-attention to it; a linear head of five layers reads the first token
h of the text, and the result is standardized:

.. math::  reward = (\mathrm{mlp}(h) - 0.1672) / 1.0333

The original checkpoint file is read without unpickling code, and its keys are mapped to transformers' BLIP modules. The
architecture follows from the shapes of the weights; heads are 64 wide in both towers, as in the published files.
"""

import re
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mogb_diffusion import checks
from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rewards._clip import (
    Pictures,
    as_device,
    as_dtype,
    bicubic_crop,
    fetch,
    import_transformers,
    linear_head,
    missing,
    read_checkpoint,
    score_in_batches,
)
from mogb_diffusion.rewards._weights import Weights

REPOSITORY, FILE = "THUDM/ImageReward", "ImageReward.pt"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_LENGTH = 35  # tokens of a prompt
TOKENS = ["[DEC]", "[ENC]"]  # BLIP's, after BERT's own
HEAD_WIDTH = 64

# Parts of the names in transformers' vision tower, and in the checkpoint.
_VISION = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "post_layernorm": "norm",
    "encoder.layers": "blocks",
    "self_attn.projection": "attn.proj",
    "self_attn.qkv": "attn.qkv",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
}
_VISION_PARTS = re.compile("|".join(re.escape(part) for part in _VISION))
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


class ImageReward:
    """The standardized score, about -2 to 2.

    Args:
        weights: The checkpoint file (Apache-2.0 licence); None takes ``ImageReward.pt`` of ``THUDM/ImageReward`` from
            the hub or its cache.
        tokenizer: BERT's: a hub name or a folder; BLIP's two tokens are added to it.
        device: Where it runs.
        dtype: Of BLIP: ``float32``, ``float16`` or ``bfloat16``; the head is in float32.
        batch_size: Pictures at once.
        offload: Whether the weights lie on the CPU between calls.

    Raises:
        InputError: Weights that are not there, or of another model; an impossible option.
    """

    def __init__(
        self,
        weights: str | None = None,
        tokenizer: str = "bert-base-uncased",
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 16,
        offload: bool = False,
    ) -> None:
        self.batch_size = checks.whole_number("batch_size", batch_size)
        self.weights, self.words, self._one_at_a_time = _load(weights, tokenizer, device, dtype, offload)

    @torch.no_grad()
    def __call__(self, images: Pictures, prompts: Sequence[Prompt]) -> Tensor:
        """The rewards ``[B]``, float32 on the CPU."""

        def score(part: slice) -> Tensor:
            pixels = bicubic_crop(images[part], self.weights.model.size, rounded=True)
            with self._one_at_a_time:
                tokens = self.words(
                    [prompt.text for prompt in prompts[part]],
                    padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt",
                )  # fmt: skip
            device = self.weights.device
            scored: Tensor = self.weights.model(
                pixels.to(device, self.weights.dtype), tokens["input_ids"].to(device),
                tokens["attention_mask"].to(device),
            )  # fmt: skip
            return (scored - MEAN) / STD

        with self.weights.on_device():
            return score_in_batches(len(prompts), self.batch_size, score)


class _Judge(nn.Module):
    """BLIP's vision tower, its text tower with cross-attention, and the head."""

    def __init__(self, state: Mapping[str, Tensor], transformers: Any) -> None:
        super().__init__()
        vision, text = _vision_sizes(state), _text_sizes(state)
        self.size = int(vision["image_size"])
        self.vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(**vision))
        self.text = transformers.BlipTextModel(transformers.BlipTextConfig(**text), add_pooling_layer=False)
        self.head = linear_head(state, "mlp.")

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """``[B, 3, S, S]``, ``[B, T]``, ``[B, T]`` -> ``[B]``."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=mask.dtype, device=mask.device),
        ).last_hidden_state  # fmt: skip
        scored: Tensor = self.head(read[:, 0].float())
        return scored.squeeze(-1)


def original_name(name: str) -> str:
    """What the checkpoint calls a parameter of ours."""
    tower, _, rest = name.partition(".")
    if tower == "vision":
        return "blip.visual_encoder." + _VISION_PARTS.sub(lambda found: _VISION[found[0]], rest)
    return f"blip.text_encoder.{rest}"


@cache
def _load(
    weights: str | None, tokenizer: str, device: str, dtype: str, offload: bool
) -> tuple[Weights, Any, threading.Lock]:
    transformers = import_transformers()
    try:
        words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise InputError(missing(tokenizer, error)) from error
    path = Path(weights) if weights is not None else fetch(REPOSITORY, FILE)
    state = read_checkpoint(path)
    judge = from_blip(state, str(path))
    words.add_tokens(TOKENS, special_tokens=True)
    if len(words) != judge.text.config.vocab_size:
        raise InputError(
            f"The tokenizer {tokenizer!r} has {len(words)} words with BLIP's two, but {path} was trained with "
            f"{judge.text.config.vocab_size}: give the tokenizer that it was trained with."
        )
    judge.vision.to(as_dtype(dtype))
    judge.text.to(as_dtype(dtype))
    return Weights(judge, as_device(device), offload), words, threading.Lock()


def from_blip(state: Mapping[str, Tensor], source: str = "the checkpoint") -> Any:
    """The network with the weights of a checkpoint in the original layout.

    Raises:
        InputError: Keys are missing, unknown, or of other shapes; the first ones are named.
    """
    try:
        judge = _Judge(state, import_transformers())
    except KeyError as error:
        raise InputError(f"{source} is no ImageReward: it has no {error.args[0]!r}.") from None
    towers = [name for name in judge.state_dict() if not name.startswith("head.") and not name.endswith("position_ids")]
    wanted = {original_name(name): name for name in towers}
    heads = {name for name in state if name.startswith("mlp.layers.")}
    lost = sorted(wanted.keys() - state.keys())
    extra = sorted(name for name in state.keys() - wanted.keys() - heads if not name.startswith(_UNUSED))
    if lost or extra:
        raise InputError(f"{source} is no ImageReward: missing {lost[:3] or 'none'}, unknown {extra[:3] or 'none'}.")
    own = judge.state_dict()
    for theirs, ours in wanted.items():
        if own[ours].shape != state[theirs].shape:
            raise InputError(
                f"{source} is no ImageReward: {theirs!r} has the shape {list(state[theirs].shape)}, not "
                f"{list(own[ours].shape)}."
            )
    judge.load_state_dict({ours: state[theirs] for theirs, ours in wanted.items()}, strict=False)
    return judge


def _vision_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    stem = "blip.visual_encoder."
    width, _, _, patch = state[stem + "patch_embed.proj.weight"].shape
    return {
        "hidden_size": width,
        "intermediate_size": state[stem + "blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _layers(state, stem + "blocks."),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "image_size": patch * round((state[stem + "pos_embed"].shape[1] - 1) ** 0.5),
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
    }


def _text_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    stem = "blip.text_encoder."
    vocabulary, width = state[stem + "embeddings.word_embeddings.weight"].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "encoder_hidden_size": state[stem + "encoder.layer.0.crossattention.self.key.weight"].shape[1],
        "intermediate_size": state[stem + "encoder.layer.0.intermediate.dense.weight"].shape[0],
        "num_hidden_layers": _layers(state, stem + "encoder.layer."),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "max_position_embeddings": state[stem + "embeddings.position_embeddings.weight"].shape[0],
        "layer_norm_eps": 1e-12,
        "is_decoder": True,  # it has cross-attention
    }


def _layers(state: Mapping[str, Tensor], stem: str) -> int:
    return 1 + max(int(name.removeprefix(stem).split(".")[0]) for name in state if name.startswith(stem))
