import pytest
import torch
from processes import launch
from tiny_run import small_run

from mogb_diffusion.config import ConfigError
from mogb_diffusion.distributed import Ranks, start_ranks
from mogb_diffusion.errors import CheckpointError, RewardFailure
from mogb_diffusion.trainer import Trainer

MODES = ("marble_exact", "marble_every_step", "marble", "weighted_sum", "cagrad", "trimmed_mean")


def trained(ranks):
    """The weights after three optimizer steps, by mode."""
    found = {}
    for mode in MODES:
        run = small_run(
            "epochs=1", "model.dtype=float64", f"balancing={{mode: {mode}}}", "batch.updates_per_epoch=3",
            "batch.groups=3", "batch.timesteps=2", "sampling.steps=3", "loss.kl_weight=0.1", "evaluation.prompts=[]",
        )  # fmt: skip
        trainer = Trainer(run, ranks=ranks)
        trainer.train()
        assert trainer.step == 3
        found[mode] = torch.cat([param.detach().flatten() for param in trainer.policy.parameters])
    return found


def train_on_rank(rank, world, folder):
    torch.save(trained(start_ranks()), folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_train_as_one():
    alone = trained(Ranks())
    first, second = launch(2, train_on_rank, seconds=280)
    for mode in MODES:
        assert torch.equal(first[mode], second[mode]), mode
        assert float((first[mode] - alone[mode]).abs().max()) <= 1e-6, mode
        assert float((first[mode] - alone[mode]).abs().max()) > 0, mode  # it did not run alone


SAID = "keine Ausgabe möglich: 配列"


def raised(ranks, failing, error):
    try:
        with ranks.together():
            if ranks.rank in failing:
                raise error
    except Exception as caught:
        return type(caught).__name__, str(caught)
    return None


def failures(ranks):
    """What each rank raises when some of them fail in a block that they share."""
    return [
        raised(ranks, (), None),
        raised(ranks, (0,), ConfigError("batch.groups", SAID)),
        raised(ranks, (1, 2), CheckpointError(f"from {ranks.rank}")),
        raised(ranks, (2,), RewardFailure("")),
        raised(ranks, (0,), OSError(28, "No space left on device")),
        raised(ranks, (1,), KeyError("x")),
        raised(ranks, (), None),
    ]


def gather_on_rank(rank, world, folder):
    ranks = start_ranks()
    mine = torch.arange(7.0)[list(ranks.mine(7))]
    gathered = ranks.gather(mine[:, None] * torch.ones(1, 2), 7)
    total = ranks.sum(torch.tensor([float(rank), 1.0]))
    found = [gathered, total, ranks.any(rank == 1), ranks.any(False), ranks.max(-rank), failures(ranks)]
    torch.save(found, folder / f"{rank}.pt")


def test_ranks_gather_unequal_parts_and_fail_together():
    answers = launch(3, gather_on_rank)
    for gathered, total, some, none, largest, _ in answers:
        torch.testing.assert_close(gathered, torch.arange(7.0)[:, None] * torch.ones(1, 2))
        assert total.tolist() == [3, 3]
        assert (some, none, largest) == (True, False, 0)
    own = ("ConfigError", f"batch.groups: {SAID}")
    full = ("OSError", "[Errno 28] No space left on device")
    other = ("RuntimeError", "rank 1: KeyError: 'x'")
    expected = [  # the rank that failed has its own error, the others that of the first one
        [own, ("CheckpointError", "from 1"), ("RewardFailure", ""), full, other],
        [("InputError", own[1]), ("CheckpointError", "from 1"), ("RewardFailure", ""), full, ("KeyError", "'x'")],
        [("InputError", own[1]), ("CheckpointError", "from 2"), ("RewardFailure", ""), full, other],
    ]
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer[5] == [None, *wanted, None]


def test_every_sample_is_somebodys():
    for size in (1, 2, 3, 5):
        parts = [Ranks(rank, size) for rank in range(size)]
        assert [n for ranks in parts for n in ranks.mine(11)] == list(range(11))
        assert sorted(n for ranks in parts for n in ranks.share(range(11))) == list(range(11))


def test_more_ranks_than_pictures_are_refused():
    with pytest.raises(ConfigError, match="an update has only 3 pictures for 4 ranks"):
        Trainer(small_run(), ranks=Ranks(0, 4))
