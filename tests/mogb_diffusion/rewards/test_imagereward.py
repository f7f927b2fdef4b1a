"""ImageReward against a forward pass written from BLIP's formulas, on a tiny random file in the original layout."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rewards import load
from mogb_diffusion.rewards._clip import bicubic_crop
from mogb_diffusion.rewards.imagereward import from_blip

transformers = pytest.importorskip("transformers")
PIL = pytest.importorskip("PIL.Image")

SEEN, READ, BLOCKS = 192, 128, 2  # 3 and 2 heads of 64
PATCH, GRID = 4, 3
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "two", "blue", "squares", "of", "photo"]
PROMPTS = [Prompt("A red circle"), Prompt("two blue squares of a photo"), Prompt("a " * 60)]


def random_state(seed=0):
    """The keys and shapes of ImageReward.pt, with small sizes."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def linear(name, inside, outside):
        state[f"{name}.weight"] = torch.randn(outside, inside, generator=generator) / inside**0.5
        state[f"{name}.bias"] = 0.3 * torch.randn(outside, generator=generator)

    def norm(name, width):
        state[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.3 * torch.randn(width, generator=generator)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    state[f"{vision}.cls_token"] = torch.randn(1, 1, SEEN, generator=generator)
    state[f"{vision}.pos_embed"] = torch.randn(1, GRID**2 + 1, SEEN, generator=generator)
    state[f"{vision}.patch_embed.proj.weight"] = 0.3 * torch.randn(SEEN, 3, PATCH, PATCH, generator=generator)
    state[f"{vision}.patch_embed.proj.bias"] = torch.randn(SEEN, generator=generator)
    for number in range(BLOCKS):
        block = f"{vision}.blocks.{number}"
        norm(f"{block}.norm1", SEEN)
        linear(f"{block}.attn.qkv", SEEN, 3 * SEEN)
        linear(f"{block}.attn.proj", SEEN, SEEN)
        norm(f"{block}.norm2", SEEN)
        linear(f"{block}.mlp.fc1", SEEN, 100)
        linear(f"{block}.mlp.fc2", 100, SEEN)
    norm(f"{vision}.norm", SEEN)
    state[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
    state[f"{text}.embeddings.word_embeddings.weight"] = torch.randn(len(WORDS) + 2, READ, generator=generator)
    state[f"{text}.embeddings.position_embeddings.weight"] = torch.randn(40, READ, generator=generator)
    norm(f"{text}.embeddings.LayerNorm", READ)
    for number in range(BLOCKS):
        layer = f"{text}.encoder.layer.{number}"
        for attention, width in (("attention", READ), ("crossattention", SEEN)):
            linear(f"{layer}.{attention}.self.query", READ, READ)
            linear(f"{layer}.{attention}.self.key", width, READ)
            linear(f"{layer}.{attention}.self.value", width, READ)
            linear(f"{layer}.{attention}.output.dense", READ, READ)
            norm(f"{layer}.{attention}.output.LayerNorm", READ)
        linear(f"{layer}.intermediate.dense", READ, 90)
        linear(f"{layer}.output.dense", 90, READ)
        norm(f"{layer}.output.LayerNorm", READ)
    linear("blip.vision_proj", SEEN, 8)
    linear("blip.text_proj", READ, 8)
    for index, (inside, outside) in zip((0, 2, 4, 6, 7), ((READ, 12), (12, 9), (9, 7), (7, 5), (5, 1)), strict=True):
        linear(f"mlp.layers.{index}", inside, outside)
    return state


def forward(state, pixels, tokens, mask):
    """BLIP's image-grounded text encoder, in float64, from the papers' formulas."""
    state = {name: value.double() for name, value in state.items()}

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name, eps):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * state[f"{name}.weight"]
            + state[f"{name}.bias"]
        )

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def attend(query, key, value, allowed):
        heads = []
        for start in range(0, query.shape[-1], 64):
            q, k, v = (x[..., start : start + 64] for x in (query, key, value))
            likeness = q @ k.transpose(1, 2) / 8
            heads.append(likeness.masked_fill(~allowed[:, None, :], -math.inf).softmax(-1) @ v)
        return torch.cat(heads, -1)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    cut = pixels.double().unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [B, 3, G, G, P, P]
    patches = cut.permute(0, 2, 3, 1, 4, 5).reshape(len(pixels), GRID**2, -1)
    kernel = state[f"{vision}.patch_embed.proj.weight"].reshape(SEEN, -1)
    x = patches @ kernel.T + state[f"{vision}.patch_embed.proj.bias"]
    x = torch.cat([state[f"{vision}.cls_token"].expand(len(x), 1, -1), x], 1) + state[f"{vision}.pos_embed"]
    everything = torch.ones(x.shape[:2], dtype=torch.bool)
    for number in range(BLOCKS):
        block = f"{vision}.blocks.{number}"
        q, k, v = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").split(SEEN, dim=-1)
        x = x + linear(attend(q, k, v, everything), f"{block}.attn.proj")
        x = x + linear(gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    seen = norm(x, f"{vision}.norm", 1e-6)

    y = state[f"{text}.embeddings.word_embeddings.weight"][tokens]
    y = y + state[f"{text}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    y = norm(y, f"{text}.embeddings.LayerNorm", 1e-12)
    for number in range(BLOCKS):
        layer = f"{text}.encoder.layer.{number}"
        for attention, source, allowed in (("attention", None, mask.bool()), ("crossattention", seen, everything)):
            source = y if source is None else source
            q = linear(y, f"{layer}.{attention}.self.query")
            k, v = (linear(source, f"{layer}.{attention}.self.{name}") for name in ("key", "value"))
            y = norm(
                y + linear(attend(q, k, v, allowed), f"{layer}.{attention}.output.dense"),
                f"{layer}.{attention}.output.LayerNorm", 1e-12,
            )  # fmt: skip
        inner = linear(gelu(linear(y, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
        y = norm(y + inner, f"{layer}.output.LayerNorm", 1e-12)
    h = y[:, 0]
    for index in (0, 2, 4, 6, 7):
        h = linear(h, f"mlp.layers.{index}")
    return (h[:, 0] - 0.16717362830052426) / 1.0333394966054072


def tokens_by_hand():
    """Lower case, [CLS] words [SEP], cut and padded to 35."""
    rows = []
    for prompt in PROMPTS:
        words = prompt.text.lower().split()[:33]
        row = [2, *(WORDS.index(word) for word in words), 3]
        rows.append(row + [0] * (35 - len(row)))
    tokens = torch.tensor(rows)
    return tokens, (tokens != 0).long()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("imagereward")
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    transformers.BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path)
    torch.save(random_state(), path / "ImageReward.pt")
    return path


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(3, 3, 22, 17, generator=torch.Generator().manual_seed(1))


def made(folder, **options):
    return load("imagereward", **{"weights": str(folder / "ImageReward.pt"), "tokenizer": str(folder)} | options)


def prepared(pictures):
    """As torchvision does it: short side to 12, then the centre; 22 x 17 becomes 15 x 12, and the crop starts at 2."""
    out = []
    for picture in (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy():
        resized = np.asarray(PIL.fromarray(picture).resize((12, int(12 * 22 / 17)), PIL.Resampling.BICUBIC))
        out.append(torch.from_numpy(resized[2:14].copy()).permute(2, 0, 1))
    return (torch.stack(out).float() / 255 - MEAN) / STD


def test_the_original_file_gives_the_scores_of_its_formulas(folder, pictures):
    expected = forward(random_state(), prepared(pictures), *tokens_by_hand())
    scores = made(folder)(pictures, PROMPTS)
    assert scores.dtype == torch.float32
    assert_close(scores.double(), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1  # they do differ


def test_batches_offload_and_repetition_change_nothing(folder, pictures):
    whole = made(folder)(pictures, PROMPTS)
    assert torch.equal(made(folder)(pictures, PROMPTS), whole)
    assert torch.equal(made(folder, offload=True)(pictures, PROMPTS), whole)
    assert_close(made(folder, batch_size=2)(pictures, PROMPTS), whole, rtol=1e-4, atol=1e-5)


def test_half_precision_is_close(folder, pictures):
    assert_close(
        made(folder, dtype="bfloat16")(pictures, PROMPTS), made(folder)(pictures, PROMPTS), rtol=0.1, atol=0.15
    )


def test_picture_and_prompt_both_matter(folder, pictures):
    reward = made(folder)
    scores = reward(pictures, PROMPTS)
    assert not torch.allclose(reward(pictures.flip(0), PROMPTS), scores)
    assert not torch.allclose(reward(pictures, PROMPTS[::-1]), scores)


def test_the_crop_starts_where_that_of_torchvision_does():
    ramp = torch.arange(16, dtype=torch.uint8).view(1, 1, 1, 16).expand(1, 3, 13, 16)  # 3 columns too many
    first = bicubic_crop(ramp, 13, rounded=True)[0, 0, 0, 0] * STD[0] + MEAN[0]
    assert round(float(first) * 255) == 2  # 1.5 goes to the even 2,
    down = bicubic_crop(ramp, 13)[0, 0, 0, 0] * STD[0] + MEAN[0]
    assert round(float(down) * 255) == 1  # and to 1 in transformers


@pytest.mark.parametrize(
    "lost",
    [
        "blip.visual_encoder.blocks.1.attn.qkv.bias",
        "blip.visual_encoder.cls_token",
        "blip.visual_encoder.norm.weight",
        "blip.text_encoder.encoder.layer.1.crossattention.self.value.weight",
        "blip.text_encoder.embeddings.LayerNorm.bias",
    ],
)
def test_a_missing_key_is_named(lost):
    state = random_state()
    del state[lost]
    with pytest.raises(InputError, match=rf"missing \['{lost}'\], unknown none"):
        from_blip(state)


def test_a_missing_key_that_gives_the_sizes_is_named():
    state = random_state()
    del state["blip.visual_encoder.patch_embed.proj.weight"]
    with pytest.raises(InputError, match=r"it has no 'blip\.visual_encoder\.patch_embed\.proj\.weight'"):
        from_blip(state)


@pytest.mark.parametrize("extra", ["blip.visual_encoder.blocks.0.gate", "blip.text_decoder.x", "x"])
def test_an_unknown_key_is_named(extra):
    with pytest.raises(InputError, match=rf"missing none, unknown \['{extra}'\]"):
        from_blip(random_state() | {extra: torch.zeros(1)})


def test_another_head_is_refused():
    state = random_state()
    with pytest.raises(InputError, match="The head must hold"):
        from_blip(state | {"mlp.layers.9.weight": torch.zeros(1)})
    del state["mlp.layers.6.weight"]
    with pytest.raises(InputError, match="The head must hold"):
        from_blip(state)


def test_another_shape_is_named():
    state = random_state()
    state["blip.text_encoder.encoder.layer.1.output.dense.bias"] = torch.zeros(3)
    with pytest.raises(InputError, match=r"layer\.1\.output\.dense\.bias' has the shape \[3\], not \[128\]"):
        from_blip(state)


def test_another_tokenizer_is_refused(folder, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "more"]) + "\n")
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has 16 words with BLIP's two, but .* was trained with 15"):
        made(folder, tokenizer=str(tmp_path))


def test_code_in_a_checkpoint_is_not_run(folder, tmp_path):
    torch.save({"mlp": torch.nn.Linear(1, 1)}, tmp_path / "code.pt")
    with pytest.raises(InputError, match="cannot be read"):
        made(folder, weights=str(tmp_path / "code.pt"))


def test_weights_that_are_not_there_say_so(folder, tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        made(folder, weights=str(tmp_path / "nowhere.pt"))
    with pytest.raises(InputError, match="hf download"):
        made(folder, tokenizer=str(tmp_path / "nowhere"))


def test_what_shapes_do_not_tell_is_that_of_blip():
    judge = from_blip(random_state())
    assert (judge.vision.config.num_attention_heads, judge.text.config.num_attention_heads) == (3, 2)
    assert (judge.vision.config.layer_norm_eps, judge.text.config.layer_norm_eps) == (1e-6, 1e-12)
    assert judge.vision.config.hidden_act == judge.text.config.hidden_act == "gelu"
