import dataclasses
import math
import threading
import time

import pytest
import torch

from mogb_diffusion import config
from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rewards import BUILT_IN, load
from mogb_diffusion.scoring import Scorer, make_scorer

IMAGES = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 3, 2, 2) / 10
PROMPTS = [Prompt(f"prompt {i}", target_text="A" if i % 2 else None) for i in range(6)]
NAN = math.nan


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


class Signs:
    specialist = True

    def applies(self, prompt):
        return prompt.target_text is not None

    def __call__(self, images, prompts):
        assert all(self.applies(prompt) for prompt in prompts)
        return torch.full((len(prompts),), 2.0)


def scorer(settings=None, **rewards):
    return Scorer(rewards, settings or config.Scoring(timeout=5.0))


def score(maker, times=1):
    for _ in range(times):
        maker.submit(IMAGES, PROMPTS)
    return maker.collect()


def test_rows_are_rewards_and_columns_pictures():
    found = scorer(brightness=brightness, signs=Signs())
    torch.testing.assert_close(
        score(found),
        torch.tensor([[0, 0.1, 0.2, 0.3, 0.4, 0.5], [NAN, 2, NAN, 2, NAN, 2]], dtype=torch.float64),
        equal_nan=True, rtol=1e-6, atol=1e-7,
    )  # fmt: skip
    assert found.counts == {
        "brightness": {"retries": 0, "inf": 0, "nan": 0},
        "signs": {"retries": 0, "inf": 0, "nan": 0},
    }
    assert score(found, times=2).shape == (2, 12)


def test_prompts_say_which_rewards_may_judge_them():
    found = scorer(brightness=brightness)
    found.submit(IMAGES[:2], [Prompt("a", rewards=()), Prompt("b", rewards=("brightness",))])
    assert found.collect().isnan().tolist() == [[True, False]]


def test_batches_are_as_large_as_asked():
    sizes = []

    def counting(images, prompts):
        sizes.append(len(prompts))
        return images.mean(dim=(1, 2, 3))

    maker = Scorer({"counting": counting}, batch_sizes={"counting": 4})
    expected = scorer(brightness=brightness)
    assert torch.equal(score(maker), score(expected))
    assert sizes == [4, 2]


def test_scoring_goes_on_in_the_background():
    gate = threading.Event()

    def slow(images, prompts):
        gate.wait(5)
        return torch.zeros(len(prompts))

    maker = scorer(slow=slow)
    maker.submit(IMAGES, PROMPTS)  # returns although the reward waits
    gate.set()
    assert maker.collect().abs().sum() == 0


def test_a_reward_that_raises_is_tried_again():
    calls = []

    def flaky(images, prompts):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of luck")
        return torch.ones(len(prompts))

    maker = scorer(config.Scoring(retries=1), flaky=flaky)
    assert score(maker).tolist() == [[1.0] * 6]
    assert maker.counts["flaky"] == {"retries": 1, "inf": 0, "nan": 0}
    assert maker.messages == []


def test_failures_cost_their_own_signal_and_are_counted():
    def broken(images, prompts):
        raise KeyError("no key")

    def partly(images, prompts):
        return torch.tensor([NAN, math.inf, 1, 2, 3, 4])

    def misshapen(images, prompts):
        return torch.ones(2)

    maker = scorer(config.Scoring(retries=0), broken=broken, partly=partly, misshapen=misshapen, fine=brightness)
    found = score(maker)
    assert found.isnan().tolist() == [[True] * 6, [True, True] + [False] * 4, [True] * 6, [False] * 6]
    assert maker.counts["broken"]["errors"] == 1
    assert (maker.counts["partly"]["nan"], maker.counts["partly"]["inf"]) == (1, 1)
    assert any("KeyError: 'no key'; 6 pictures" in message for message in maker.messages)
    assert any("one number per picture, [6], but returned [2]" in message for message in maker.messages)
    assert maker.broken == ""


def test_a_reward_that_hangs_is_given_up_and_the_next_call_works():
    calls = []
    release = threading.Event()

    def hanging(images, prompts):
        calls.append(1)
        if len(calls) == 1:
            release.wait(20)
        return torch.ones(len(prompts))

    maker = scorer(config.Scoring(timeout=0.2), hanging=hanging, fine=brightness)
    begun = time.monotonic()
    found = score(maker, times=2)
    assert time.monotonic() - begun < 5
    assert found.isnan().sum(dim=1).tolist() == [6, 0]  # the second call is fine, as is the other reward
    assert maker.counts["hanging"]["timeouts"] == 1
    release.set()  # the thread that was given up must not take jobs from the new one
    assert score(maker).isnan().sum() == 0


