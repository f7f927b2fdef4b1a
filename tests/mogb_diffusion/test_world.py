"""The tiny world: its prompts and its drawings."""

import collections
import itertools
from random import Random

import pytest
import torch

from mogb_diffusion.rewards.geneval import relative_position
from mogb_diffusion.world import drawing
from mogb_diffusion.world.captions import object_prompts, sample_prompts, sign_prompt, sign_prompts
from mogb_diffusion.world.drawing import CLEAN, Nuisances, draw, lay_out, misspelled, mistaken
from mogb_diffusion.world.vocabulary import COLORS, HELD_OUT_WORDS, LETTERS, RELATIONS, SHAPES, TOKENS, WORDS

EVERY_OBJECT_PROMPT = [
    prompt for split in ("train", "held_out") for prompts in object_prompts(split).values() for prompt in prompts
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(probability, **others):
    zero = dict.fromkeys(("misspelled", "mistaken", "texture", "pale", "blur", "noise"), 0.0)
    return Nuisances(**{**zero, **others, **dict.fromkeys(probability, 1.0)})


def test_the_wording_is_that_of_geneval_and_of_the_ocr_prompts():
    texts = {prompt.text for prompt in EVERY_OBJECT_PROMPT}
    assert texts >= {
        "a photo of a circle",
        "a photo of a red circle",
        "a photo of three squares",
        "a photo of four blue triangles",
        "a photo of a circle and a square",
        "a photo of a purple triangle and a yellow circle",
        "a photo of a circle left of a square",
    }
    assert sign_prompt("CAT", "poster").text == 'a poster that says "CAT"'
    assert sign_prompt("CAT").target_text == "CAT"


def test_the_metadata_of_a_position_prompt_lists_the_thing_referred_to_first():
    (prompt,) = [p for p in EVERY_OBJECT_PROMPT if p.text == "a photo of a red circle above a blue square"]
    assert prompt.metadata == {
        "tag": "position",
        "include": [
            {"class": "square", "count": 1, "color": "blue"},
            {"class": "circle", "count": 1, "color": "red", "position": ["above", 0]},
        ],
    }


def test_counting_prompts_exclude_one_more():
    (prompt,) = [p for p in EVERY_OBJECT_PROMPT if p.text == "a photo of three squares"]
    assert prompt.metadata["include"] == [{"class": "square", "count": 3}]
    assert prompt.metadata["exclude"] == [{"class": "square", "count": 4}]


def test_no_prompt_is_held_out_and_trained_on():
    assert not set(HELD_OUT_WORDS) - set(WORDS)
    trained = {prompt.target_text for prompt in sign_prompts("train")}
    assert trained == set(WORDS) - set(HELD_OUT_WORDS)
    texts = {
        split: [prompt.text for prompts in object_prompts(split).values() for prompt in prompts]
        for split in ("train", "held_out")
    }
    assert not set(texts["train"]) & set(texts["held_out"])
    assert len(set(texts["train"])) + len(set(texts["held_out"])) == len(texts["train"]) + len(texts["held_out"])
    for tag in ("colors", "counting", "two_object", "color_attr", "position"):
        everything = len(object_prompts("train")[tag]) + len(object_prompts("held_out")[tag])
        assert len(object_prompts("held_out")[tag]) / everything == pytest.approx(1 / 6, abs=0.05)


def test_both_splits_know_every_color_shape_number_and_relation():
    for split in ("train", "held_out"):
        words = set(" ".join(p.text for prompts in object_prompts(split).values() for p in prompts).split())
        relations = {relation.split()[0] for relation in RELATIONS}
        assert words >= {*COLORS, *SHAPES, "two", "three", "four", *relations}, split


def test_prompts_come_from_the_generator_alone():
    torch.manual_seed(1)
    first = sample_prompts(40, generator(7))
    torch.manual_seed(2)
    assert first == sample_prompts(40, generator(7))
    assert first != sample_prompts(40, generator(8))
    assert sample_prompts(0, generator()) == []


def test_kinds_and_splits():
    mixed = sample_prompts(200, generator())
    assert [prompt.target_text is not None for prompt in mixed] == [True, False] * 100
    assert all(prompt.target_text for prompt in sample_prompts(50, generator(), kind="text"))
    objects = sample_prompts(1200, generator(), kind="objects")
    tags = collections.Counter(prompt.metadata["tag"] for prompt in objects)
    assert len(tags) == 6
    assert min(tags.values()) > 150  # 200 expected of each, standard deviation 13
    held_out = sample_prompts(200, generator(), split="held_out")
    assert {prompt.target_text for prompt in held_out} - {None} == set(HELD_OUT_WORDS)


@pytest.mark.parametrize("wrong", [{"kind": "signs"}, {"split": "test"}, {"count": -1}, {"count": 2.0}])
def test_wrong_arguments_of_sample_prompts_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        sample_prompts(**{"count": 3, "generator": generator(), **wrong})


def test_the_vocabulary_has_every_word_once():
    assert len(set(TOKENS)) == len(TOKENS)
    words = set(" ".join(p.text for p in EVERY_OBJECT_PROMPT).split())
    words |= {word for prompt in sign_prompts("train") for word in prompt.text.split('"')[0].split()}
    assert words <= set(TOKENS)
    assert set("".join(WORDS)) <= set(LETTERS) == set(drawing.FONT)
    assert all(len(word) == 3 for word in WORDS)


def test_a_word_by_hand():
    picture = draw([sign_prompt("TIL")], generator())[0]
    assert picture.shape == (3, 16, 16)
    rows = ["".join("#" if value < 0.5 else "." for value in row) for row in picture[0].tolist()]
    assert rows[:6] == ["." * 16] * 6
    assert rows[6:11] == [
        "..###.###.#.....",
        "...#...#..#.....",
        "...#...#..#.....",
        "...#...#..#.....",
        "...#..###.###...",
    ]
    assert rows[11:] == ["." * 16] * 5
    assert torch.equal(picture.unique(), torch.tensor([0.1, 1.0]))


def test_words_that_do_not_fit_are_refused():
    for word in ("XYZ", "PLAN", "cat"):
        with pytest.raises(ValueError, match=word):
            draw([sign_prompt(word)], generator())


def test_an_object_by_hand():
    (prompt,) = [p for p in EVERY_OBJECT_PROMPT if p.text == "a photo of a blue triangle"]
    picture = draw([prompt], generator())[0]
    ink = (picture != 1).any(dim=0)
    rows, columns = ink.nonzero().amin(dim=0).tolist()
    crop = ink[rows : rows + 5, columns : columns + 5]
    assert ["".join(".#"[value] for value in row) for row in crop.tolist()] == [
        "..#..", "..#..", ".###.", ".###.", "#####",
    ]  # fmt: skip
    assert int(ink.sum()) == int(crop.sum())
    assert torch.equal(picture[:, ink].T.unique(dim=0), torch.tensor([[0.1, 0.3, 0.95]]))


def test_objects_fit_keep_apart_and_stand_as_the_prompt_says():
    random = Random(0)
    for prompt in EVERY_OBJECT_PROMPT:
        clauses = prompt.metadata["include"]
        placed = lay_out(clauses, random)
        boxes = [(item.x, item.y, item.x + 5, item.y + 5) for item in placed]
        assert all(0 <= side <= 16 for box in boxes for side in box)
        for a, b in itertools.combinations(boxes, 2):
            assert max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3]) >= 1  # a free pixel between
        wanted = [clause for clause in clauses for _ in range(clause["count"])]
        assert [item.shape for item in placed] == [clause["class"] for clause in wanted]
        assert all(item.color == c.get("color", item.color) for item, c in zip(placed, wanted, strict=True))
        if "position" in clauses[-1]:
            assert relative_position(boxes[1], boxes[0]) == {clauses[-1]["position"][0]}


