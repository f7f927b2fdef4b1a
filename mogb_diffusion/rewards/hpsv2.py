"""HPSv2.1: human preference score (Wu et al., 2023, arXiv 2306.09341), from the original checkpoint file.

The file holds an OpenCLIP ViT-H/14. It is read without unpickling code, and its keys are mapped to transformers'.
"""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from mogb_diffusion.errors import InputError
from mogb_diffusion.rewards._clip import (
    Clip,
    Preprocessing,
    as_device,
    as_dtype,
    fetch,
    import_transformers,
    missing,
    read_checkpoint,
)
from mogb_diffusion.rewards._similarity import Similarity
from mogb_diffusion.rewards._weights import Weights

REPOSITORY, FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"

# OpenCLIP's names, without the tower and the number of the block, and transformers'.
_OUTSIDE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_INSIDE = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")


class HPSv2(Similarity):
    """The cosine between picture and prompt, without a factor.

    Args:
        weights: The checkpoint file (Apache-2.0 licence); None takes ``HPS_v2.1_compressed.pt`` of ``xswu/HPSv2`` from
            the hub or its cache.
        config: Whose architecture and tokenizer: a hub name or a folder.
        device: Where it runs.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        batch_size: Pictures at once.
        offload: Whether the weights lie on the CPU between calls.
    """

    preprocessing: ClassVar[Preprocessing] = "bicubic_pad"

    def __init__(
        self,
        weights: str | None = None,
        config: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 16,
        offload: bool = False,
    ) -> None:
        super().__init__(_load(weights, config, device, dtype, offload), 1.0, batch_size)


@cache
def _load(weights: str | None, config: str, device: str, dtype: str, offload: bool) -> Clip:
    transformers = import_transformers()
    try:
        words = transformers.AutoTokenizer.from_pretrained(config)
        architecture = transformers.CLIPConfig.from_pretrained(config)
    except (OSError, ValueError) as error:
        raise InputError(missing(config, error)) from error
    model = transformers.CLIPModel(architecture)
    given = from_open_clip(read_checkpoint(Path(weights) if weights is not None else fetch(REPOSITORY, FILE)))
    wrong = model.load_state_dict(given, strict=False)
    lost = [key for key in wrong.missing_keys if not key.endswith("position_ids")]
    if lost or wrong.unexpected_keys:
        raise InputError(
            f"The checkpoint of HPSv2 does not fit the architecture of {config!r}: missing {lost[:3]}, unexpected "
            f"{wrong.unexpected_keys[:3]}. Give the config that it was trained with."
        )
    return Clip(Weights(model.to(as_dtype(dtype)), as_device(device), offload), words)


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's weights under the names of ``transformers.CLIPModel``.

    Raises:
        InputError: A name that no OpenCLIP model has.
    """
    mapped: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == "attn_mask":
            continue
        if key in _OUTSIDE:
            mapped[_OUTSIDE[key]] = value
        elif key in _TRANSPOSED:
            mapped[_TRANSPOSED[key]] = value.T.contiguous()
        elif match := _BLOCK.fullmatch(key):
            visual, number, part, kind = match.groups()
            stem = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}."
            if part == "attn.in_proj":
                for name, third in zip("qkv", value.chunk(3), strict=True):
                    mapped[f"{stem}self_attn.{name}_proj.{kind}"] = third.contiguous()
            elif part in _INSIDE:
                mapped[f"{stem}{_INSIDE[part]}.{kind}"] = value
            else:
                raise InputError(f"The checkpoint holds {key!r}, which is no part of an OpenCLIP model.")
        else:
            raise InputError(f"The checkpoint holds {key!r}, which is no part of an OpenCLIP model.")
    return mapped
