"""The shapes of models whose weights are elsewhere: what is built without them, on any device, ``meta`` included.

Everything here is what the configuration files of the published models say.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

SD35_MEDIUM = "stabilityai/stable-diffusion-3.5-medium"

# SD3Transformer2DModel; latents are 128 x 128 at 1024 pixels and 64 x 64 at 512.
SD35_MEDIUM_TRANSFORMER: Mapping[str, Any] = MappingProxyType(
    {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    }
)

# AutoencoderKL
SD35_AUTOENCODER: Mapping[str, Any] = MappingProxyType(
    {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
)

# CLIPTextModelWithProjection (OpenAI's ViT-L/14 and OpenCLIP's ViT-bigG/14) and T5EncoderModel (T5 v1.1 XXL).
SD35_TEXT_ENCODERS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "text_encoder": {
            "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768, "hidden_act": "quick_gelu",
        },
        "text_encoder_2": {
            "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
            "num_attention_heads": 20, "max_position_embeddings": 77, "projection_dim": 1280, "hidden_act": "gelu",
        },
        "text_encoder_3": {
            "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
            "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        },
    }
)  # fmt: skip
CLIP_TOKENS = 77  # before the T5 tokens, of which there are model.max_sequence_length

# CLIPModel: what PickScore and HPSv2.1 (ViT-H/14), CLIPScore, the aesthetic score and GenEval's colours (ViT-L/14) run.
CLIP_VIT_H: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "text_config": {
            "vocab_size": 49408, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "max_position_embeddings": 77,
        },
        "vision_config": {
            "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
            "patch_size": 14, "image_size": 224,
        },
    }
)  # fmt: skip
CLIP_VIT_L: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "text_config": {
            "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "max_position_embeddings": 77,
        },
        "vision_config": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "patch_size": 14, "image_size": 224,
        },
    }
)  # fmt: skip


def build_transformer(config: Mapping[str, Any] = SD35_MEDIUM_TRANSFORMER, device: str = "meta") -> Any:
    """The transformer of these shapes, with random weights, or with none on ``meta``."""
    import torch
    from diffusers import SD3Transformer2DModel

    with torch.device(device):
        transformer: Any = SD3Transformer2DModel(**config)
    return transformer.requires_grad_(False)
