"""Tiny random weights in the hub's own formats: a pipeline like Stable Diffusion 3.5's, and the rewards' networks.

Every file is written by the library that the real ones are read with; only the sizes differ. The same seed gives the
same weights.
"""

import json
import re
from pathlib import Path

import torch
from torch import nn

CLIP_TOKENS = 77  # as in the real one
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789\"',.!?-"


def write_pipeline(folder, *, seed=0, side=128):
    """A ``StableDiffusion3Pipeline`` with every part that SD3.5 has, for pictures of ``side`` pixels."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoders = [_text_encoder(16, 12), _text_encoder(24, 20)]
        made = StableDiffusion3Pipeline(
            transformer=_transformer(side // 8, joint=48, pooled=32),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_autoencoder(),
            text_encoder=encoders[0],
            tokenizer=clip_tokenizer(folder / "words"),
            text_encoder_2=encoders[1],
            tokenizer_2=clip_tokenizer(folder / "words"),
            text_encoder_3=_t5(48),
            tokenizer_3=t5_tokenizer(folder / "pieces"),
        )
    made.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def _transformer(size, *, joint, pooled):
    """Dual attention in the first layers, RMS-normed queries and keys, several heads."""
    from diffusers import SD3Transformer2DModel

    made = SD3Transformer2DModel(
        sample_size=size, patch_size=2, in_channels=16, out_channels=16, num_layers=3, num_attention_heads=4,
        attention_head_dim=16, joint_attention_dim=joint, caption_projection_dim=64, pooled_projection_dim=pooled,
        pos_embed_max_size=24, dual_attention_layers=(0, 1), qk_norm="rms_norm",
    )  # fmt: skip
    return _livelier(made, 0.5)


@torch.no_grad()
def _livelier(module, spread):
    """Weights of the scale that trained ones have: a fresh model is nearly linear, and some of it is zero."""
    for param in module.parameters():
        if param.ndim >= 2:
            param.normal_(std=spread / param[0].numel() ** 0.5)
        else:
            param.add_(0.1 * torch.randn_like(param))
    return module


def _autoencoder():
    """Four levels, so that a latent stands for 8 x 8 pixels."""
    from diffusers import AutoencoderKL

    made = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=16, norm_num_groups=4,
        scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return _livelier(made, 1.5)


def _text_encoder(width, projection):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    size = len(_clip_vocabulary())
    config = CLIPTextConfig(
        vocab_size=size, hidden_size=width, projection_dim=projection, intermediate_size=2 * width,
        num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=CLIP_TOKENS, bos_token_id=size - 2,
        eos_token_id=size - 1, pad_token_id=size - 1,
    )  # fmt: skip
    return _livelier(CLIPTextModelWithProjection(config), 1.0)


def _t5(width):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(_pieces()) + 100, d_model=width, d_kv=12, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    made = T5EncoderModel(config)
    with torch.no_grad():
        for param in made.parameters():
            if param.ndim >= 2:
                param.normal_(std=param.shape[1] ** -0.5)
        made.shared.weight.normal_()
    return made


def _clip_vocabulary():
    plain, ends = list(LETTERS), [f"{letter}</w>" for letter in LETTERS]
    return [*plain, *ends, *("".join(pair) for pair in _merges()), "<|startoftext|>", "<|endoftext|>"]


def _merges():
    return [("t", "h"), ("th", "e</w>"), ("i", "n"), ("r", "e"), ("re", "d</w>"), ("o", "f</w>"), ("a", "n")]


def clip_tokenizer(folder):
    """CLIP's byte-pair tokenizer, from its two files."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: number for number, token in enumerate(_clip_vocabulary())}
    (folder / "vocab.json").write_text(json.dumps(ids))
    merges = "".join(f"{left} {right}\n" for left, right in _merges())
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=CLIP_TOKENS)


def _pieces():
    whole = ["▁a", "▁photo", "▁of", "▁red", "▁two", "▁sign", "▁the", "▁that", "▁says", "ing", "er"]
    return ["<pad>", "</s>", "<unk>", "▁", *whole, *LETTERS]


def t5_tokenizer(folder):
    """T5's unigram tokenizer, from its file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    scored = [(piece, -float(number) / 8) for number, piece in enumerate(_pieces())]
    made = Tokenizer(models.Unigram(scored, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    described = {"tokenizer_class": "T5TokenizerFast", "model_max_length": 512, "extra_ids": 100} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return T5TokenizerFast.from_pretrained(folder)


def write_clip(folder, *, seed=1, activation="quick_gelu"):
    """A ``CLIPModel`` with its tokenizer, as PickScore, CLIPScore and GenEval's colours take it."""
    from transformers import CLIPConfig, CLIPModel

    size = len(_clip_vocabulary())
    config = CLIPConfig(
        text_config={
            "vocab_size": size, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": CLIP_TOKENS, "bos_token_id": size - 2,
            "eos_token_id": size - 1, "pad_token_id": size - 1, "hidden_act": activation, "projection_dim": 12,
        },
        vision_config={
            "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
            "image_size": 32, "patch_size": 8, "hidden_act": activation, "projection_dim": 12,
        },
        projection_dim=12,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _livelier(CLIPModel(config), 1.0)
        with torch.no_grad():
            model.logit_scale.fill_(4.6052)
    model.save_pretrained(folder)
    clip_tokenizer(folder).save_pretrained(folder)
    return model


# transformers' names of a block's parts, and OpenCLIP's
_PARTS = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
_OTHERS = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.pre_layrnorm": "visual.ln_pre", "vision_model.post_layernorm": "visual.ln_post",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final", "logit_scale": "logit_scale",
}  # fmt: skip


def write_hpsv2(folder, *, seed=2):
    """HPSv2's checkpoint as its authors ship it: OpenCLIP's names in a file of torch, and the architecture apart."""
    model = write_clip(folder / "architecture", seed=seed, activation="gelu")
    held, state = model.state_dict(), {}
    for name, value in held.items():
        stem, kind = name.rpartition(".")[0], name.rpartition(".")[2]
        block = re.fullmatch(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)", stem)
        if block:
            tower, number, part = block.groups()
            prefix = f"{'visual.' * (tower == 'vision')}transformer.resblocks.{number}"
            if part in _PARTS:
                state[f"{prefix}.{_PARTS[part]}.{kind}"] = value
            elif part == "self_attn.q_proj":
                three = [held[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                state[f"{prefix}.attn.in_proj_{kind}"] = torch.cat(three)
        elif name in _OTHERS:
            state[_OTHERS[name]] = value
        elif stem in _OTHERS:
            state[f"{_OTHERS[stem]}.{kind}"] = value
        elif name == "visual_projection.weight":
            state["visual.proj"] = value.T
        elif name == "text_projection.weight":
            state["text_projection"] = value.T
    state = {name: value.clone().contiguous() for name, value in state.items()}
    path = folder / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 1, "state_dict": state}, path)
    return path, folder / "architecture"


def write_mask2former(folder, *, seed=3):
    """Mask2Former over Swin for COCO's 80 classes, sure of what it sees: most of it is wrong, but it varies."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, num_labels=80, hidden_dim=32, feature_size=32, mask_feature_size=32, num_queries=12,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, encoder_feedforward_dim=16,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Mask2FormerForUniversalSegmentation(config)
        with torch.no_grad():
            for module in model.model.pixel_level_module.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    module.weight.normal_(std=module.weight[0].numel() ** -0.5)
            model.class_predictor.weight.normal_(std=1.5)
    model.save_pretrained(folder)
    return Path(folder)
