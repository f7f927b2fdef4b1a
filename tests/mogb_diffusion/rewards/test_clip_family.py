"""CLIP rewards against computations that share no code with them, on tiny random weights in the true file formats."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rewards import load
from mogb_diffusion.rewards._clip import as_unit_floats, bicubic_crop, bicubic_pad, bilinear_crop
from mogb_diffusion.rewards.hpsv2 import from_open_clip

transformers = pytest.importorskip("transformers")
PIL = pytest.importorskip("PIL.Image")

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
WORDS = ["a", "red", "blue", "circle", "square", "photo", "of", "two"]
PROMPTS = [Prompt("a red circle"), Prompt("two blue square of a photo"), Prompt("a blue circle")]


def config(activation="quick_gelu"):
    return transformers.CLIPConfig(
        text_config={
            "vocab_size": 11, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 9, "eos_token_id": 10, "bos_token_id": 9,
            "pad_token_id": 0, "hidden_act": activation, "projection_dim": 12,
        },
        vision_config={
            "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
            "image_size": 16, "patch_size": 4, "hidden_act": activation, "projection_dim": 12,
        },
        projection_dim=12,
    )  # fmt: skip


def tokenizer():
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    vocabulary = {"<pad>": 0} | {word: index + 1 for index, word in enumerate(WORDS)} | {"<s>": 9, "</s>": 10}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 9), ("</s>", 10)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def random_clip(seed=0, activation="quick_gelu"):
    torch.manual_seed(seed)
    model = transformers.CLIPModel(config(activation)).eval()
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim:
                param += 0.2 * torch.randn_like(param)
        model.logit_scale.fill_(3.0)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    random_clip().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(3, 3, 40, 28, generator=torch.Generator().manual_seed(1))


def as_pil(pictures):
    arrays = (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [PIL.fromarray(array) for array in arrays]


def processor(size=16):
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)  # as it is called since 5.0
    return kind(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def reference(folder, pixels):
    """The whole CLIP of transformers, its own similarity."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokens = tokenizer()([prompt.text for prompt in PROMPTS], padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
    return out.logits_per_image.diagonal()


class TestPreprocessing:
    @pytest.mark.parametrize("shape", [(40, 28), (28, 40), (16, 16), (33, 33), (100, 17)])
    def test_the_crop_is_that_of_clip(self, shape):
        pictures = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(2))
        theirs = processor()(as_pil(pictures), return_tensors="pt")["pixel_values"]
        assert_close(bicubic_crop(pictures, 16), theirs, rtol=0, atol=1e-6)

    def test_floats_bytes_and_images_are_the_same_picture(self, pictures):
        eight = (pictures * 255).round().byte()
        for given in (eight, as_pil(pictures), eight.float() / 255):
            assert torch.equal(bicubic_crop(given, 16), bicubic_crop(pictures, 16))
            assert_close(bilinear_crop(given, 16), bilinear_crop(eight, 16), rtol=0, atol=1e-6)

    def test_a_padded_picture_keeps_its_proportions_and_is_black_around(self):
        out = bicubic_pad(torch.ones(1, 3, 20, 40), 16)
        white, black = (torch.tensor([[v, v, v]]) for v in (1.0, 0.0))
        assert_close(out[0, :, 8, :], ((white - MEAN) / STD).T.expand(3, 16))
        assert_close(out[0, :, 1, :], ((black - MEAN) / STD).T.expand(3, 16))
        assert_close(out[0, :, 14, :], ((black - MEAN) / STD).T.expand(3, 16))

    def test_a_shrunk_picture_keeps_its_mean(self):
        ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
        for rule in (bilinear_crop, bicubic_pad):
            mean = rule(ramp, 16).mean((2, 3)) * STD + MEAN
            assert_close(mean, torch.full((1, 3), 0.5), atol=2e-3, rtol=0)

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (torch.rand(3, 8, 8), r"\[B, 3, H, W\]"),
            (torch.rand(1, 1, 8, 8), r"\[B, 3, H, W\]"),
            (torch.rand(1, 3, 8, 8) * 255, r"lie in \[0, 1\]"),
            (torch.full((1, 3, 8, 8), float("nan")), r"lie in \[0, 1\]"),
            (torch.ones(1, 3, 8, 8, dtype=torch.int64), "uint8"),
        ],
    )
    def test_other_pictures_are_refused(self, bad, message):
        with pytest.raises(InputError, match=message):
            as_unit_floats(bad)


