"""The tiny model: a true Stable Diffusion 3 pipeline."""

import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import StableDiffusion3Pipeline

from mogb_diffusion.models import tiny
from mogb_diffusion.pretrain import measure
from mogb_diffusion.rewards.world import REWARDS
from mogb_diffusion.world.captions import object_prompts, sign_prompts

TEXTS = ['a sign that says "CAT"', "a photo of a red circle left of a blue square", ""]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(pipeline, texts=TEXTS, **options):
    options = {"max_sequence_length": tiny.MAX_SEQUENCE_LENGTH, "guidance_scale": 1.0, **options}
    return pipeline(prompt=texts, num_inference_steps=2, generator=generator(), output_type="pt", **options).images


@pytest.fixture(scope="module")
def pipeline():
    return tiny.build(0)


def test_it_is_the_pipeline_of_the_big_model_with_the_same_parts(pipeline):
    assert type(pipeline) is StableDiffusion3Pipeline
    assert type(pipeline.transformer).__name__ == "SD3Transformer2DModel"
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert (
        type(pipeline.text_encoder).__name__ == type(pipeline.text_encoder_2).__name__ == "CLIPTextModelWithProjection"
    )
    assert 2e6 < sum(parameter.numel() for parameter in pipeline.transformer.parameters()) < 2.5e6


def test_pictures_have_the_shape_of_the_world(pipeline):
    images = pictures(pipeline)
    assert images.shape == (3, 3, 16, 16)
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    assert float(images.std()) > 0.05


def test_the_same_seed_gives_the_same_weights_and_leaves_torchs_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = tiny.build(1), tiny.build(1), tiny.build(2)
    assert torch.equal(torch.get_rng_state(), before)
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        pairs = list(zip(getattr(first, part).parameters(), getattr(again, part).parameters(), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs)
        others = zip(getattr(first, part).parameters(), getattr(other, part).parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in others)


def test_nothing_trains_unless_asked(pipeline):
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())


@torch.no_grad()
def test_the_autoencoder_changes_nothing(pipeline):
    images = torch.rand(8, 3, 16, 16, generator=generator())
    vae = pipeline.vae
    latents = (vae.encode(2 * images - 1).latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert float((latents - tiny.to_latents(images)).abs().max()) < 1e-5
    decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    assert float((decoded - (2 * images - 1)).abs().max()) < 2e-4
    assert pipeline.vae_scale_factor == 1


@torch.no_grad()
def test_beyond_white_and_black_the_autoencoder_still_only_clips(pipeline):
    vae, latents = pipeline.vae, torch.linspace(-6, 2, 3 * 256).view(1, 3, 16, 16)
    decoded = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
    expected = (latents * tiny.LATENT_SPREAD + tiny.LATENT_MEAN).clamp(-1, 1)
    assert float((decoded - expected).abs().max()) < 2e-4


def test_every_prompt_fits_and_has_no_unknown_word(pipeline):
    texts = [p.text for s in ("train", "held_out") for prompts in object_prompts(s).values() for p in prompts]
    texts += [prompt.text for split in ("train", "held_out") for prompt in sign_prompts(split)]
    ids = pipeline.tokenizer(texts).input_ids
    assert max(map(len, ids)) <= tiny.TEXT_LENGTH
    assert not any(pipeline.tokenizer.unk_token_id in row for row in ids)
    assert len(set(map(tuple, ids))) == len(set(texts))
    assert pipeline.tokenizer("a red dragon").input_ids.count(pipeline.tokenizer.unk_token_id) == 1


def test_letters_are_tokens(pipeline):
    tokens = pipeline.tokenizer.convert_ids_to_tokens(pipeline.tokenizer('a card that says "TEA"').input_ids)
    assert tokens == ["<bos>", "a", "card", "that", "says", '"', "T", "E", "A", '"', "<eos>"]


def test_the_text_encoders_tell_prompts_apart_and_where_a_letter_is(pipeline):
    embeds, _, pooled, _ = pipeline.encode_prompt(
        ['a sign that says "CAT"', 'a sign that says "CAN"', 'a sign that says "TAC"'],
        None,
        None,
        do_classifier_free_guidance=False,
        max_sequence_length=tiny.MAX_SEQUENCE_LENGTH,
    )
    assert embeds.shape == (3, tiny.TEXT_LENGTH + tiny.MAX_SEQUENCE_LENGTH, 64)
    assert pooled.shape == (3, 64)
    size = embeds[0, 6:9].norm()
    assert float((embeds[0, 8] - embeds[1, 8]).norm()) > 0.5 * size / 3**0.5  # T and N at one place
    assert torch.equal(embeds[0, :8], embeds[1, :8])
    assert float((embeds[0, 8] - embeds[2, 6]).norm()) > 0.2 * size / 3**0.5  # T at two places
    assert float((pooled[0] - pooled[1]).norm()) > 0.05 * float(pooled[0].norm())


def test_it_is_saved_and_loaded_by_diffusers(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    loaded.set_progress_bar_config(disable=True)
    assert float((pictures(loaded) - pictures(pipeline)).abs().max()) < 1e-6


def test_weights_are_saved_in_half_precision_and_come_back(tmp_path):
    pipeline = tiny.build(5)
    tiny.save_weights(pipeline, tmp_path / "weights.safetensors")
    assert (tmp_path / "weights.safetensors").stat().st_size < 5e6
    loaded = tiny.load(tmp_path / "weights.safetensors")
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        for kept, given in zip(getattr(loaded, part).parameters(), getattr(pipeline, part).parameters(), strict=True):
            assert kept.dtype == torch.float32
            assert torch.equal(kept, given.half().float())
    assert float((pictures(loaded) - pictures(pipeline)).abs().max()) < 0.02


def test_weights_of_another_model_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"transformer.proj_out.weight": torch.zeros(12, 128)}, str(tmp_path / "weights.safetensors"))
    with pytest.raises(ValueError, match=r"weights\.safetensors does not hold the weights of this model"):
        tiny.load(tmp_path / "weights.safetensors")


