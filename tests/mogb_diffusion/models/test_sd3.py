import json

import pytest
import torch
from torch.testing import assert_close

from mogb_diffusion import config
from mogb_diffusion.config import Sampling
from mogb_diffusion.errors import InputError
from mogb_diffusion.models import sd3, tiny
from mogb_diffusion.models.sd3 import SD3Model, find_device, load_model
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rollouts import draw

TEXTS = ["a photo of a red square", 'a sign that says "A"']


def generator():
    return torch.Generator().manual_seed(3)


def wake(pipeline):
    """Gives the last layer weights: a fresh model answers 0 everywhere."""
    with torch.no_grad():
        for param in pipeline.transformer.parameters():
            if param.ndim >= 2 and float(param.abs().max()) == 0:
                param.normal_(std=0.1, generator=generator())
    return pipeline


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampling_agrees_with_the_pipeline_itself(guidance):
    pipeline = wake(tiny.build(0))
    noise = torch.randn(2, 3, 16, 16, generator=generator())
    expected = pipeline(
        TEXTS, num_inference_steps=4, guidance_scale=guidance, latents=noise.clone(), output_type="pt",
        max_sequence_length=1,
    ).images  # fmt: skip
    model = SD3Model(pipeline, max_sequence_length=1)
    latents = draw(model, [Prompt(text) for text in TEXTS], noise, Sampling(steps=4, guidance=guidance))
    assert_close(model.decode(latents), expected, rtol=0, atol=2e-5)
    assert float(expected.std()) > 0.05


def test_float64_is_float64_throughout():
    model = SD3Model(wake(tiny.build(0)), dtype=torch.float64, max_sequence_length=1)
    wide = model.encode(TEXTS)
    latents = torch.randn(2, 3, 16, 16, generator=generator(), dtype=torch.float64).requires_grad_()
    # A float32 anywhere on the way would show at 1e-7 in a difference quotient of this step.
    direction = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    [slope] = torch.autograd.grad(model.velocity(latents, 0.5, wide).square().sum(), latents)
    step = 1e-5
    with torch.no_grad():
        ahead = model.velocity(latents + step * direction, 0.5, wide).square().sum()
        behind = model.velocity(latents - step * direction, 0.5, wide).square().sum()
    assert_close((ahead - behind) / (2 * step), (slope * direction).sum(), rtol=1e-7, atol=0)


def test_prompts_are_encoded_once_and_not_remembered_for_ever():
    model = SD3Model(tiny.build(0), max_sequence_length=1)
    calls = []
    inner = model.pipeline.encode_prompt
    model.pipeline.encode_prompt = lambda **kwargs: calls.extend(kwargs["prompt"]) or inner(**kwargs)
    first = model.encode([TEXTS[0], TEXTS[1], TEXTS[0]])
    again = model.encode([TEXTS[0]])
    assert calls == TEXTS
    assert torch.equal(first.tokens[2:], again.tokens)
    model.encode([f"a {number}" for number in range(300)])
    model.encode([TEXTS[1]])  # nothing is forgotten before there is something new
    assert calls[-1] == "a 299"
    model.encode([TEXTS[1], "b"])
    assert calls[-1] == "b"
    assert set(model._known) == {TEXTS[1], "b"}


