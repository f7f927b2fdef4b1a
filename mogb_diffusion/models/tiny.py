r"""Stable Diffusion 3 in miniature: a true ``StableDiffusion3Pipeline`` of 2.3 million parameters for the tiny world.

Every part is the class that the big model uses: ``SD3Transformer2DModel`` (4 layers, 4 heads of 32), two CLIP text
encoders, ``FlowMatchEulerDiscreteScheduler``, an autoencoder. Three of them are simpler than what they stand for:

- The text encoders are random and stay so. Their embeddings are of unit size: with CLIP's own initialization (0.02)
  the words are nearly the same.
- The autoencoder does nothing: latents are pixels, :math:`z = (x - 0.8) / 0.4` of :math:`x \in [-1, 1]`, so that they
  have about the mean and variance of the noise. It is an ``AutoencoderTiny`` without blocks, whose few convolutions
  are set by hand; its tanh and ReLU are kept where they are linear (largest error 1e-4 in float32).
- There is no T5. The pipeline puts ``max_sequence_length`` zero tokens in its place, 256 unless told otherwise, which
  this model never saw and which cost four times as much: always pass :data:`MAX_SEQUENCE_LENGTH`.

Saved with ``save_pretrained``, it is loaded with
``StableDiffusion3Pipeline.from_pretrained(directory, text_encoder_3=None, tokenizer_3=None)``: diffusers wants both
named. It warns that the autoencoder is none of the usual class, which is harmless.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mogb_diffusion.world.vocabulary import TOKENS

try:
    from diffusers import (
        AutoencoderTiny,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast
except ImportError as error:
    raise ImportError(f"The tiny model needs {error.name}. Install it with: pip install 'mogb[diffusion]'") from error

IMAGE_SIZE = 16
MAX_SEQUENCE_LENGTH = 1  # zero tokens in the place of T5
TEXT_LENGTH = 16  # tokens of CLIP
WEIGHTS = Path(__file__).with_name("tiny_weights") / "base.safetensors"
LATENT_MEAN, LATENT_SPREAD = 0.8, 0.4  # of pixels in [-1, 1]

_PAD, _BOS, _UNKNOWN, _EOS = _SPECIAL = ("<pad>", "<bos>", "<unknown>", "<eos>")  # <eos> must not be 2: see _encoder
_LEARNED = ("transformer", "text_encoder", "text_encoder_2")
_TEXT_WIDTH = 32  # of each text encoder
_VAE_SCALE = 100.0  # shrinks the latents within the autoencoder to where tanh is linear
_VAE_BIAS = 2.0  # lifts the pixels above the kink of ReLU


def build(seed: int = 0) -> StableDiffusion3Pipeline:
    """The pipeline with random weights, the same for the same seed. Those of the text encoders fit in float16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline: Any = StableDiffusion3Pipeline(
            transformer=_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=_identity_autoencoder(),
            text_encoder=_text_encoder(),
            tokenizer=_tokenizer(),
            text_encoder_2=_text_encoder(),
            tokenizer_2=_tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
        )
    pipeline.set_progress_bar_config(disable=True)
    for model in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        model.eval().requires_grad_(False)
    return pipeline


