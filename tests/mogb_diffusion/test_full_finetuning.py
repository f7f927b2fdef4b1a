"""Full fine-tuning with weights that are spread over the ranks (``model.shard``, FSDP2)."""

from contextlib import contextmanager

import pytest
import torch
from processes import launch
from tiny_run import metrics, same_tensors, small_run

from mogb_diffusion import checkpoint, evaluation
from mogb_diffusion.config import ConfigError
from mogb_diffusion.distributed import Ranks, start_ranks
from mogb_diffusion.models.sd3 import SD3Model
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rollouts import draw
from mogb_diffusion.trainer import Trainer

FULL = ("policy.kind=full", "optimizer.lr=1e-4")
MODES = {
    "weighted_sum": "balancing={mode: weighted_sum}",
    "fixed": "balancing={mode: fixed, advantage_scale: 1.0}",
    "marble": "balancing={mode: marble, refresh_every: 2, gradients: full, coefficients: raw}",
    "marble_every_step": "balancing={mode: marble_every_step}",
    "upgrad": "balancing={mode: upgrad, gradients: slope}",
}


def full_run(*assignments):
    """Three optimizer steps on three groups; 9 pictures are 2 and 1 on two ranks, in one micro-batch each."""
    return small_run(
        *FULL, "epochs=1", "model.dtype=float64", "batch.updates_per_epoch=3", "batch.groups=3", "batch.timesteps=1",
        "sampling.steps=2", "loss.kl_weight=0.1", "evaluation.images=4", "evaluation.batch=2", "policy.ema=0.9",
        "batch.sampling_batch=5", *assignments,
    )  # fmt: skip


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def whole(trainer):
    """The weights in training, put together."""
    tensors = trainer.policy.gathered(True)
    return flat(trainer.policy.parameters if tensors is None else [tensors[name] for name in trainer.policy.names])


def trained(ranks, *assignments, out=None):
    """A trainer after its run; ``trainer.first`` is the whole direction of the first step, before it is clipped.

    Pictures are float32, and drawn in other batches on other ranks: their last digit, 3e-8 of a reward, is cut off.
    """
    trainer = Trainer(full_run(*assignments), out, ranks=ranks)
    trainer.first, clip, collect = None, trainer._clip, trainer.collect_rewards
    trainer.collect_rewards = lambda plan: collect(plan).round(decimals=3)

    def noted():
        if trainer.first is None:  # of DTensors every rank has to gather the whole
            grads = [param.grad for param in trainer.policy.parameters]
            trainer.first = flat(grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone() for grad in grads)
        return clip()

    trainer._clip = noted
    trainer.train()
    assert trainer.step == 3
    return trainer


def shard_on_rank(rank, world, folder, out):
    ranks, found = start_ranks(), {}
    for name, balancing in MODES.items():
        trainer = trained(ranks, balancing, "model.shard=true", "evaluation.prompts=[]")
        found[name], found[f"gradient of {name}"] = whole(trainer), trainer.first
        if name == "weighted_sum":
            held = sum(param.to_local().numel() for param in trainer.policy.parameters)
            states = [state["exp_avg"].to_local().numel() for state in trainer.optimizer.state.values()]
            found["numbers"] = [held, sum(states), len(found[name])]
    saved = trained(ranks, MODES["marble"], "model.shard=true", "model.gradient_checkpointing=true")
    found["checkpointed"] = whole(saved)

    # Two epochs at once, and in two parts; a picture by the weights as they are spread, and what a folder says.
    how = (MODES["marble"], "model.shard=true", "epochs=2", "model.dtype=float32")
    once = Trainer(full_run(*how), out / "once", ranks=ranks)
    once.train()
    parts = Trainer(full_run(*how), out / "parts", ranks=ranks)
    go_on = parts.train_epoch
    parts.train_epoch = lambda epoch: go_on(epoch) if epoch < 1 else exec("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        parts.train()
    again = Trainer(full_run(*how), out / "parts", ranks=ranks)
    again.train(resume=True)
    assert again._resumed
    assert torch.equal(whole(once), whole(again))
    with once.averaged(), torch.no_grad():
        noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        latents = draw(once.model, [Prompt("a photo of a red square"), Prompt("two circles")], noise, once.run.sampling)
        found["picture"] = once.model.decode(latents)
    once.export(out / "exported")
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_spread_weights_train_as_whole_ones_do(tmp_path):
    trainers = {name: trained(Ranks(), balancing, "evaluation.prompts=[]") for name, balancing in MODES.items()}
    alone = {name: whole(trainer) for name, trainer in trainers.items()}
    base = whole(Trainer(full_run()))
    answers = launch(2, shard_on_rank, tmp_path, seconds=800)
    first, second = answers
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name])
        error, moved = float((first[name] - expected).abs().max()), float((expected - base).abs().max())
        print(f"{name}: largest difference of a weight {error:.1e}, of {moved:.1e} that three steps moved")
        assert error <= 1e-12
        assert moved > 1e-4
        gradient, wanted = first[f"gradient of {name}"], trainers[name].first  # AdamW would hide a wrong scale of it
        assert torch.equal(gradient, second[f"gradient of {name}"])
        error, size = float((gradient - wanted).abs().max()), float(wanted.abs().max())
        print(f"{name}: largest difference of a gradient {error:.1e}, of {size:.1e}")
        assert size > 0
        assert error <= 1e-12 * size
    torch.testing.assert_close(first["checkpointed"], first["marble"], rtol=0, atol=1e-12)
    for (held, states, total), other in ((first["numbers"], second), (second["numbers"], first)):
        assert held == states
        assert held + other["numbers"][0] == total
        assert abs(held / total - 0.5) < 0.01

    # Whole weights are in the checkpoint: one process goes on from it, or loads what was exported.
    lines = [[row for row in metrics(tmp_path / name) if row["kind"] != "evaluation"] for name in ("once", "parts")]
    assert lines[0] == lines[1]
    states = [checkpoint.load(tmp_path / name / "checkpoint-000006") for name in ("once", "parts")]
    assert same_tensors(*states)
    trainer = Trainer(full_run(MODES["marble"], "epochs=2", "model.dtype=float32"))
    trainer.load_state_dict(states[0])
    from diffusers import SD3Transformer2DModel

    for folder in (tmp_path / "exported", tmp_path / "once" / "checkpoint-000006"):
        loaded = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
        with trainer.averaged():
            assert same_tensors(dict(loaded.state_dict()), dict(trainer.model.transformer.state_dict()))
    with trainer.averaged(), torch.no_grad():
        noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        prompts = [Prompt("a photo of a red square"), Prompt("two circles")]
        mine = trainer.model.decode(draw(trainer.model, prompts, noise, trainer.run.sampling))
    torch.testing.assert_close(mine, first["picture"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (("policy.kind=lora",), r"model\.shard: needs policy\.kind: full"),
        (("balancing={mode: marble_exact}",), r"balancing\.mode: .*model\.shard; use marble_every_step"),
        (("balancing={mode: marble_spread}",), r"balancing\.mode: .*model\.shard; use marble, but"),
        (("balancing={mode: marble_script}",), r"balancing\.mode: .*use marble or marble_every_step"),
        (("balancing={mode: marble, shrinkage: true}",), r"balancing\.shrinkage: .*model\.shard"),
    ],
)
def test_what_needs_whole_weights_is_refused(assignments, message):
    with pytest.raises(ConfigError, match=message):
        small_run(*FULL, "balancing={mode: fixed}", "model.shard=true", *assignments)


