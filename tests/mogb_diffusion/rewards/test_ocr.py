"""The text metric against the reference's cases, by hand, and against a brute-force edit distance."""

import json
import math
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mogb_diffusion.rewards.ocr import edit_distance, text_reward

CASES = json.loads((Path(__file__).parents[2] / "cases" / "diffusion.json").read_text())["ocr_reward"]


@pytest.mark.parametrize("case", CASES, ids=[case["recognized"][0][0] for case in CASES])
def test_the_reference_rewards_are_reproduced(case):
    target = case["prompt"].split('"')[1]
    recognized = [(text, confidence) for text, confidence in case["recognized"]]
    assert text_reward(recognized, target) == pytest.approx(case["expected"], rel=1e-12)


@pytest.mark.parametrize(
    ("lines", "target", "expected"),
    [
        ([("Hello", 0.9), ("World", 0.9)], "Hello World", 1.0),
        ([("World", 0.9), ("Hello", 0.9)], "Hello World", 0.2),  # worldhello: 8 edits of 10
        ([("HELLO   world", 0.9)], "hello World", 1.0),
        ([("say hello world twice", 0.9)], "hello world", 1.0),  # found inside
        ([("2024", 0.9)], "2024!", 0.8),
        ([("cafe", 0.9)], "café", 0.75),
        ([("Hello", 0.9), ("World", 0.0)], "Hello World", 0.5),  # a line without confidence is not there
        ([("Hello", -1.0)], "Hello", 0.0),
        ([], "Hello", 0.0),
        ([("", 0.9)], "Hello", 0.0),
        ([("xyz" * 30, 0.9)], "Hello", 0.0),  # more edits than letters count as all letters
    ],
)
def test_rewards_by_hand(lines, target, expected):
    assert text_reward(lines, target) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("target", ["", "   "])
def test_without_a_target_the_reward_does_not_apply(target):
    assert math.isnan(text_reward([("Hello", 0.9)], target))


@pytest.mark.parametrize(
    ("lines", "target", "message"),
    [
        ([("Hello", 0.9)], None, "target must be a string.*Use ''"),
        (["Hello"], "Hello", r"pairs \(text, confidence\), but got 'Hello'"),
        ([(0.9, "Hello")], "Hello", "pairs"),
        ([("Hello", "sure")], "Hello", "pairs"),
        ([("Hello", 0.9, [0, 0])], "Hello", "pairs"),
    ],
)
def test_bad_input_is_named(lines, target, message):
    with pytest.raises(TypeError, match=message):
        text_reward(lines, target)


def recursive_distance(first, second):
    """The definition, straight: the best of three moves at the front."""

    @lru_cache(None)
    def distance(i, j):
        if i == len(first) or j == len(second):
            return len(first) - i + len(second) - j
        if first[i] == second[j]:
            return distance(i + 1, j + 1)
        return 1 + min(distance(i + 1, j), distance(i, j + 1), distance(i + 1, j + 1))

    return distance(0, 0)


@given(first=st.text("abc", max_size=8), second=st.text("abc", max_size=8))
@settings(max_examples=200, deadline=None)
def test_the_edit_distance_is_that_of_its_definition(first, second):
    assert edit_distance(first, second) == recursive_distance(first, second)


@given(text=st.text(max_size=12), target=st.text(min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_rewards_lie_in_the_unit_interval(text, target):
    reward = text_reward([(text, 1.0)], target)
    assert math.isnan(reward) == (target.replace(" ", "") == "")
    assert math.isnan(reward) or 0 <= reward <= 1