def velocity_and_gradients(pipeline, processor, dtype=torch.float32):
    transformer = pipeline.transformer
    transformer.set_attn_processor(processor)
    transformer.requires_grad_(True)
    latents = torch.randn(4, 3, 16, 16, generator=generator())
    embeds, pooled = torch.randn(4, 17, 64, generator=generator()), torch.randn(4, 64, generator=generator())
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        velocity = transformer(
            latents, encoder_hidden_states=embeds, pooled_projections=pooled, timestep=torch.full((4,), 500.0)
        ).sample
    gradients = torch.autograd.grad(velocity.float().square().sum(), list(transformer.parameters()), allow_unused=True)
    return velocity.detach().float(), torch.cat([g.flatten() for g in gradients if g is not None])


def test_attention_by_matrix_products_is_the_same_attention():
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    pipeline = tiny.build(0)
    velocity, gradients = velocity_and_gradients(pipeline, JointAttnProcessor2_0())
    ours, our_gradients = velocity_and_gradients(pipeline, tiny.MatmulAttention())
    assert float((ours - velocity).abs().max()) < 1e-5
    assert float((our_gradients - gradients).norm() / gradients.norm()) < 1e-5
    narrow, _ = velocity_and_gradients(pipeline, tiny.MatmulAttention(), torch.bfloat16)
    assert float((narrow - velocity).norm() / velocity.norm()) < 0.05


def test_attention_masks_are_refused():
    with pytest.raises(ValueError, match="no attention mask"):
        tiny.MatmulAttention()(None, torch.zeros(1, 1, 1), attention_mask=torch.zeros(1))


@pytest.fixture(scope="module")
def description():
    return json.loads(tiny.WEIGHTS.with_suffix(".json").read_text())


def test_the_base_is_worth_what_its_description_says(description):
    table = measure(tiny.load(), count=160, seed=2)
    for name, described in description["rewards"]["held_out"].items():
        error = (table[name]["standard_error"] ** 2 + described["standard_error"] ** 2) ** 0.5
        assert table[name]["mean"] == pytest.approx(described["mean"], abs=3.5 * error), name
        assert table[name]["spread"] == pytest.approx(described["spread"], rel=0.4), name


def test_the_base_is_imperfect_but_far_from_chance(description):
    held_out = {name: entry["mean"] for name, entry in description["rewards"]["held_out"].items()}
    random = measure(tiny.build(0), count=80, seed=2)
    assert 0.2 < held_out["world_text"] < 0.8
    assert 0.2 < held_out["world_composition"] < 0.8
    for name in ("world_text", "world_composition", "world_preference"):
        assert held_out[name] > random[name]["mean"] + 0.1, name


def test_the_spreads_of_the_rewards_are_those_of_the_base(description):
    for name, reward in REWARDS.items():
        assert reward.spread == pytest.approx(description["rewards"]["train"][name]["spread"], abs=0.005), name
