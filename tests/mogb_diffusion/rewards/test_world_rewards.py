"""The five rewards of the tiny world: on clean drawings, on corrupted ones, on noise."""

import dataclasses
import itertools

import pytest
import torch

from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rewards import load
from mogb_diffusion.rewards.world import REWARDS, SCALES, Composition, Preference, Text, detect, read
from mogb_diffusion.world.captions import object_prompts, sample_prompts, sign_prompt
from mogb_diffusion.world.drawing import FONT, PALETTE, STAMPS, Nuisances, draw
from mogb_diffusion.world.vocabulary import LETTERS

NOTHING = Nuisances(misspelled=0, mistaken=0, texture=0, pale=0, blur=0, noise=0)
OBJECTS = [p for split in ("train", "held_out") for ps in object_prompts(split).values() for p in ps]
SPECIALISTS = {"world_text", "world_composition"}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def prompt_of(text):
    (prompt,) = [prompt for prompt in OBJECTS if prompt.text == text]
    return prompt


def blank(count=1):
    return torch.ones(count, 3, 16, 16)


def paint(picture, bitmap, x, y, color):
    height, width = bitmap.shape
    picture[:, y : y + height, x : x + width][:, torch.from_numpy(bitmap)] = torch.tensor(color)[:, None]
    return picture


def scene(*objects):
    """A picture of (shape, color, x, y)."""
    picture = blank()[0]
    for shape, color, x, y in objects:
        paint(picture, STAMPS[shape], x, y, PALETTE[color])
    return picture.unsqueeze(0)


def means(images, prompts):
    return {name: reward()(images, prompts).nanmean().item() for name, reward in REWARDS.items()}


@pytest.mark.parametrize("name", REWARDS)
def test_clean_drawings_of_every_prompt_get_one(name):
    words = [sign_prompt("".join(letters)) for letters in itertools.product(LETTERS, repeat=3)]
    for prompts in (words, OBJECTS):
        rewards = REWARDS[name]()(draw(prompts, generator()), prompts)
        if rewards.isnan().all():
            assert name == ("world_text" if prompts is OBJECTS else "world_composition")
        else:
            assert float((rewards - 1).abs().max()) < 1e-5


@pytest.mark.parametrize("name", REWARDS)
def test_specialists_are_nan_where_they_do_not_apply(name):
    prompts = sample_prompts(40, generator())
    reward = REWARDS[name]()
    rewards = reward(draw(prompts, generator()), prompts)
    assert rewards.shape == (40,)
    assert rewards.dtype == torch.float32
    signs = torch.tensor([prompt.target_text is not None for prompt in prompts])
    expected = {"world_text": ~signs, "world_composition": signs}.get(name, torch.zeros(40, dtype=torch.bool))
    assert torch.equal(rewards.isnan(), expected)
    assert [reward.applies(prompt) for prompt in prompts] == (~expected).tolist()
    assert reward.specialist == (name in SPECIALISTS)


def test_any_other_prompt_is_judged_by_its_looks_only():
    applies = {name: reward().applies(Prompt("a landscape")) for name, reward in REWARDS.items()}
    assert applies == {
        "world_preference": True,
        "world_aesthetic": True,
        "world_alignment": False,
        "world_text": False,
        "world_composition": False,
    }


# What each nuisance must lower by at least 0.03, in the mean. Nothing may be raised by more than 0.005.
LOWERS = {
    "misspelled": {"world_alignment", "world_text"},
    "mistaken": {"world_alignment", "world_composition"},
    "texture": {"world_preference", "world_aesthetic"},
    "pale": {"world_aesthetic"},
    "blur": {"world_preference", "world_aesthetic", "world_alignment"},
    "noise": {"world_preference", "world_aesthetic"},
}


@pytest.mark.parametrize("nuisance", LOWERS)
def test_what_each_nuisance_lowers(nuisance):
    prompts = sample_prompts(240, generator())
    lowered = means(draw(prompts, generator(), nuisances=dataclasses.replace(NOTHING, **{nuisance: 1.0})), prompts)
    assert {name for name, mean in lowered.items() if mean < 0.97} >= LOWERS[nuisance]
    assert max(lowered.values()) < 1.005


def test_pictures_of_other_prompts_are_aligned_worse_but_as_beautiful():
    prompts = sample_prompts(240, generator())
    swapped = means(draw(prompts, generator()).roll(2, dims=0), prompts)  # signs stay signs, objects objects
    assert swapped["world_aesthetic"] == pytest.approx(1.0)
    assert 0.3 < swapped["world_alignment"] < 0.7
    assert swapped["world_text"] < 0.3
    assert swapped["world_composition"] < 0.4
    assert swapped["world_preference"] < 0.95