class TestScores:
    def test_pickscore(self, folder, pictures):
        scores = load("pickscore", model=folder, tokenizer=folder)(pictures, PROMPTS)
        pixels = processor()(as_pil(pictures), return_tensors="pt")["pixel_values"]
        assert_close(scores, reference(folder, pixels) / 26, rtol=1e-5, atol=1e-6)

    def test_clipscore(self, folder, pictures):
        scores = load("clipscore", model=folder)(pictures, PROMPTS)
        short = functional.interpolate(pictures, (22, 16), mode="bilinear", antialias=True)[:, :, 3:19]
        pixels = (short - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
        assert_close(scores, reference(folder, pixels) / 100, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("batch_size", [1, 2, 16])
    def test_the_batch_size_changes_nothing(self, folder, pictures, batch_size):
        whole = load("pickscore", model=folder, tokenizer=folder)(pictures, PROMPTS)
        parts = load("pickscore", model=folder, tokenizer=folder, batch_size=batch_size)(pictures, PROMPTS)
        assert_close(parts, whole, rtol=1e-5, atol=1e-6)

    def test_the_order_of_the_pictures_matters_and_that_of_the_batch_does_not(self, folder, pictures):
        reward = load("clipscore", model=folder)
        there, back = reward(pictures, PROMPTS), reward(pictures.flip(0), PROMPTS[::-1])
        assert_close(there, back.flip(0))
        assert not torch.allclose(there, reward(pictures.flip(0), PROMPTS))

    def test_rewards_share_one_copy_of_the_weights(self, folder):
        first, second = load("pickscore", model=folder, tokenizer=folder), load("clipscore", model=folder)
        assert first.clip is second.clip

    def test_a_long_prompt_is_cut(self, folder, pictures):
        long = Prompt(" ".join(WORDS * 4))
        assert load("clipscore", model=folder)(pictures[:1], [long]).isfinite().all()


def open_clip_state(model):
    """What OpenCLIP would have saved for the same weights, written down from its modules' names."""
    ours, state = model.state_dict(), {}

    def block(there, here):
        for kind in ("weight", "bias"):
            state[f"{there}.ln_1.{kind}"] = ours[f"{here}.layer_norm1.{kind}"]
            state[f"{there}.ln_2.{kind}"] = ours[f"{here}.layer_norm2.{kind}"]
            state[f"{there}.mlp.c_fc.{kind}"] = ours[f"{here}.mlp.fc1.{kind}"]
            state[f"{there}.mlp.c_proj.{kind}"] = ours[f"{here}.mlp.fc2.{kind}"]
            state[f"{there}.attn.out_proj.{kind}"] = ours[f"{here}.self_attn.out_proj.{kind}"]
            three = [ours[f"{here}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            state[f"{there}.attn.in_proj_{kind}"] = torch.cat(three)

    for number in range(2):
        block(f"visual.transformer.resblocks.{number}", f"vision_model.encoder.layers.{number}")
        block(f"transformer.resblocks.{number}", f"text_model.encoder.layers.{number}")
    state |= {
        "visual.class_embedding": ours["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": ours["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": ours["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": ours["visual_projection.weight"].T,
        "positional_embedding": ours["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": ours["text_model.embeddings.token_embedding.weight"],
        "text_projection": ours["text_projection.weight"].T,
        "logit_scale": ours["logit_scale"],
    }
    for kind in ("weight", "bias"):
        state[f"visual.ln_pre.{kind}"] = ours[f"vision_model.pre_layrnorm.{kind}"]
        state[f"visual.ln_post.{kind}"] = ours[f"vision_model.post_layernorm.{kind}"]
        state[f"ln_final.{kind}"] = ours[f"text_model.final_layer_norm.{kind}"]
    return {key: value.clone().contiguous() for key, value in state.items()}


def run_open_clip(state, pixels, tokens):
    """The two towers as OpenCLIP runs them, on its own weights: the text's end by argmax."""

    def norm(x, name):
        return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def block(x, name, heads, mask):
        h = norm(x, f"{name}.ln_1").transpose(0, 1)
        attended, _ = functional.multi_head_attention_forward(
            h, h, h, h.shape[-1], heads, state[f"{name}.attn.in_proj_weight"], state[f"{name}.attn.in_proj_bias"],
            None, None, False, 0.0, state[f"{name}.attn.out_proj.weight"], state[f"{name}.attn.out_proj.bias"],
            training=False, attn_mask=mask,
        )  # fmt: skip
        x = x + attended.transpose(0, 1)
        h = functional.linear(norm(x, f"{name}.ln_2"), state[f"{name}.mlp.c_fc.weight"], state[f"{name}.mlp.c_fc.bias"])
        h = functional.gelu(h)
        return x + functional.linear(h, state[f"{name}.mlp.c_proj.weight"], state[f"{name}.mlp.c_proj.bias"])

    patches = functional.conv2d(pixels, state["visual.conv1.weight"], stride=4).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(pixels), 1, -1), patches], 1)
    x = norm(x + state["visual.positional_embedding"], "visual.ln_pre")
    for number in range(2):
        x = block(x, f"visual.transformer.resblocks.{number}", 3, None)
    picture = norm(x[:, 0], "visual.ln_post") @ state["visual.proj"]
    y = state["token_embedding.weight"][tokens] + state["positional_embedding"][: tokens.shape[1]]
    mask = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)
    for number in range(2):
        y = block(y, f"transformer.resblocks.{number}", 2, mask)
    y = norm(y, "ln_final")[torch.arange(len(y)), tokens.argmax(-1)] @ state["text_projection"]
    return functional.normalize(picture, dim=-1), functional.normalize(y, dim=-1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hps")
    config("gelu").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    state = open_clip_state(random_clip(5, "gelu"))
    torch.save({"state_dict": state, "epoch": 3}, folder / "HPS.pt")
    return folder, state


class TestHPSv2:
    def test_the_original_file_gives_the_scores_of_the_original_towers(self, checkpoint, pictures):
        folder, state = checkpoint
        scores = load("hpsv2", weights=str(folder / "HPS.pt"), config=str(folder))(pictures, PROMPTS)
        tokens = tokenizer()([p.text for p in PROMPTS], padding="max_length", max_length=9, return_tensors="pt")
        with torch.no_grad():
            picture, words = run_open_clip(state, bicubic_pad(pictures, 16), tokens["input_ids"])
        assert_close(scores, (picture * words).sum(-1), rtol=1e-4, atol=1e-5)

    def test_a_key_of_another_model_is_named(self, checkpoint):
        _, state = checkpoint
        with pytest.raises(InputError, match=r"visual\.trunk\.x"):
            from_open_clip(state | {"visual.trunk.x": torch.zeros(1)})

    def test_a_checkpoint_for_another_architecture_is_refused(self, checkpoint, tmp_path):
        folder, state = checkpoint
        less = {key: value for key, value in state.items() if "resblocks.1" not in key}
        torch.save(less, tmp_path / "less.pt")
        with pytest.raises(InputError, match="does not fit the architecture"):
            load("hpsv2", weights=str(tmp_path / "less.pt"), config=str(folder))

    def test_code_in_a_checkpoint_is_not_run(self, checkpoint, tmp_path):
        folder, _ = checkpoint
        torch.save({"state_dict": nn.Linear(2, 2)}, tmp_path / "code.pt")
        with pytest.raises(InputError, match="cannot be read"):
            load("hpsv2", weights=str(tmp_path / "code.pt"), config=str(folder))


class TestAesthetic:
    def head(self, width=12, seed=3):
        generator = torch.Generator().manual_seed(seed)
        sizes = [(width, 10), (10, 8), (8, 6), (6, 4), (4, 1)]
        state = {}
        for index, (inside, outside) in zip((0, 2, 4, 6, 7), sizes, strict=True):
            state[f"layers.{index}.weight"] = torch.randn(outside, inside, generator=generator)
            state[f"layers.{index}.bias"] = torch.randn(outside, generator=generator)
        return state

    def test_it_is_an_affine_function_of_the_unit_embedding(self, folder, pictures, tmp_path):
        state = self.head()
        torch.save(state, tmp_path / "head.pth")
        scores = load("aesthetic", weights=str(tmp_path / "head.pth"), model=folder)(pictures, PROMPTS)
        model = transformers.CLIPModel.from_pretrained(folder).eval()
        tokens = tokenizer()(["a"], return_tensors="pt")
        pixels = processor()(as_pil(pictures), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            x = model(input_ids=tokens["input_ids"], pixel_values=pixels).image_embeds.double().numpy()
        for index in (0, 2, 4, 6, 7):
            x = x @ state[f"layers.{index}.weight"].double().numpy().T + state[f"layers.{index}.bias"].numpy()
        np.testing.assert_allclose(scores.numpy(), x[:, 0], rtol=1e-4, atol=1e-4)

    def test_another_head_is_refused(self, folder, tmp_path):
        torch.save({"linear.weight": torch.zeros(1, 12)}, tmp_path / "other.pth")
        with pytest.raises(InputError, match="not the aesthetic predictor"):
            load("aesthetic", weights=str(tmp_path / "other.pth"), model=folder)

    def test_without_weights_it_says_where_they_are(self, folder):
        with pytest.raises(InputError, match=r"weights=PATH.*improved-aesthetic-predictor"):
            load("aesthetic", model=folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "with .*: dtype must be one of float32, float16, bfloat16"),
        ({"device": "tpu9"}, "device must be auto, cpu, cuda or cuda:N"),
        ({"batch_size": 0}, "batch_size must be a positive whole number"),
    ],
)
def test_bad_options_are_named(folder, options, message):
    with pytest.raises(InputError, match=message):
        load("clipscore", model=folder, **options)


def test_weights_that_are_not_there_say_how_to_get_them(tmp_path):
    with pytest.raises(InputError, match=r"hf download .*nowhere.*or give a folder"):
        load("clipscore", model=str(tmp_path / "nowhere"))


class TestOffload:
    def test_it_changes_no_score(self, folder, checkpoint, pictures, tmp_path):
        torch.save(TestAesthetic().head(), tmp_path / "head.pth")
        rewards = {
            "pickscore": {"model": folder, "tokenizer": folder},
            "clipscore": {"model": folder},
            "aesthetic": {"weights": str(tmp_path / "head.pth"), "model": folder},
            "hpsv2": {"weights": str(checkpoint[0] / "HPS.pt"), "config": str(checkpoint[0])},
        }
        for name, options in rewards.items():
            away = load(name, **options, offload=True)
            assert away.clip.weights.offload
            assert torch.equal(away(pictures, PROMPTS), load(name, **options)(pictures, PROMPTS))

    def test_the_weights_travel_once_a_call(self, folder, pictures, monkeypatch):
        reward = load("pickscore", model=folder, tokenizer=folder, offload=True, batch_size=1)
        weights, parked = reward.clip.weights, []
        park = weights._park
        monkeypatch.setattr(weights, "_park", lambda: (parked.append(1), park()))
        reward(pictures, PROMPTS)
        assert parked == [1]


def test_a_reward_gives_the_same_numbers_every_time(folder, pictures):
    reward = load("clipscore", model=folder)
    assert torch.equal(reward(pictures, PROMPTS), reward(pictures, PROMPTS))