def wide_model(where="resident"):
    """With an encoder wide enough that the rounding of its products depends on how many prompts are in them."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    pipeline = tiny.build(0)
    small = pipeline.text_encoder.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline.text_encoder = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=small.vocab_size, hidden_size=768, intermediate_size=3072, num_hidden_layers=2,
                num_attention_heads=12, projection_dim=768, max_position_embeddings=77,
                bos_token_id=small.bos_token_id, eos_token_id=small.eos_token_id, pad_token_id=small.pad_token_id,
            )
        ).eval()  # fmt: skip
    pipeline.transformer.register_to_config(joint_attention_dim=1024)  # what embeddings are padded to
    return SD3Model(pipeline, max_sequence_length=1, text_encoders=where)


def test_an_embedding_does_not_depend_on_what_else_was_asked_for(monkeypatch):
    monkeypatch.setattr(sd3, "REMEMBERED", 3)
    others = [f"a photo of {number} red squares" for number in range(19)]
    model, text = wide_model(), TEXTS[0]
    alone = model.encode([text])
    asked = {}
    for count in (1, 3, 15, 19):
        model._known.clear()
        asked[f"first of {count + 1}"] = model.encode([text, *others[:count]])[[0]]
        model._known.clear()
        asked[f"last of {count + 1}"] = model.encode([*others[:count], text])[[count]]
    model.encode([TEXTS[1]])  # empties what is remembered
    assert text not in model._known
    asked["again"] = model.encode([text, others[0]])[[0]]
    away = wide_model("precompute")
    away.precompute([*others, text])
    asked["precomputed"] = away.encode([text])
    for how, found in asked.items():
        assert torch.equal(found.tokens, alone.tokens), how
        assert torch.equal(found.pooled, alone.pooled), how
    with torch.no_grad():
        tokens, _, pooled, _ = model.pipeline.encode_prompt(
            prompt=[text, *others[:15]], prompt_2=None, prompt_3=None, device="cpu", do_classifier_free_guidance=False,
            max_sequence_length=1,
        )  # fmt: skip
    assert_close(tokens[:1], alone.tokens, rtol=0, atol=1e-4)
    assert_close(pooled[:1], alone.pooled, rtol=0, atol=1e-4)


def test_what_an_embedding_takes_is_measured():
    model = wide_model("offload")
    assert model.embedding_bytes() == 4 * ((16 + 1) * 1024 + 768 + 32)  # tokens of CLIP and T5; pooled by both CLIPs


def devices(model):
    return {param.device.type for part in model._encoders() for param in part.parameters()}


class TestTextEncoders:
    @pytest.mark.parametrize("where", ["resident", "offload", "precompute"])
    def test_the_embeddings_are_the_same(self, where):
        model = SD3Model(tiny.build(0), max_sequence_length=1, text_encoders=where)
        plain = SD3Model(tiny.build(0), max_sequence_length=1)
        model.prepare([TEXTS[1], TEXTS[0]])
        if where == "precompute":
            model.precompute(TEXTS)
        found, wanted = model.encode([*TEXTS, TEXTS[0]]), plain.encode([*TEXTS, TEXTS[0]])
        assert torch.equal(found.tokens, wanted.tokens)
        assert torch.equal(found.pooled, wanted.pooled)

    def test_they_come_once_for_all_prompts_that_are_prepared(self):
        model = SD3Model(tiny.build(0), max_sequence_length=1, text_encoders="offload")
        visits = []
        move = model._encoders_here
        model._encoders_here = lambda: visits.append(True) or move()
        model.prepare([f"a {number}" for number in range(40)])
        for number in range(40):
            model.encode([f"a {number}"])
        assert len(visits) == 1
        model.encode(["b"])
        assert len(visits) == 2

    @pytest.mark.parametrize(("where", "expected"), [("resident", {"meta"}), ("offload", {"cpu"})])
    def test_they_are_on_the_device_only_if_resident(self, where, expected):
        pipeline = tiny.build(0)
        pipeline.transformer.to("meta")
        pipeline.vae.to("meta")
        model = SD3Model(pipeline, device="meta", max_sequence_length=1, text_encoders=where)
        assert devices(model) == expected

    def test_they_go_back_whatever_happens(self):
        model = SD3Model(tiny.build(0), max_sequence_length=1, text_encoders="offload")
        moves = []
        for part in model._encoders():
            part.to = lambda where, part=part: moves.append(str(where))
        model.pipeline.encode_prompt = lambda **kwargs: 1 / 0
        with pytest.raises(ZeroDivisionError):
            model.encode(TEXTS)
        assert moves == ["cpu", "cpu", "cpu", "cpu"]  # two encoders, there and back

    def test_precompute_drops_them_and_refuses_other_prompts(self):
        model = SD3Model(tiny.build(0), max_sequence_length=1, text_encoders="precompute")
        model.precompute(TEXTS)
        assert list(model._encoders()) == []
        assert len(model.encode(["", *TEXTS])) == 3
        model.prepare(["a third"])
        with pytest.raises(InputError, match=r"model.text_encoders: precompute has no embedding of 'a third'"):
            model.encode(["a third"])


def test_a_saved_pipeline_without_t5_loads_by_its_folder(tmp_path):
    wake(tiny.build(1)).save_pretrained(tmp_path)
    model = load_model(config.Model(source=str(tmp_path)), torch.device("cpu"))
    noise = torch.randn(1, 3, 16, 16, generator=generator())
    other = SD3Model(wake(tiny.build(1)), max_sequence_length=1)
    how = Sampling(steps=2)
    assert model.max_sequence_length == 1
    assert_close(
        draw(model, [Prompt(TEXTS[0])], noise, how), draw(other, [Prompt(TEXTS[0])], noise, how), rtol=0, atol=1e-5
    )


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"model.source: .* is no pipeline"):
        load_model(config.Model(source=str(tmp_path)), torch.device("cpu"))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    with pytest.raises(InputError, match=r"model\.source") as caught:
        load_model(config.Model(source=str(tmp_path)), torch.device("cpu"))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="multiple of 2"):
        load_model(config.Model(source="tiny-random", resolution=15), torch.device("cpu"))
    with pytest.raises(InputError, match=r"model\.device: 'tpu9' cannot be used here"):
        find_device("tpu9")


def test_bfloat16_stays_close_to_float32():
    latents = torch.randn(2, 3, 16, 16, generator=generator())
    answers = []
    for dtype in ("float32", "bfloat16"):
        model = load_model(config.Model(source="tiny-random", dtype=dtype), torch.device("cpu"))
        wake(model.pipeline)
        with torch.no_grad():
            answers.append(model.velocity(latents, 0.3, model.encode(TEXTS)))
    assert answers[1].dtype == torch.float32
    error = (answers[1] - answers[0]).norm() / answers[0].norm()
    assert 1e-5 < float(error) < 3e-2
