"""Stable Diffusion 3.5 scaled down, in the hub's formats, with its five rewards: the whole way through the code."""

import contextlib
import json
import signal

import pytest
import scaled_sd35
import torch
from processes import launch
from tiny_run import metrics, same_tensors

from mogb_diffusion import checkpoint, config
from mogb_diffusion.cli import main
from mogb_diffusion.config import Sampling, load_run
from mogb_diffusion.distributed import start_ranks
from mogb_diffusion.models.sd3 import load_model
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rollouts import draw, plan_epoch
from mogb_diffusion.trainer import Trainer

NAMES = ("pickscore", "hpsv2", "clip", "ocr", "geneval")
TEXTS = ["a photo of a red bottle", 'two signs that say "OPEN", in the rain']
SHORT = (
    "epochs=1", "model.dtype=float32", "batch.groups=4", "batch.images_per_prompt=2", "batch.updates_per_epoch=2",
    "evaluation.images=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints and configuration for small pictures; the path of the configuration."""
    return scaled_sd35.write(tmp_path_factory.mktemp("scaled"), side=64)


def assigned(assignments):
    return [word for assignment in assignments for word in ("--set", assignment)]


def fresh(files):
    """The pipeline as anybody loads it."""
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(files.parent / "pipeline")
    for part in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        part.requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(files, dtype="float32"):
    choice = config.Model(source=str(files.parent / "pipeline"), dtype=dtype, max_sequence_length=16)
    return load_model(choice, torch.device("cpu"))


def noise(count=2, seed=4):
    return torch.randn(count, 16, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_an_epoch_of_five_real_rewards(files, tmp_path):
    assert main(["train", str(files), "--out", str(tmp_path / "run"), *assigned(SHORT)]) == 0
    rows = metrics(tmp_path / "run")
    [epoch] = [row for row in rows if row["kind"] == "epoch"]
    assert tuple(epoch["rewards"]) == NAMES
    assert all(value is not None for value in epoch["rewards"].values())
    assert epoch["failures"] == {}
    assert epoch["silent_groups"]["ocr"] == 1  # noise shows no text: the reader reads nothing,
    first = next(row for row in rows if row["kind"] == "step")
    assert first["solve"] == "solved"
    assert "ocr" in first["left_out"]  # and the reward is left out, by name
    assert first["alpha"]["ocr"] == 0
    assert max(first["norms"].values()) > 0
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    trained = checkpoint.newest(tmp_path / "run", pytest.fail)[1]["policy"]
    weights = {name: float(value.abs().max()) for name, value in trained.items() if "lora_B" in name}
    moved = {name: value for name, value in weights.items() if name.startswith("current.")}
    assert len(moved) == 8 + 8 + 7  # the last block puts out no text; the second attention, attn2, is left alone
    [still] = [name for name, value in moved.items() if value == 0]
    assert "transformer_blocks.2.attn.add_q_proj" in still  # for which nobody looks what the text asks for
    # What was saved is loaded by diffusers, and draws the same pictures as the trainer's own sampling.
    trainer = Trainer(load_run(str(files), SHORT))
    trainer.load_state_dict(checkpoint.newest(tmp_path / "run", pytest.fail)[1])
    with torch.no_grad():
        for param in trainer.policy.parameters:  # two steps change little: make it visible
            param.mul_(3.0)
        trainer.ema = None
        trainer.export(tmp_path / "lora")
        mine = trainer.model.decode(
            draw(trainer.model, [Prompt(text) for text in TEXTS], noise(), Sampling(steps=3, solver="euler"))
        )
    trainer.close()
    how = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "pt", "max_sequence_length": 16}
    pipeline = fresh(files)
    base = pipeline(TEXTS, latents=noise(), **how).images
    pipeline.load_lora_weights(tmp_path / "lora")
    found = pipeline(TEXTS, latents=noise(), **how).images
    error, moved = float((found - mine).abs().max()), float((base - mine).abs().max())
    print(f"largest difference of a pixel: {error:.1e}, of {moved:.1e} that the training moved")
    assert error < 2e-5
    assert moved > 2e-4


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_three_encoders_and_sampling_are_those_of_the_pipeline(files, guidance):
    pipeline, model = fresh(files), ours(files)
    tokens, _, pooled, _ = pipeline.encode_prompt(
        TEXTS, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=16
    )
    text = model.encode(TEXTS)
    assert tokens.shape == (2, 77 + 16, 48)
    torch.testing.assert_close(text.tokens, tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(text.pooled, pooled, rtol=0, atol=1e-5)
    assert float((tokens[0, 77:] - tokens[1, 77:]).abs().max()) > 0.1  # T5 read the prompts, too
    how = {"num_inference_steps": 4, "guidance_scale": guidance, "output_type": "pt", "max_sequence_length": 16}
    expected = pipeline(TEXTS, latents=noise(), **how).images
    mine = model.decode(draw(model, [Prompt(text) for text in TEXTS], noise(), Sampling(steps=4, guidance=guidance)))
    torch.testing.assert_close(mine, expected, rtol=0, atol=5e-5)
    assert float(expected.std()) > 0.05


def quick(files, *assignments):
    """A run without the reader of text, for tests of the gradients."""
    rewards = load_run(str(files)).rewards
    chosen = json.dumps([config.to_plain(reward) for reward in rewards if reward.key in ("hpsv2", "clip", "geneval")])
    sources = [
        {"path": str(files.parent / "text.txt"), "rewards": ["hpsv2", "clip"]},
        {"path": str(files.parent / "objects.jsonl"), "rewards": ["hpsv2", "clip", "geneval"]},
    ]
    return load_run(
        str(files),
        ["batch={groups: 4, images_per_prompt: 3, micro_batch: 4, updates_per_epoch: 1, timesteps: 1}", "epochs=1",
         f"rewards={chosen}", f"prompts={json.dumps(sources)}", "evaluation.prompts=[]", "sampling.steps=2",
         "loss.kl_weight=0.1", *assignments],
    )  # fmt: skip


def direction(run):
    """The direction of the first step, of a trainer whose old policy differs, and what the step and its engine say."""
    trainer = Trainer(run)
    with torch.no_grad():
        for number, param in enumerate(trainer.policy.parameters):
            generator = torch.Generator().manual_seed(number)
            scale = 0.05 if run.policy.kind == "lora" else 0.02 * float(param.std(correction=0)) + 1e-3
            param += scale * torch.randn(param.shape, generator=generator, dtype=param.dtype)
    trainer.on_policy = False
    plan = plan_epoch(trainer.run, trainer.mixture, 0)
    clean = trainer.roll_out(plan)
    signal = trainer.signals(trainer.collect_rewards(plan), plan.rows, 0)
    report = trainer.differentiate(plan, clean, signal, trainer.updates(plan)[0])
    trainer.close()
    found = torch.cat([param.grad.flatten() for param in trainer.policy.parameters])
    return found, report, trainer.balancer.engine.report


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_two_passes_hold_all_gradients_of_dual_and_joint_attention(files, kind):
    common = ("model.dtype=float64", f"policy.kind={kind}", "policy.ema=0")
    every, by_steps, _ = direction(quick(files, "balancing={mode: marble_every_step, gradients: full}", *common))
    exact, report, engine = direction(quick(files, "balancing={mode: marble_exact, gradients: full}", *common))
    error = float((exact - every).norm() / every.norm())
    print(f"{kind}: marble_exact against every step, float64: {error:.2e}")
    assert error < 1e-10
    assert by_steps.passes == 4  # three rewards, and the distance
    # The old policy is the reference here, so that the distance pulls where the common part does: three terms, two
    # passes. Had anything fallen back, there would be a reason, a warning, and four of them.
    assert report.passes == 2
    assert (engine.terms, engine.rank, engine.reason) == (3, 2, "")
    assert float(every.norm()) > 0


def test_spread_takes_gradients_from_a_share_of_the_micro_steps(files):
    _, report, engine = direction(quick(files, "balancing={mode: marble_spread, fraction: 0.3}", "loss.kl_weight=0"))
    assert report.kind == "solved"  # the first step has no coefficients yet
    assert engine.rank == 2
    run = quick(files, "balancing={mode: marble_spread, fraction: 0.3}", "batch.updates_per_epoch=2")
    trainer = Trainer(run)
    plan = plan_epoch(run, trainer.mixture, 0)
    clean = trainer.roll_out(plan)
    signal = trainer.signals(trainer.collect_rewards(plan), plan.rows, 0)
    reports = [trainer.update(plan, clean, signal, samples) for samples in trainer.updates(plan)]
    trainer.close()
    assert [report.kind for report in reports] == ["solved", "spread"]
    assert reports[1].passes == pytest.approx(1.5)  # of two micro-steps, one took two passes and one a single one


class Killed(Exception):
    """Stands for a signal."""


def trained(path, out, ranks=None, *, epochs=2, resume=False, assignments=()):
    trainer = Trainer(load_run(str(path), list(assignments)), out, ranks=ranks)
    go_on = trainer.train_epoch

    def cut(epoch):
        if epoch >= epochs:
            raise Killed
        go_on(epoch)

    trainer.train_epoch = cut
    with contextlib.suppress(Killed):
        trainer.train(resume=resume)
    return trainer


def both_on_rank(rank, world, folder, path, out):
    """A whole run, and one that stops after its first epoch and goes on."""
    ranks = start_ranks()
    whole = trained(path, out / "whole", ranks)
    trained(path, out / "parts", ranks, epochs=1)
    again = trained(path, out / "parts", ranks, resume=True)
    assert same_tensors(again.state_dict(), whole.state_dict())
    found = [param.detach().clone() for param in whole.policy.parameters]
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_epochs_with_resume_on_one_process_and_on_two(tmp_path):
    path = scaled_sd35.write(tmp_path / "files")
    assert main(["train", str(path), "--out", str(tmp_path / "one")]) == 0
    rows = metrics(tmp_path / "one")
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps if row["solve"] == "solved"] == [1, 11]  # N = 10
    assert len(steps) == scaled_sd35.STEPS
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert all(tuple(row["rewards"]) == NAMES and not row["failures"] for row in epochs)
    assert {path.name for path in (tmp_path / "one" / "samples").iterdir()} >= {"before.png", "after.png"}
    assert (tmp_path / "one" / "report.html").exists()

    trained(path, tmp_path / "cut", epochs=1)
    assert main(["train", str(path), "--out", str(tmp_path / "cut"), "--resume"]) == 0
    last = f"checkpoint-{scaled_sd35.STEPS:06d}"
    one = checkpoint.load(tmp_path / "one" / last)
    assert same_tensors(checkpoint.load(tmp_path / "cut" / last), one)
    assert metrics(tmp_path / "cut") == rows

    first, second = launch(2, both_on_rank, path, tmp_path / "two", seconds=900)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert metrics(tmp_path / "two" / "parts") == metrics(tmp_path / "two" / "whole")
    theirs = metrics(tmp_path / "two" / "whole")
    for name in ("pickscore", "hpsv2", "clip"):  # the first epoch's pictures are the same but for rounding
        found, expected = (next(r for r in some if r["kind"] == "epoch")["rewards"][name] for some in (theirs, rows))
        assert found == pytest.approx(expected, abs=5e-3)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_command_goes_on_where_it_was(tmp_path):
    path = scaled_sd35.write(tmp_path / "files", side=64)
    short = assigned([*SHORT[1:], "epochs=2", "evaluation.prompts=[]"])
    command = scaled_sd35.train_command(path, tmp_path / "run", "--no-report", *short)
    scaled_sd35.kill_after_first_epoch(command, tmp_path / "run")
    process = scaled_sd35.start([*command, "--resume"])
    assert process.wait() == 0
    assert process.returncode != -signal.SIGKILL
    assert [row["epoch"] for row in metrics(tmp_path / "run") if row["kind"] == "epoch"] == [1, 2]
