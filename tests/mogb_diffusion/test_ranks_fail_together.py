"""What fails on one rank fails on all of them at once, and a start that failed leaves nothing behind."""

import sys

import pytest
import torch
from processes import launch
from tiny_run import metrics, small_run, train

from mogb_diffusion import checkpoint
from mogb_diffusion import trainer as trainer_module
from mogb_diffusion.distributed import Ranks, start_ranks
from mogb_diffusion.errors import CheckpointError, InputError
from mogb_diffusion.trainer import Trainer


def test_alone_an_error_is_itself():
    with pytest.raises(KeyError), Ranks().together():
        raise KeyError("x")


def outcome(work):
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def trainers_on_rank(rank, world, folder, shared):
    """A run, and what happens to all ranks when the first one cannot write."""
    ranks, told = start_ranks(), []
    run = small_run("epochs=1", "evaluation.prompts=[]", "checkpoints.every=1")
    packages = small_run("epochs=1", "evaluation.prompts=[]", "tracking.tensorboard=true")
    found = {}
    if rank == 0:
        sys.modules["torch.utils.tensorboard"] = None
    found["package"] = outcome(Trainer(packages, shared / "package", ranks=ranks).train)
    if rank == 0:
        (shared / "file").write_text("in the way")
    found["open"] = outcome(Trainer(run, shared / "file", ranks=ranks).train)
    trainer = Trainer(run, shared / "run", ranks=ranks)
    found["first"] = outcome(trainer.train)
    found["present"] = outcome(Trainer(run, shared / "run", ranks=ranks).train)
    if rank == 0:
        checkpoint.save = refused
        (shared / "run" / "checkpoint-000002").rename(shared / "run" / ".aside-checkpoint-000002")
    trainer.out = shared / "run"
    found["save"] = outcome(trainer.save)
    again = Trainer(small_run("epochs=1", "evaluation.prompts=[]", "checkpoints.every=1"), shared / "run", ranks=ranks)
    again.tell = told.append
    found["resume"] = outcome(lambda: again.train(resume=True))
    found["told"] = told
    torch.save(found, folder / f"{rank}.pt")


def starts_on_rank(rank, world, folder):
    """What happens to both ranks when the second one cannot start, draw, score or train."""
    ranks, found = start_ranks(), {}
    run = small_run("epochs=1", "evaluation.prompts=[]", "batch.updates_per_epoch=1", "sampling.steps=2")
    for name in ("make_scorer", "load_model", "load_mixture"):
        kept = getattr(trainer_module, name)
        if rank == 1:
            setattr(trainer_module, name, cannot(InputError, f"{name}: not on this machine"))
        found[name] = outcome(lambda: Trainer(run, ranks=ranks))
        setattr(trainer_module, name, kept)
    for part, name in (("model", "decode"), ("scorer", "submit"), ("scorer", "collect"), ("", "_micro_step")):
        trainer = Trainer(run, ranks=ranks)
        if rank == 1:
            setattr(getattr(trainer, part) if part else trainer, name, cannot(RuntimeError, f"{name}: out of memory"))
        found[name] = outcome(lambda trainer=trainer: trainer.train_epoch(0))
        trainer.close()
    torch.save(found, folder / f"{rank}.pt")


def cannot(kind, text):
    def fail(*args, **options):
        raise kind(text)

    return fail


def test_a_rank_that_cannot_start_or_draw_stops_the_others():
    first, second = launch(2, starts_on_rank, seconds=60)
    for name in ("make_scorer", "load_model", "load_mixture"):
        assert first.pop(name) == second.pop(name) == f"InputError: {name}: not on this machine"
    assert list(first) == ["decode", "submit", "collect", "_micro_step"]
    for name, said in second.items():
        assert said == f"RuntimeError: {name}: out of memory"
        assert first[name] == f"RuntimeError: rank 1: {said}"


def refused(*args, **kwargs):
    raise CheckpointError("the disk is full")


@pytest.mark.slow
def test_a_first_rank_that_cannot_write_stops_all_of_them_at_once(tmp_path):
    answers = launch(2, trainers_on_rank, tmp_path, seconds=100)
    for found in answers:
        assert found["package"].startswith("InputError: tracking.tensorboard: needs tensorboard")
        assert "file" in found["open"]
        assert found["first"] == "done"
        assert found["present"].startswith("InputError: ")
        assert "holds a run" in found["present"]
        assert found["save"] == "CheckpointError: the disk is full"
        assert found["resume"] == "done"
        assert any("resumed from" in line for line in found["told"])
    assert not (tmp_path / "package").exists()
    assert (tmp_path / "run" / "checkpoint-000002").is_dir()
    assert not list((tmp_path / "run").glob(".aside*"))


def test_a_start_that_failed_does_not_refuse_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="needs wandb"):
        train(tmp_path / "run", "tracking.wandb=x", epochs=1)
    assert not (tmp_path / "run").exists()

    class Wandb:
        def init(self, **kwargs):
            raise RuntimeError("not logged in")

    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    with pytest.raises(RuntimeError, match="not logged in"):
        train(tmp_path / "run", "tracking.wandb=x", epochs=1)
    train(tmp_path / "run", epochs=1)
    assert metrics(tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*.new"))
