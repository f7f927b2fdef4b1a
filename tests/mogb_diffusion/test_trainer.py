import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import metrics, same_tensors, small_run, train

from mogb_diffusion import checkpoint, readiness
from mogb_diffusion.errors import CheckpointError, InputError, RewardFailure
from mogb_diffusion.evaluation import draw_pictures, evaluation_sampling
from mogb_diffusion.models import tiny
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rollouts import plan_epoch
from mogb_diffusion.trainer import Trainer


def test_a_run_leaves_what_it_promises(tmp_path):
    told = []
    train(tmp_path, tell=told.append)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "samples", "checkpoint-000002", "checkpoint-000004", "latest"} <= names
    assert (tmp_path / "latest").read_text().strip() == "checkpoint-000004"
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"before.png", "epoch-0001.png", "after.png"}
    rows = metrics(tmp_path)
    assert [row["kind"] for row in rows] == [
        "evaluation",
        "step",
        "step",
        "epoch",
        "step",
        "step",
        "epoch",
        "evaluation",
    ]
    assert set(rows[3]["rewards"]) == set(rows[1]["alpha"]) == {"preference", "aesthetic", "alignment"}
    assert "2 prompts x 3 pictures = 6 an epoch, 2 updates of 3 pictures x 1 times" in told[0]
    assert told[-1].startswith("held out, after: preference")


