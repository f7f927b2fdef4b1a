"""Pre-training of the tiny model."""

import json

import pytest
import torch

pytest.importorskip("diffusers")
if not hasattr(torch.optim, "Muon"):
    pytest.skip("torch.optim.Muon came with torch 2.9", allow_module_level=True)

from mogb_diffusion import pretrain
from mogb_diffusion.models import tiny
from mogb_diffusion.pretrain import Settings, Trainer, training_batch
from mogb_diffusion.world.captions import object_prompts
from mogb_diffusion.world.vocabulary import HELD_OUT_WORDS, LETTERS, WORDS

SMALL = Settings(steps=4, batch=6, warmup=1, cooldown=0.0)


def test_a_batch_is_keyed_by_seed_and_step():
    torch.manual_seed(1)
    latents, captions, noise, time = training_batch(SMALL, 3)
    torch.manual_seed(2)
    again = training_batch(SMALL, 3)
    assert captions == again[1]
    assert all(torch.equal(a, b) for a, b in zip((latents, noise, time), (again[0], *again[2:]), strict=True))
    assert not torch.equal(latents, training_batch(SMALL, 4)[0])
    assert latents.shape == noise.shape == (6, 3, 16, 16)
    strata = (time * 6).long().sort().values
    assert strata.tolist() == list(range(6))  # one time in every sixth of [0, 1]


def test_what_is_held_out_never_occurs_and_most_signs_have_random_letters():
    settings = Settings(batch=64)
    captions = [caption for step in range(40) for caption in training_batch(settings, step)[1]]
    held_out = {prompt.text for prompts in object_prompts("held_out").values() for prompt in prompts}
    assert not held_out & set(captions)
    words = [caption.split('"')[1] for caption in captions if '"' in caption]
    assert not set(words) & set(HELD_OUT_WORDS)
    share = len(words) / len(captions) / (1 - settings.no_caption)
    assert share == pytest.approx(settings.signs, abs=0.03)
    assert captions.count("") / len(captions) == pytest.approx(settings.no_caption, abs=0.02)
    known = sum(word in WORDS for word in words) / len(words)
    assert known == pytest.approx(1 - settings.random_letters * (1 - 36 / 1000), abs=0.06)
    assert {letter for word in words for letter in word} == set(LETTERS)


def test_latents_have_about_the_mean_and_variance_of_the_noise():
    latents = torch.cat([training_batch(Settings(batch=64), step)[0] for step in range(5)])
    assert abs(float(latents.mean())) < 0.15
    assert float(latents.std()) == pytest.approx(1.0, abs=0.15)


def test_training_starts_at_zero_velocity_and_the_loss_falls():
    settings = Settings(steps=30, batch=16, warmup=1)
    trainer = Trainer(settings)
    clean, _, noise, _ = training_batch(settings, 0)
    losses = [trainer.step() for _ in range(10)]
    assert losses[0] == pytest.approx((noise - clean).square().mean().item(), rel=1e-5)
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0]


def test_only_the_transformer_trains():
    trainer = Trainer(SMALL)
    before = [parameter.clone() for parameter in trainer.pipeline.text_encoder.parameters()]
    trainer.step()
    after = trainer.pipeline.text_encoder.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_learning_rate_rises_stays_and_falls():
    trainer = Trainer(Settings(steps=100, warmup=10, cooldown=0.2))
    warmth = []
    for trainer.done in range(100):
        warmth.append(trainer._warmth())
    assert warmth[0] == pytest.approx(0.1)
    assert warmth[9:81] == [1.0] * 72
    assert warmth[90] == pytest.approx(0.5)
    assert warmth[99] == pytest.approx(0.05)


def test_an_interrupted_run_continues_to_the_bit(tmp_path):
    whole = pretrain.train(SMALL, tmp_path / "whole", save_every=2, quiet=True)
    first = pretrain.train(Settings(**{**vars(SMALL), "steps": 2}), tmp_path / "halves", quiet=True)
    assert first.name == "weights-2.safetensors"
    second = pretrain.train(SMALL, tmp_path / "halves", quiet=True)
    assert second.name == whole.name == "weights-4.safetensors"
    assert second.read_bytes() == whole.read_bytes()
    assert first.read_bytes() != whole.read_bytes()
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4]
    with pytest.raises(ValueError, match=r"seed=0, not 1"):
        pretrain.train(Settings(**{**vars(SMALL), "seed": 1}), tmp_path / "halves", quiet=True)


def test_the_average_of_the_weights_is_what_is_saved(tmp_path):
    trainer = Trainer(SMALL)
    start = {name: value.clone() for name, value in trainer.average.items()}
    trainer.step()
    name = "proj_out.bias"
    moved = dict(trainer.model.named_parameters())[name].detach()
    assert not torch.equal(moved, start[name])
    decay = 1 / 11
    assert torch.allclose(trainer.average[name], decay * start[name] + (1 - decay) * moved)


def test_the_command_trains_measures_and_describes(tmp_path, capsys):
    pretrain.main(["--out", str(tmp_path), "--steps", "1", "--batch", "4", "--pictures", "16"])
    weights, described = capsys.readouterr().out.split()[-2:]
    tiny.load(weights)
    report = json.loads((tmp_path / "weights-1.json").read_text())
    assert described == str(tmp_path / "weights-1.json")
    assert report["settings"]["batch"] == 4
    assert set(report["rewards"]["held_out"]) == set(pretrain_rewards())
    assert all(entry["spread"] >= 0 for entry in report["rewards"]["train"].values())


def pretrain_rewards():
    from mogb_diffusion.rewards.world import REWARDS

    return REWARDS
