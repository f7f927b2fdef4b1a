"""Generated prompts: the forms of GenEval's own files, read back by the loaders and judged by the rules."""

import pytest

from mogb_diffusion.errors import InputError
from mogb_diffusion.generate import KINDS, geneval_prompts, ocr_prompts, write_geneval, write_text
from mogb_diffusion.prompts import read_prompts
from mogb_diffusion.rewards.detection import CLASSES
from mogb_diffusion.rewards.geneval import COLORS, RELATIONS, judge


def test_lines_are_those_of_geneval():
    lines = geneval_prompts(300, seed=1)
    assert [line["tag"] for line in lines[:6]] == list(KINDS)
    for line in lines:
        for clause in line["include"]:
            assert clause["class"] in CLASSES
            assert clause.get("color", "red") in COLORS
            assert clause.get("position", ["above", 0])[0] in RELATIONS
            assert clause["class"] in line["prompt"] or clause["count"] > 1
    counting = [line for line in lines if line["tag"] == "counting"]
    assert all(line["exclude"][0]["count"] == line["include"][0]["count"] + 1 for line in counting)


def test_wording_follows_the_published_prompts():
    by_prompt = {line["prompt"]: line for line in geneval_prompts(6000, seed=3)}
    assert by_prompt["a photo of a bench"]["include"] == [{"class": "bench", "count": 1}]
    assert by_prompt["a photo of an elephant"]["tag"] == "single_object"
    assert by_prompt["a photo of four benches"]["include"] == [{"class": "bench", "count": 4}]
    above = next(line for prompt, line in by_prompt.items() if " above a" in prompt)
    assert above["include"][1]["position"] == ["above", 0]
    assert above["prompt"].index(above["include"][1]["class"]) < above["prompt"].index(" above ")


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_exactly_what_is_asked_for_is_right(kind):
    for line in geneval_prompts(25, seed=2, kinds=[kind]):
        places = {"left of": (0, 200), "right of": (400, 200), "above": (200, 0), "below": (200, 400)}
        shown = {}
        for clause in line["include"]:
            x, y = places[clause["position"][0]] if "position" in clause else (200, 200)
            objects = [{"box": [x, y, x + 50, y + 50], "color": clause.get("color")}] * clause["count"]
            shown.setdefault(clause["class"], []).extend(objects)
        verdict = judge(shown, line)
        assert verdict.correct
        assert verdict.strict_correct
        assert verdict.score == 1


def test_files_are_read_back(tmp_path):
    lines = geneval_prompts(40, seed=5)
    write_geneval(tmp_path / "train_metadata.jsonl", lines)
    assert [prompt.text for prompt in read_prompts(tmp_path / "train_metadata.jsonl")] == [x["prompt"] for x in lines]
    signs = ocr_prompts(40, seed=5)
    write_text(tmp_path / "train.txt", signs)
    found = read_prompts(tmp_path / "train.txt")
    assert [prompt.text for prompt in found] == signs
    assert all(prompt.target_text == prompt.text.split('"')[1] for prompt in found)


def test_no_prompt_comes_twice_and_none_of_the_test_file():
    test = geneval_prompts(200, seed=0)
    train = geneval_prompts(500, seed=0, apart_from=[line["prompt"] for line in test])
    texts = [line["prompt"] for line in train]
    assert len(set(texts)) == 500
    assert not {line["prompt"] for line in test} & set(texts)
    signs = ocr_prompts(300, apart_from=ocr_prompts(100))
    assert len(set(signs)) == 300


def test_the_seed_decides():
    assert geneval_prompts(30, seed=4) == geneval_prompts(30, seed=4)
    assert geneval_prompts(30, seed=4) != geneval_prompts(30, seed=5)
    assert ocr_prompts(30, seed=4) == ocr_prompts(30, seed=4)


def test_impossible_wishes_are_refused():
    with pytest.raises(InputError, match="no more than 80 different"):
        geneval_prompts(81, kinds=["single_object"])
    with pytest.raises(InputError, match="kinds must be some of"):
        geneval_prompts(3, kinds=["dance"])
    with pytest.raises(InputError, match="count must be a positive whole number, but got 0"):
        ocr_prompts(0)