@pytest.mark.parametrize(
    "assignments",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("balancing={mode: marble, refresh_every: 3}", "policy.ema=0.9", "loss.memory=0.5", "loss.kl_weight=0.1"),
        pytest.param(("balancing.mode=marble_spread", "policy.kind=full", "optimizer.lr=1e-4"), marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, assignments):
    whole = train(tmp_path / "whole", *assignments, epochs=3)
    cut = Trainer(small_run("epochs=3", *assignments), tmp_path / "parts")
    go_on = cut.train_epoch
    cut.train_epoch = lambda epoch: go_on(epoch) if epoch < 1 else exec("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    # What a kill leaves behind: lines after the checkpoint, a torn last one, and a half-written checkpoint.
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "epoch": 1}\n{"kind": "st')
    (tmp_path / "parts" / ".staging-checkpoint-000004").mkdir()
    told = []
    again = train(tmp_path / "parts", *assignments, epochs=3, resume=True, tell=told.append)
    assert any("resumed from" in message for message in told)
    assert same_tensors(again.state_dict(), whole.state_dict())
    last = checkpoint.load(tmp_path / "whole" / "checkpoint-000006")
    assert same_tensors(checkpoint.load(tmp_path / "parts" / "checkpoint-000006"), last)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert not list((tmp_path / "parts").glob(".staging*"))


def test_a_damaged_checkpoint_is_skipped_with_a_message(tmp_path):
    train(tmp_path, epochs=2)
    path = tmp_path / "checkpoint-000004" / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    told = []
    again = train(tmp_path, epochs=2, resume=True, tell=told.append)
    assert any("checkpoint-000004 is damaged: state.safetensors is not what was written" in line for line in told)
    assert any("resumed from" in line and "checkpoint-000002" in line for line in told)
    assert again.epoch == 2
    (tmp_path / "checkpoint-000004" / "manifest.json").unlink()
    (tmp_path / "checkpoint-000002" / "state.json").unlink()
    told.clear()
    train(tmp_path, epochs=1, resume=True, tell=told.append)
    assert sum("is damaged" in line for line in told) == 2
    assert any("no whole checkpoint: the run starts from its beginning" in line for line in told)


def test_a_full_disk_leaves_the_earlier_checkpoint_intact(tmp_path, monkeypatch):
    trainer = train(tmp_path, epochs=1)

    def full(tensors, path):
        save_file(dict(list(tensors.items())[:2]), path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    trainer.step = 7
    with pytest.raises(CheckpointError, match=r"No space left on device. Earlier ones are untouched"):
        trainer.save()
    monkeypatch.undo()
    assert [path.name for path in checkpoint.found(tmp_path)] == ["checkpoint-000002"]
    assert checkpoint.load(tmp_path / "checkpoint-000002")["step"] == 2
    assert not list(tmp_path.glob(".staging*"))


def test_a_failure_of_the_writer_itself_is_told_apart(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(tensors, path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    trainer = train(tmp_path, epochs=1)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    trainer.step = 7
    with pytest.raises(CheckpointError, match="No space left on device"):
        trainer.save()
    assert not list(tmp_path.glob(".staging*"))


def test_damaged_checkpoints_of_later_steps_do_not_push_out_a_new_one(tmp_path):
    for step in (30, 40):
        (tmp_path / f"checkpoint-{step:06d}").mkdir()
    for step in (2, 4, 6):
        checkpoint.save(tmp_path, step, {"step": step}, lambda folder: None, keep_last=2)
    whole, state = checkpoint.newest(tmp_path, lambda line: None)
    assert (whole.name, state["step"]) == ("checkpoint-000006", 6)
    assert not (tmp_path / "checkpoint-000002").exists()


def test_only_the_last_checkpoints_are_kept(tmp_path):
    train(tmp_path, "checkpoints.keep_last=2", epochs=4)
    assert [path.name for path in checkpoint.found(tmp_path)] == ["checkpoint-000008", "checkpoint-000006"]


def test_a_folder_holds_one_run(tmp_path):
    train(tmp_path, epochs=1)
    with pytest.raises(InputError, match="holds a run: add --resume"):
        train(tmp_path, epochs=1)
    with pytest.raises(InputError, match=r"differs from this configuration in optimizer\.lr"):
        train(tmp_path, "optimizer.lr=1", epochs=1, resume=True)


@pytest.mark.parametrize("ema", ["0.0", "0.9"])
def test_a_checkpoint_loads_in_diffusers_at_full_strength(tmp_path, ema):
    assignments = (f"policy.ema={ema}", "policy.alpha=7", "optimizer.lr=0.05")
    trainer = train(tmp_path, *assignments, epochs=2)
    texts = [prompt.text for prompt in trainer.held_out]
    with trainer.averaged():
        mine = draw_pictures(
            trainer.model, [Prompt(text) for text in texts], evaluation_sampling(trainer.run), trainer.run.seed
        )
    from mogb_diffusion.seeds import keyed_noise

    noise = keyed_noise((3, 16, 16), [(0, "evaluation", text, texts[:n].count(text)) for n, text in enumerate(texts)])
    pipeline = tiny.build(0)
    how = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt", "max_sequence_length": 1}
    base = pipeline(texts, latents=noise.clone(), **how).images
    pipeline.load_lora_weights(tmp_path / "checkpoint-000004")
    found = pipeline(texts, latents=noise.clone(), **how).images
    assert float((found - mine).abs().max()) < 1e-5
    assert float((base - mine).abs().max()) > 1e-3


def test_rewards_that_fail_cost_their_signal_and_are_logged(tmp_path):
    rewards = (
        "rewards=[{name: 'tiny_run:EverySeventh', label: seventh}, {name: 'tiny_run:undefined', label: undefined}, "
        "{name: 'tiny_run:Sleepy', label: sleepy}, {name: world_preference, label: preference}]"
    )
    how = (rewards, "scoring={timeout: 0.5, retries: 0}", "batch.sampling_batch=2", "evaluation.prompts=[]")
    told = []
    trainer = train(tmp_path, *how, epochs=3, tell=told.append)
    total = {}
    for row in metrics(tmp_path):
        for name, counts in row.get("failures", {}).items():
            for kind, count in counts.items():
                total[name, kind] = total.get((name, kind), 0) + count
    assert total == {("seventh", "errors"): 1, ("undefined", "nan"): 9, ("sleepy", "timeouts"): 1}
    assert any("reward seventh: RuntimeError: the seventh call; 2 pictures have no signal from it" in m for m in told)
    assert any("reward sleepy: took longer than 0.5 s" in message for message in told)
    assert trainer.step == 6


def test_a_reward_that_keeps_failing_stops_the_run_with_a_checkpoint(tmp_path):
    rewards = "rewards=[{name: 'tiny_run:broken'}, {name: world_preference}]"
    how = (rewards, "scoring={retries: 1, max_failures: 3}", "batch.sampling_batch=2", "evaluation.prompts=[]")
    with pytest.raises(
        RewardFailure, match=r"'broken' failed 3 times in a row .* ConnectionError: no answer.* checkpoint"
    ):
        train(tmp_path, *how, epochs=3)
    assert checkpoint.load(checkpoint.found(tmp_path)[0])["epoch"] == 0
    with pytest.raises(RewardFailure):
        train(tmp_path, *how, epochs=3, resume=True)


def test_steps_with_bad_gradients_are_skipped_and_counted(tmp_path, monkeypatch):
    trainer = Trainer(small_run("epochs=1", "evaluation.prompts=[]"), tmp_path, tell=lambda message: None)
    before = trainer.policy.parameters[0].clone()
    inner = trainer.model.velocity

    def poisoned(latents, time, text):
        velocity = inner(latents, time, text)
        return velocity * float("nan") if torch.is_grad_enabled() else velocity

    trainer.model.velocity = poisoned
    trainer.train()
    assert trainer.step == 0
    assert torch.equal(trainer.policy.parameters[0], before)
    assert [row["skipped"] for row in metrics(tmp_path) if row["kind"] == "epoch"] == [2]


def direction(trainer, epoch=0):
    """The direction of the first step of an epoch, of a trainer whose old policy differs."""
    with torch.no_grad():
        for number, param in enumerate(trainer.policy.parameters):
            generator = torch.Generator().manual_seed(number)
            param += 0.05 * torch.randn(param.shape, generator=generator, dtype=param.dtype)
    trainer.on_policy = False
    plan = plan_epoch(trainer.run, trainer.mixture, epoch)
    clean = trainer.roll_out(plan)
    signal = trainer.signals(trainer.collect_rewards(plan), plan.rows, epoch)
    report = trainer.differentiate(plan, clean, signal, trainer.updates(plan)[0])
    return torch.cat([param.grad.flatten() for param in trainer.policy.parameters]), report


@pytest.mark.parametrize("gradients", ["slope", "full"])
def test_exact_and_every_step_agree_on_the_real_pipeline(gradients):
    """In float64 to rounding; in float32 to what rounding of gradients leaves, as two orders of summation do."""

    def found(mode, dtype, **options):
        chosen = {"mode": mode, "gradients": gradients} | options
        how = (f"balancing={json.dumps(chosen)}", f"model.dtype={dtype}", "loss.kl_weight=0.1")
        return direction(Trainer(small_run(*how, "batch.updates_per_epoch=1")))[0]

    def error(one, other):
        return float((one - other).double().norm() / other.double().norm())

    errors = {}
    for dtype in ("float64", "float32"):
        every = found("marble_every_step", dtype)
        assert every.dtype == getattr(torch, dtype)
        errors["marble_exact", dtype] = error(found("marble_exact", dtype), every)
        if dtype == "float64":
            amortised = found("marble", dtype, refresh_every=1, decay=0.0)
            errors["marble, N = 1, rho = 0", dtype] = error(amortised, every)
    print(gradients, {" ".join(key): f"{value:.1e}" for key, value in errors.items()})
    assert errors["marble_exact", "float64"] <= 1e-10
    assert errors["marble, N = 1, rho = 0", "float64"] <= 1e-10
    assert 1e-9 < errors["marble_exact", "float32"] <= 5e-6


def test_gradient_checkpointing_changes_nothing_but_memory():
    for mode in ("fixed", "marble_exact"):
        run = small_run(f"balancing={{mode: {mode}}}", "loss.kl_weight=0.1", "model.dtype=float64")
        plain, _ = direction(Trainer(run))
        saved = dataclasses.replace(run, model=dataclasses.replace(run.model, gradient_checkpointing=True))
        found, report = direction(Trainer(saved))
        torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-14)
        assert report.passes == (2 if mode == "marble_exact" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("assignments", [("model.dtype=bfloat16",), ("sampling.guidance=2", "sampling.solver=dpm2")])
def test_other_settings_train_too(assignments):
    trainer = train(None, *assignments, epochs=1)
    assert trainer.step == 2
    assert all(bool(torch.isfinite(param).all()) for param in trainer.policy.parameters)


def test_evaluation_uses_the_same_noise_every_time(tmp_path):
    trainer = train(tmp_path, "optimizer.lr=1e-30", "optimizer.weight_decay=0", epochs=1)
    scores = [row["scores"] for row in metrics(tmp_path) if row["kind"] == "evaluation"]
    assert scores[0] == scores[1]
    assert json.dumps(scores[0])
    assert trainer.epoch == 1


@pytest.mark.parametrize("where", ["offload", "precompute"])
def test_where_the_text_encoders_are_changes_nothing(tmp_path, where):
    plain = train(tmp_path / "plain", epochs=1)
    other = train(tmp_path / "other", f"model.text_encoders={where}", epochs=1)
    for mine, theirs in zip(plain.policy.parameters, other.policy.parameters, strict=True):
        assert torch.equal(theirs, mine)
    kinds = [row["kind"] for row in metrics(tmp_path / "plain")]
    assert [row["kind"] for row in metrics(tmp_path / "other")] == kinds
    assert (list(other.model._encoders()) == []) == (where == "precompute")
    assert len(other.model._known) > 0


def test_prompts_that_have_no_room_in_main_memory_are_refused(monkeypatch):
    run = small_run("epochs=0", "model.text_encoders=precompute", "evaluation.prompts=[]")
    trainer = Trainer(run)
    texts = {"", *(prompt.text for prompt in trainer.mixture.rows)}
    size = trainer.model.embedding_bytes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(readiness, "free_main_memory", lambda: 3.0 * size * len(texts) - 1)
    with pytest.raises(InputError) as caught:
        trainer.train()
    for words in ("model.text_encoders: precompute keeps", f"{len(texts)} prompts", "3 processes", "GB are free",
                  "set it to offload"):  # fmt: skip
        assert words in str(caught.value)
    assert set(trainer.model._known) == {""}  # nothing was encoded for it
    for free in (3.0 * size * len(texts), None):
        monkeypatch.setattr(readiness, "free_main_memory", lambda free=free: free)
        Trainer(run).train()


def test_free_main_memory_is_what_the_system_says():
    free = readiness.free_main_memory()
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert free is None or 0.001 * whole < free <= whole


def test_no_epochs_measure_the_model_as_it_is(tmp_path):
    trainer = train(tmp_path, epochs=0)
    assert [row["kind"] for row in metrics(tmp_path)] == ["evaluation"]
    assert metrics(tmp_path)[0]["name"] == "before"
    assert (tmp_path / "latest").read_text().strip() == "checkpoint-000000"
    assert all(torch.equal(a, b) for a, b in zip(trainer.policy.parameters, trainer.policy.old_parameters, strict=True))
    again = train(tmp_path, epochs=0, resume=True)
    assert again.step == 0
    assert len(metrics(tmp_path)) == 1