def test_failures_in_a_row_break_the_run_and_a_success_starts_anew():
    outcomes = iter([False, False, True, False, False, False])

    def moody(images, prompts):
        if not next(outcomes):
            raise RuntimeError("no")
        return torch.ones(len(prompts))

    maker = scorer(config.Scoring(retries=0, max_failures=3), moody=moody)
    for expected in (False, False, False, False, False, True):
        score(maker)
        assert bool(maker.broken) == expected
    assert "'moody' failed 3 times in a row" in maker.broken
    assert "RuntimeError: no" in maker.broken


class Undecided:
    """Fails to say whether it applies to some prompts, or to all of them."""

    def __init__(self, to=("prompt 0", "prompt 2")):
        self.to = to

    def applies(self, prompt):
        if prompt.text in self.to:
            raise KeyError("include")
        return prompt.text != "prompt 5"

    def __call__(self, images, prompts):
        return torch.ones(len(prompts))


def test_a_reward_that_fails_to_say_whether_it_applies_costs_those_prompts_and_is_counted():
    maker = scorer(config.Scoring(max_failures=2), undecided=Undecided(), fine=brightness)
    for _ in range(3):
        found = score(maker)
        assert found.isnan().tolist() == [[True, False, True, False, False, True], [False] * 6]
        assert maker.counts == {
            "undecided": {"errors": 2, "retries": 0, "inf": 0, "nan": 0}, "fine": {"retries": 0, "inf": 0, "nan": 0},
        }  # fmt: skip
        assert maker.messages == ["reward undecided: applies: KeyError: 'include'; 2 pictures have no signal from it"]
        assert maker.broken == ""  # the other prompts were scored
    assert score(maker, times=2)[0].isnan().tolist() == [True, False, True, False, False, True] * 2


def test_a_reward_that_never_says_whether_it_applies_breaks_the_run():
    maker = scorer(config.Scoring(max_failures=2), undecided=Undecided([prompt.text for prompt in PROMPTS]))
    for expected in (False, True):
        assert score(maker).isnan().all()
        assert maker.counts["undecided"]["errors"] == 6
        assert bool(maker.broken) == expected
    assert "applies: KeyError: 'include'" in maker.broken


class Coy:
    @property
    def specialist(self):
        raise RuntimeError("ask later")

    def __call__(self, images, prompts):
        return torch.ones(len(prompts))


def test_a_reward_that_fails_to_say_whether_it_is_a_specialist_is_named():
    spec = config.Reward(name=f"{__name__}:Coy", label="coy")
    with pytest.raises(InputError, match=r"'coy' does not tell .* raises RuntimeError: ask later.*specialist: true"):
        make_scorer([spec], config.Scoring())
    made = make_scorer([dataclasses.replace(spec, specialist=True)], config.Scoring())
    assert made.special == {"coy"}


def test_nan_of_a_specialist_without_applies_is_no_failure():
    def picky(images, prompts):
        return torch.tensor([1.0 if prompt.target_text else NAN for prompt in prompts])

    maker = Scorer({"picky": picky}, specialists=["picky"])
    assert score(maker).isnan().sum() == 3
    assert maker.counts["picky"]["nan"] == 0


def test_rewards_are_found_by_name_or_address():
    made = make_scorer(
        [config.Reward(name="world_text", label="text"), config.Reward(name=f"{__name__}:brightness")], config.Scoring()
    )
    assert list(made.rewards) == ["text", "brightness"]
    for name in BUILT_IN:
        if name.startswith("world_"):  # the others load weights
            assert load(name).applies(Prompt("a red circle")) in (True, False)
    for name, options, words in (
        ("beauty", {}, "There is no reward 'beauty'. Known ones: .*world_preference"),
        ("nowhere.at.all:Reward", {}, "cannot be imported"),
        (f"{__name__}:Nothing", {}, "has no Nothing"),
        (f"{__name__}:brightness", {"x": 1}, "takes no options"),
        ("world_text", {"scales": 1}, "cannot be made with"),
    ):
        with pytest.raises(InputError, match=words):
            load(name, **options)