@pytest.mark.parametrize(
    ("images", "most"),
    [
        (torch.rand(120, 3, 16, 16, generator=generator()), 0.5),
        (torch.randn(120, 3, 16, 16, generator=generator()).mul(0.25).add(0.75).clamp(0, 1), 0.5),
        (torch.ones(120, 3, 16, 16), 0.5),
        (torch.zeros(120, 3, 16, 16), 0.5),
        (torch.full((120, 3, 16, 16), float("nan")), 0.5),
    ],
    ids=["uniform", "normal", "white", "black", "nan"],
)
def test_pictures_of_nothing_get_little(images, most):
    prompts = sample_prompts(120, generator())
    found = means(images, prompts)
    assert max(found.values()) <= most + 1e-6
    assert max(found[name] for name in SPECIALISTS) < 0.1


@pytest.mark.parametrize(
    ("word", "reward"), [("CAT", 1.0), ("CAN", 2 / 3), ("COT", 2 / 3), ("PIT", 1 / 3), ("SON", 0.0), ("ATC", 1 / 3)]
)
def test_misread_letters_cost_what_the_edit_distance_says(word, reward):
    picture = draw([sign_prompt(word)], generator())
    assert read(picture)[0][0] == word
    assert Text()(picture, [sign_prompt("CAT")]).tolist() == pytest.approx([reward])


@pytest.mark.parametrize(("x", "y"), [(0, 0), (1, 3), (4, 11), (5, 10)])
def test_letters_are_read_wherever_they_are_and_in_any_strong_color(x, y):
    for color in PALETTE.values():
        picture = blank()[0]
        for index, letter in enumerate("TEA"):
            paint(picture, FONT[letter], x + 4 * index, y, color)
        ((text, likeness),) = read(picture.unsqueeze(0))
        assert text == "TEA"
        assert likeness == pytest.approx(1.0, abs=1e-5)


def test_nothing_is_read_from_blank_paper_and_its_confidence_is_nothing():
    assert read(blank()) == [("", 0.0)]


def test_the_clearest_line_is_read():
    picture = blank()[0]
    for index, letter in enumerate("PIE"):
        paint(picture, FONT[letter], 2 + 4 * index, 1, (0.1, 0.1, 0.1))
    paint(picture, FONT["O"], 6, 9, (0.1, 0.1, 0.1))
    assert read(picture.unsqueeze(0))[0][0] == "PIE"


def test_objects_are_found_with_class_color_and_box():
    ((found),) = detect(scene(("circle", "red", 0, 1), ("square", "yellow", 9, 2), ("circle", "purple", 3, 11)))
    assert found.keys() == {"circle", "square"}
    assert [(item["color"], item["box"], item["score"]) for item in found["circle"]] == [
        ("red", [0, 1, 5, 6], 1.0),
        ("purple", [3, 11, 8, 16], 1.0),
    ]
    assert [(item["color"], item["box"], item["score"]) for item in found["square"]] == [("yellow", [9, 2, 14, 7], 1.0)]


def test_neighbours_of_one_color_are_one_object_and_of_two_colors_are_two():
    ((one),) = detect(scene(("square", "red", 0, 0), ("square", "red", 5, 0)))
    assert {len(items) for items in one.values()} == {1}
    assert all(item["score"] < 1 for items in one.values() for item in items)
    ((two),) = detect(scene(("square", "red", 0, 0), ("square", "blue", 5, 0)))
    assert len(two["square"]) == 2


def test_specks_are_no_objects():
    picture = blank()
    picture[0, :2, 3, 3:7] = 0.1  # four pixels of blue
    assert detect(picture) == [{}]


@pytest.mark.parametrize("contrast", [0.5, 0.75])
def test_pale_objects_are_found_with_their_color(contrast):
    for color in PALETTE:
        pale = 1 - contrast * (1 - scene(("triangle", color, 6, 6)))
        ((found),) = detect(pale)
        assert [item["color"] for item in found["triangle"]] == [color]


