import math

import pytest
import torch
from processes import launch

from mogb_diffusion import evaluation
from mogb_diffusion.config import Reward, Sampling
from mogb_diffusion.distributed import Ranks
from mogb_diffusion.errors import InputError
from mogb_diffusion.models.sd3 import Text
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.scoring import Scorer

SQUARE = "a photo of a red square"


class Painter:
    """Draws without a network: the clean picture depends on the noise and on the letters of the prompt."""

    latent_shape = (3, 4, 4)
    dtype = torch.float64
    device = torch.device("cpu")

    def prepare(self, texts):
        self.prepared = {*getattr(self, "prepared", ()), *texts}

    def encode(self, texts):
        assert set(texts) <= self.prepared
        return Text(torch.zeros(len(texts), 1, 1), torch.tensor([[float(sum(map(ord, t)) % 97)] for t in texts]))

    def velocity(self, latents, time, text):
        return torch.sin(latents) * time + text.pooled[:, :, None, None] / 97

    def sigmas(self, steps):
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def decode(self, latents):
        return torch.sigmoid(latents)


def model():
    return Painter()


TEXTS = (SQUARE, "a photo of two blue circles", SQUARE, 'a sign that says "A"', "a photo of a green triangle")


def drawn(ranks):
    """A number for every picture of TEXTS, in which every pixel counts."""
    weights = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    scorer = Scorer({"hash": lambda images, prompts: (images.double() * weights).sum(dim=(1, 2, 3))})
    found = evaluation.examine(model(), scorer, [Prompt(t) for t in TEXTS], Sampling(steps=2), 3, 2, ranks)
    scorer.close()
    return found.rewards


def draw_on_rank(rank, world, folder):
    torch.save(drawn(Ranks(rank, world)), folder / f"{rank}.pt")


def test_two_processes_draw_every_prompt_once_and_as_one_does():
    alone = drawn(Ranks())
    assert len(set(alone[0].tolist())) == len(TEXTS)  # also the two pictures of one prompt differ
    for found in launch(2, draw_on_rank):
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-12)


def test_noise_belongs_to_the_prompt():
    prompts = [Prompt(text) for text in TEXTS]
    pictures = evaluation.draw_pictures(model(), prompts, Sampling(steps=2), 3)
    order = [3, 4, 0, 1, 2]  # the two of one text stay in their order
    again = evaluation.draw_pictures(model(), [prompts[n] for n in order], Sampling(steps=2), 3, batch=2)
    torch.testing.assert_close(again, pictures[order], rtol=0, atol=1e-12)
    assert float((pictures[0] - pictures[2]).abs().max()) > 0.1
    other = evaluation.draw_pictures(model(), prompts[:1], Sampling(steps=2), 4)
    assert float((other - pictures[:1]).abs().max()) > 0.1


def test_no_more_pictures_wait_than_fit(monkeypatch):
    monkeypatch.setattr(evaluation, "_WAITING", 4)
    scorer = Scorer({"mean": lambda images, prompts: images.mean(dim=(1, 2, 3))})
    most = []
    batches = ((torch.full((2, 3, 4, 4), float(n)), [Prompt("x")] * 2) for n in range(5))

    def watched():
        for batch in batches:
            most.append(scorer._size)
            yield batch

    found = evaluation.measure(scorer, watched())
    scorer.close()
    assert found.rewards.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]]
    assert max(most) < 4


def test_failures_of_rewards_are_counted_and_cost_their_pictures():
    def moody(images, prompts):
        if prompts[0].text == "b":
            raise ValueError("I do not like b")
        return torch.tensor([math.inf, 2.0])

    scorer = Scorer({"moody": moody, "mean": lambda images, prompts: images.mean(dim=(1, 2, 3))})
    pictures = torch.ones(2, 3, 4, 4)
    found = evaluation.measure(scorer, [(pictures, [Prompt("a")] * 2), (pictures, [Prompt("b")] * 2)])
    scorer.close()
    assert found.rewards[0].tolist()[1] == 2
    assert found.rewards[0].isnan().tolist() == [True, False, True, True]
    assert found.rewards[1].tolist() == [1, 1, 1, 1]
    assert found.failures == {"moody": {"errors": 1, "inf": 1}}
    assert "I do not like b" in found.messages[0]


def test_scores_by_category_by_hand():
    # Categories of 1, 2 and 3 pictures; the last reward of the second is missing.
    prompts = [Prompt("x", metadata={"tag": tag}) for tag in ("a", "b", "b", "c", "c", "c")] + [Prompt("y")]
    row = torch.tensor([1.0, 0.0, math.nan, 1.0, 0.0, 0.0, 9.0], dtype=torch.float64)
    found = evaluation.by_category(row, prompts)
    assert {tag: (score.mean, score.count) for tag, score in found.items()} == {
        "a": (1.0, 1), "b": (0.0, 1), "c": (pytest.approx(1 / 3), 3),
    }  # fmt: skip
    whole = evaluation.category_mean(found.values())
    assert whole.mean == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert whole.count == 5
    pair = [evaluation.Score(1.0, 0.3, 4), evaluation.Score(0.0, 0.4, 9)]
    assert evaluation.category_mean(pair).error == pytest.approx(0.25)  # sqrt(0.09 + 0.16) / 2


def test_geneval_and_rewards_that_say_so_are_averaged_by_category():
    assert evaluation.is_by_category(Reward(name="geneval"), object())
    assert evaluation.is_by_category(Reward(name="x:Remote", label="geneval"), object())
    assert not evaluation.is_by_category(Reward(name="ocr"), object())
    prompts = [Prompt("x", metadata={"tag": tag}) for tag in ("a", "b", "b", "b")]
    specs = (Reward(name="geneval"), Reward(name="ocr"))
    scorer = Scorer({"geneval": lambda *_: None, "ocr": lambda *_: None})
    measured = evaluation.Measured(torch.tensor([[1.0, 0, 0, 1]] * 2, dtype=torch.float64), {}, ())
    found = evaluation.scores_of(measured, specs, scorer, prompts)
    assert found["geneval"]["mean"] == pytest.approx(2 / 3)
    assert found["ocr"] == {"mean": 0.5, "error": pytest.approx(math.sqrt(1 / 3 / 4)), "count": 4}


def fail_on_rank(rank, world, folder):
    class Moody(Painter):
        def decode(self, latents):
            if rank == 1:
                raise InputError("no paint left")
            return super().decode(latents)

    scorer = Scorer({"mean": lambda images, prompts: images.mean(dim=(1, 2, 3))})
    with pytest.raises(InputError, match="no paint left"):
        evaluation.examine(Moody(), scorer, [Prompt(t) for t in TEXTS], Sampling(steps=2), 3, 2, Ranks(rank, world))
    torch.save(torch.ones(1), folder / f"{rank}.pt")


@pytest.mark.slow
def test_a_rank_that_fails_leaves_no_other_waiting():
    assert launch(2, fail_on_rank, seconds=200) == [torch.ones(1)] * 2