def test_open_colors_vary_and_places_are_in_reading_order():
    (prompt,) = [p for p in EVERY_OBJECT_PROMPT if p.text == "a photo of four circles"]
    random = Random(0)
    placed = [lay_out(prompt.metadata["include"], random) for _ in range(100)]
    assert {items[0].color for items in placed} == set(COLORS)
    assert all(len({item.color for item in items}) == 1 for items in placed)
    assert {tuple((item.x, item.y) for item in items) for items in placed} == {((2, 2), (10, 2), (2, 10), (10, 10))}


def test_pictures_come_from_the_generator_alone():
    prompts = sample_prompts(30, generator())
    torch.manual_seed(1)
    first = draw(prompts, generator(3), nuisances=Nuisances())
    torch.manual_seed(2)
    assert torch.equal(first, draw(prompts, generator(3), nuisances=Nuisances()))
    assert not torch.equal(first, draw(prompts, generator(4), nuisances=Nuisances()))
    assert first.dtype == torch.float32
    assert first.min() >= 0
    assert first.max() <= 1


def test_misspelling_replaces_each_letter_by_another():
    random = Random(0)
    wrong = [misspelled("CAT", 0.4, random) for _ in range(3000)]
    changed = [sum(a != b for a, b in zip(word, "CAT", strict=True)) for word in wrong]
    assert sum(changed) / 9000 == pytest.approx(0.4, abs=0.03)
    assert misspelled("CAT", 0.0, random) == "CAT"
    assert all(a != b for a, b in zip(misspelled("CAT", 1.0, random), "CAT", strict=True))
    assert {word[0] for word in wrong} == set(LETTERS)