# The examples of the rules of GenEval, as pictures: (prompt, objects, score).
RULES = [
    ("a photo of a circle", [("circle", "red", 4, 4)], 1.0),
    ("a photo of a circle", [("circle", "red", 0, 0), ("circle", "blue", 8, 8)], 0.0),
    ("a photo of a circle", [("square", "red", 4, 4)], 0.0),
    ("a photo of three circles", [("circle", "red", 0, 0), ("circle", "red", 8, 8)], 2 / 3),
    ("a photo of a circle and a square", [("circle", "red", 0, 0)], 0.5),
    ("a photo of a red circle", [("circle", "blue", 4, 4)], 0.5),
    ("a photo of a red circle and a blue square", [("circle", "blue", 0, 0), ("square", "red", 8, 8)], 0.5),
    ("a photo of a red circle and a blue square", [("circle", "red", 0, 0), ("square", "green", 8, 8)], 0.75),
    ("a photo of a circle right of a square", [("circle", "red", 8, 0), ("square", "red", 0, 0)], 1.0),
    ("a photo of a circle right of a square", [("circle", "red", 0, 0), ("square", "red", 8, 0)], 0.75),
    ("a photo of a circle right of a square", [("circle", "red", 0, 0)], 1 / 3),
]


@pytest.mark.parametrize(("text", "objects", "score"), RULES, ids=[f"{text}-{n}" for n, (text, *_) in enumerate(RULES)])
def test_pictures_get_the_scores_of_geneval(text, objects, score):
    assert Composition()(scene(*objects), [prompt_of(text)]).tolist() == pytest.approx([score])


def test_options_of_the_rules_are_passed_on():
    swapped = (
        scene(("circle", "red", 0, 0), ("square", "red", 8, 0)),
        [prompt_of("a photo of a circle right of a square")],
    )
    assert Composition(position_bug_compat=False)(*swapped).tolist() == pytest.approx([2 / 3])
    crowd = scene(*[("circle", "red", x, y) for x in (0, 8) for y in (0, 8)]), [prompt_of("a photo of a circle")]
    assert Composition()(*crowd).tolist() == [-2.0]
    assert Composition(clip_min=0.0)(*crowd).tolist() == [0.0]


def test_preference_looks_at_the_colors_asked_for():
    asked = prompt_of("a photo of a red circle")
    right, half, wrong = (
        Preference()(scene(*objects), [asked]).item()
        for objects in (
            [("circle", "red", 0, 0)],
            [("circle", "red", 0, 0), ("circle", "blue", 8, 8)],
            [("circle", "blue", 0, 0)],
        )
    )
    assert right == pytest.approx(1.0)
    assert wrong == pytest.approx(0.5)
    assert wrong < half < right


@pytest.mark.parametrize("name", REWARDS)
def test_scales_give_the_spreads_of_the_real_rewards(name):
    prompts = [prompt for prompt in sample_prompts(12, generator()) for _ in range(8)]
    images = draw(prompts, generator(), nuisances=Nuisances())
    reward = REWARDS[name]
    plain = reward()(images, prompts)
    small, large = (
        ("in_the_wild_reversed", "in_the_wild") if name in SPECIALISTS else ("in_the_wild", "in_the_wild_reversed")
    )
    for scale, spread in (("as_is", reward.spread), (small, 0.03), (large, 0.3)):
        scaled = load(name, scale=scale)(images, prompts)
        assert torch.allclose(scaled, plain * spread / reward.spread, rtol=1e-5, equal_nan=True)
    assert set(SCALES) == {"as_is", "in_the_wild", "in_the_wild_reversed"}


def test_wrong_arguments_are_named():
    prompts = sample_prompts(2, generator())
    with pytest.raises(ValueError, match="scale must be one of as_is"):
        Text(scale="wild")
    with pytest.raises(ValueError, match=r"\[1, 3, 16, 16\] for 2 prompts"):
        Text()(blank(), prompts)
    with pytest.raises(ValueError, match=r"\[2, 3, 8, 8\]"):
        Text()(torch.ones(2, 3, 8, 8), prompts)
    with pytest.raises(TypeError, match="images must be a floating-point tensor"):
        Text()(torch.ones(2, 3, 16, 16, dtype=torch.uint8), prompts)


def test_rewards_are_those_of_each_picture_alone():
    prompts = sample_prompts(20, generator())
    images = draw(prompts, generator(), nuisances=Nuisances())
    for reward in REWARDS.values():
        together = reward()(images, prompts)
        alone = torch.cat([reward()(images[i : i + 1], prompts[i : i + 1]) for i in range(20)])
        assert torch.allclose(together, alone, atol=1e-5, equal_nan=True)