def _transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=IMAGE_SIZE,
        patch_size=2,
        in_channels=3,
        out_channels=3,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=32,
        caption_projection_dim=128,
        joint_attention_dim=2 * _TEXT_WIDTH,
        pooled_projection_dim=2 * _TEXT_WIDTH,
        pos_embed_max_size=IMAGE_SIZE // 2,
        qk_norm="rms_norm",
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """Words, single capitals and quotation marks."""
    ids = {token: index for index, token in enumerate((*_SPECIAL, *TOKENS))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex('[A-Z"]'), behavior="isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A {_EOS}", special_tokens=[(_BOS, ids[_BOS]), (_EOS, ids[_EOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TEXT_LENGTH,
        pad_token=_PAD,
        bos_token=_BOS,
        unk_token=_UNKNOWN,
        eos_token=_EOS,
    )


@torch.no_grad()
def _text_encoder() -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(_SPECIAL) + len(TOKENS),
        hidden_size=_TEXT_WIDTH,
        projection_dim=_TEXT_WIDTH,
        intermediate_size=2 * _TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        pad_token_id=_SPECIAL.index(_PAD),
        bos_token_id=_SPECIAL.index(_BOS),
        eos_token_id=_SPECIAL.index(_EOS),  # transformers reads 2 as "the largest id", for the sake of old files
    )
    encoder = CLIPTextModelWithProjection(config)
    for name, parameter in encoder.named_parameters():
        if "token_embedding" in name:
            parameter.normal_(std=1.0)
        elif "position_embedding" in name:
            parameter.normal_(std=0.7)
        elif parameter.ndim == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
        parameter.copy_(parameter.half().float())
    return encoder


@torch.no_grad()
def _identity_autoencoder() -> AutoencoderTiny:
    vae: Any = AutoencoderTiny(
        encoder_block_out_channels=(3,),
        decoder_block_out_channels=(3,),
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
        latent_channels=3,
        scaling_factor=_VAE_SCALE,
        shift_factor=0.0,
    )
    scale = LATENT_SPREAD * _VAE_SCALE  # pixels are scale * latents of the autoencoder + LATENT_MEAN
    first, second = (layer for layer in vae.encoder.layers if isinstance(layer, nn.Conv2d))
    _set_pointwise(first, 1.0, 0.0)  # the encoder is given (pixels + 1) / 2
    _set_pointwise(second, 2 / scale, (-1 - LATENT_MEAN) / scale)
    first, second = (layer for layer in vae.decoder.layers if isinstance(layer, nn.Conv2d))
    _set_pointwise(first, scale, LATENT_MEAN + _VAE_BIAS)
    _set_pointwise(second, 0.5, 0.5 - _VAE_BIAS / 2)  # the decoder returns 2 * this - 1
    return vae


def _set_pointwise(layer: Any, weight: float, bias: float) -> None:
    layer.weight.zero_()
    for channel in range(3):
        layer.weight[channel, channel, 1, 1] = weight
    layer.bias.fill_(bias)


def save_weights(
    pipeline: StableDiffusion3Pipeline, path: str | Path, *, transformer: Mapping[str, Tensor] | None = None
) -> None:
    """Writes what differs between two of these pipelines, in float16: the transformer and the text encoders.

    Args:
        pipeline: A pipeline of :func:`build`.
        path: A ``.safetensors`` file.
        transformer: Other parameters to write than those of the pipeline, such as an average of them.
    """
    from safetensors.torch import save_file

    parts = {name: dict(getattr(pipeline, name).named_parameters()) for name in _LEARNED}
    if transformer is not None:
        parts["transformer"] = dict(transformer)
    tensors = {
        f"{part}.{name}": value.detach().half().contiguous() for part in _LEARNED for name, value in parts[part].items()
    }
    save_file(tensors, str(path))


def load(path: str | Path | None = None) -> StableDiffusion3Pipeline:
    """The pre-trained base model, in float32.

    Args:
        path: A file of :func:`save_weights`; None: the base that comes with the package.
    """
    from safetensors.torch import load_file

    saved = load_file(str(WEIGHTS if path is None else path))
    pipeline = build()
    with torch.no_grad():
        for part in _LEARNED:
            parameters = dict(getattr(pipeline, part).named_parameters())
            names = {name.removeprefix(f"{part}.") for name in saved if name.startswith(f"{part}.")}
            if names != set(parameters):
                raise ValueError(f"{path} does not hold the weights of this model: {part} has other parameters.")
            for name, parameter in parameters.items():
                parameter.copy_(saved[f"{part}.{name}"])
    return pipeline


def to_latents(images: Tensor) -> Tensor:
    """Images in [0, 1] as the latents that the transformer sees; exactly what the autoencoder computes."""
    return (2 * images - 1 - LATENT_MEAN) / LATENT_SPREAD


class MatmulAttention:
    """Joint attention as two plain matrix products, for ``transformer.set_attn_processor(MatmulAttention())``.

    The same numbers as diffusers' own processor up to rounding. On a CPU the fused attention of torch has a very slow
    backward pass in bfloat16 at these small sizes; on a GPU keep the default.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The outputs for image and text tokens, ``[B, N, C]`` each; one tensor if there is no text."""
        if attention_mask is not None:
            raise ValueError("MatmulAttention knows no attention mask: SD3 attends to every token.")
        projections = [(attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None)]
        parts = [[_heads(layer(hidden_states), attn.heads, norm) for layer, norm in projections]]
        if encoder_hidden_states is not None:
            added = [
                (attn.add_q_proj, attn.norm_added_q),
                (attn.add_k_proj, attn.norm_added_k),
                (attn.add_v_proj, None),
            ]
            parts.append([_heads(layer(encoder_hidden_states), attn.heads, norm) for layer, norm in added])
        query, key, value = (torch.cat(tokens, dim=2) for tokens in zip(*parts, strict=True))
        attended = (
            torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, dim=-1).to(value.dtype) @ value
        )
        attended = attended.transpose(1, 2).flatten(2)
        image = attn.to_out[1](attn.to_out[0](attended[:, : hidden_states.shape[1]]))
        if encoder_hidden_states is None:
            return image
        text = attended[:, hidden_states.shape[1] :]
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def _heads(projected: Tensor, heads: int, norm: nn.Module | None) -> Tensor:
    split = projected.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, heads, tokens, width]
    return split if norm is None else norm(split)