def test_methods_that_read_whole_gradients_are_refused():
    with pytest.raises(ConfigError, match=r"balancing\.mode: 'trimmed_mean' reads whole gradients"):
        Trainer(small_run(*FULL, "balancing={mode: trimmed_mean}", "model.shard=true"))


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (
            ("batch.groups=3", "batch.micro_batch=1"),
            r"batch\.micro_batch: .* 9 pictures on 2 ranks, 1 at once, are 4 or 5",
        ),
        (("batch.sampling_batch=1", "batch.groups=3"), r"batch\.sampling_batch: .*9 pictures"),
        (("evaluation.images=5", "evaluation.batch=2"), r"evaluation\.batch: .* 5 pictures on 2 ranks, 2 at once"),
    ],
)
def test_ranks_that_would_wait_for_each_other_are_refused(assignments, message, monkeypatch):
    monkeypatch.setattr(Ranks, "max", lambda self, value: value)  # the other one says the same
    run = small_run(*FULL, "balancing={mode: fixed}", "model.shard=true", "batch.updates_per_epoch=1", *assignments)
    with pytest.raises(ConfigError, match=message):
        Trainer(run, ranks=Ranks(0, 2))


def test_nothing_gathers_weights_where_another_rank_would_miss_it(tmp_path, monkeypatch):
    inside, passes, drawn = [], [], []

    class Two(Ranks):
        """Both ranks of two in one process: the other one does nothing."""

        @contextmanager
        def together(self):
            inside.append(True)
            yield
            inside.pop()

    def velocity(self, *args, **options):
        passes.append(bool(inside))
        return forward(self, *args, **options)

    def decode(self, latents):
        drawn.append(bool(inside))
        return to_pixels(self, latents)

    forward, to_pixels = SD3Model.velocity, SD3Model.decode
    monkeypatch.setattr(SD3Model, "velocity", velocity)
    monkeypatch.setattr(SD3Model, "decode", decode)
    settings = ("balancing={mode: fixed}", "tracking.samples=2", "tracking.samples_every=1")
    examined, real = [], evaluation.examine

    def examine(*args, spread, **options):
        examined.append(spread)
        return real(*args, spread=True, **options)

    for shard in (True, False):
        passes.clear(), drawn.clear()
        if shard:
            monkeypatch.setattr(evaluation, "examine", examine)
        else:
            monkeypatch.setattr(evaluation, "examine", real)
        trainer = Trainer(full_run(*settings, f"model.shard={str(shard).lower()}"), tmp_path / str(shard), ranks=Two())
        trainer.train()
        assert trainer.step == 3
        assert set(passes) == {not shard}
        assert set(drawn) == {not shard}
    assert examined == [False] * 2  # one process spreads nothing


def test_alone_nothing_is_spread():
    trainer = Trainer(
        small_run(*FULL, "balancing={mode: fixed}", "model.shard=true", "epochs=1", "evaluation.prompts=[]")
    )
    trainer.train()
    assert trainer.step == 2
    assert trainer.policy.gathered(True) is None