def test_a_mistake_changes_one_thing():
    clauses = [
        {"class": "square", "count": 2, "color": "blue"},
        {"class": "circle", "count": 1, "position": ["above", 0]},
    ]
    random = Random(0)
    for _ in range(200):
        for before, after in zip(clauses, mistaken(clauses, 1.0, random), strict=True):
            assert before.keys() == after.keys()
            assert sum(before[key] != after[key] for key in before) == 1
            assert after["class"] in SHAPES
            assert "position" not in after or (after["position"][0] in RELATIONS and after["position"][1] == 0)
    assert mistaken(clauses, 0.0, random) == clauses


@pytest.mark.parametrize("name", ["texture", "pale", "blur", "noise"])
def test_each_nuisance_changes_pictures_as_often_as_asked(name):
    prompts = [p for p in EVERY_OBJECT_PROMPT if p.metadata["tag"] == "color_attr"] * 5
    clean = draw(prompts, generator(5))
    assert torch.equal(clean, draw(prompts, generator(5), nuisances=CLEAN))
    always = draw(prompts, generator(5), nuisances=draws([name]))
    assert float((always - clean).abs().amax(dim=(1, 2, 3)).gt(0.02).float().mean()) > 0.95
    rarely = draw(prompts, generator(5), nuisances=draws([], **{name: 0.3}))
    assert float(((rarely - clean).abs() > 1e-3).flatten(1).any(dim=1).float().mean()) == pytest.approx(0.3, abs=0.07)


def test_texture_is_on_paper_and_pale_ink_on_ink():
    prompts = [p for p in EVERY_OBJECT_PROMPT if p.metadata["tag"] == "colors"] * 10
    clean = draw(prompts, generator(5))
    paper = (clean == 1).all(dim=1, keepdim=True).expand_as(clean)
    textured = draw(prompts, generator(5), nuisances=draws(["texture"]))
    assert float((textured - clean)[~paper].abs().max()) < 1e-6
    pale = draw(prompts, generator(5), nuisances=draws(["pale"]))
    assert float((pale - clean)[paper].abs().max()) < 1e-6
    kept = ((1 - pale) / (1 - clean))[~paper]
    assert kept.min() > 0.44
    assert kept.max() < 0.76


def test_drawing_is_fast():
    import time

    prompts = sample_prompts(400, generator())
    draw(prompts, generator(), nuisances=Nuisances())
    began = time.process_time()
    draw(prompts, generator(), nuisances=Nuisances())
    assert (time.process_time() - began) / 400 < 2e-3  # measured: 0.13 ms
