"""GenEval's rules against the reference's cases and the tables that were measured on its code."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogb_diffusion.rewards.geneval import MAX_OBJECTS, iou, judge, relative_position, select_objects

CASES = json.loads((Path(__file__).parents[2] / "cases" / "diffusion.json").read_text())
RULES = CASES["geneval_rules"]["cases"]
POSITIONS = CASES["geneval_relative_position"]["cases"]


def things(*colors, left=0.0):
    """Boxes of 100 px in a row, best first, with these colours."""
    return [{"box": [left + 150 * i, 0, left + 150 * i + 100, 100], "color": color} for i, color in enumerate(colors)]


def clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


def rule(*include, **more):
    return {"tag": "test", "include": list(include), **more}


CAT_RIGHT_OF_DOG = rule(clause("dog"), clause("cat", position=["right of", 0]))
DOG, CAT_RIGHT, CAT_LEFT = things(None), things(None, left=300.0), things(None, left=-300.0)
RED_CAR = rule(clause("car", color="red"))
RED_CAR_BLUE_BUS = rule(clause("car", color="red"), clause("bus", color="blue"))
THREE_DOGS = rule(clause("dog", 3), exclude=[clause("dog", 4)])


@pytest.mark.parametrize("case", RULES, ids=[case["name"] for case in RULES])
def test_the_reference_judgements_are_reproduced(case):
    assert case["error"] is None
    verdict = judge(case["detections"], case["metadata"])
    assert verdict.correct is case["correct"]
    assert verdict.strict_correct is case["strict_correct"]
    assert verdict.score == pytest.approx(case["score"], rel=1e-12)


@pytest.mark.parametrize(
    ("metadata", "detections", "correct", "strict", "score"),
    [
        (rule(clause("dog")), {"dog": things(None)}, True, True, 1),
        (rule(clause("dog")), {"dog": things(*[None] * 2)}, True, False, 0),
        (rule(clause("dog")), {"dog": things(*[None] * 5)}, True, False, -3),
        (rule(clause("dog"), clause("cat")), {"dog": DOG}, False, False, 0.5),
        (rule(clause("dog"), clause("cat", 1)), {"dog": DOG, "cat": things(None, None)}, True, False, 0.5),
        (THREE_DOGS, {}, False, False, 0),
        (THREE_DOGS, {"dog": things(*[None] * 1)}, False, False, 1 / 3),
        (THREE_DOGS, {"dog": things(*[None] * 2)}, False, False, 2 / 3),
        (THREE_DOGS, {"dog": things(*[None] * 3)}, True, True, 1),
        (THREE_DOGS, {"dog": things(*[None] * 4)}, False, False, 2 / 3),
        (THREE_DOGS, {"dog": things(*[None] * 5)}, False, False, 1 / 3),
        (RED_CAR, {"car": things("blue")}, False, False, 0.5),
        (RED_CAR, {"car": things("red", "blue")}, True, False, 0),
        (RED_CAR, {"car": things("blue", "red")}, False, False, 0),
        (rule(clause("car", 2, color="red")), {"car": things("red", "blue")}, False, False, 0.75),
        (RED_CAR_BLUE_BUS, {"car": things("blue"), "bus": things("red")}, False, False, 0.5),
        (RED_CAR_BLUE_BUS, {"car": things("red"), "bus": things("green")}, False, False, 0.75),
        (CAT_RIGHT_OF_DOG, {"dog": DOG, "cat": CAT_RIGHT}, True, True, 1),
        (CAT_RIGHT_OF_DOG, {"dog": DOG, "cat": CAT_LEFT}, False, False, 0.75),
        (CAT_RIGHT_OF_DOG, {"cat": CAT_RIGHT}, False, False, 1 / 3),
        (CAT_RIGHT_OF_DOG, {}, False, False, 0),
        (CAT_RIGHT_OF_DOG, {"dog": DOG, "cat": CAT_RIGHT + CAT_LEFT}, True, False, 1 / 3),
    ],
)
def test_the_table_measured_on_the_reference(metadata, detections, correct, strict, score):
    verdict = judge(detections, metadata)
    assert (verdict.correct, verdict.strict_correct) == (correct, strict)
    assert verdict.score == pytest.approx(score, rel=1e-12)


def test_a_failed_clause_is_no_anchor_for_a_position():
    # The dog is there but brown: for the rules there is no white dog that the cat could be right of.
    metadata = rule(clause("dog", color="white"), clause("cat", position=["right of", 0]))
    verdict = judge({"dog": things("brown"), "cat": CAT_RIGHT}, metadata)
    assert not verdict.correct
    assert verdict.score == pytest.approx((1 + 0 + 1 + 0) / 4)


def test_every_object_must_stand_right_of_every_anchor():
    metadata = rule(clause("dog"), clause("cat", 2, position=["right of", 0]))
    assert judge({"dog": DOG, "cat": things(None, None, left=300.0)}, metadata).strict_correct
    torn = judge({"dog": DOG, "cat": CAT_RIGHT + CAT_LEFT}, metadata)
    assert not torn.correct
    assert torn.score == pytest.approx((1 + 1 + 0 + 1) / 4)


def test_a_colour_that_fails_leaves_the_position_unjudged():
    metadata = rule(clause("dog"), clause("cat", color="black", position=["right of", 0]))
    assert judge({"dog": DOG, "cat": things("white", left=300.0)}, metadata).score == pytest.approx((1 + 1 + 0) / 3)
    both = judge({"dog": DOG, "cat": things("black", left=300.0)}, metadata)
    assert both.score == 1
    assert both.strict_correct


def test_the_quirks_can_be_switched_off():
    wrong = {"dog": DOG, "cat": CAT_LEFT}
    assert judge(wrong, CAT_RIGHT_OF_DOG, position_bug_compat=False).score == pytest.approx(2 / 3)
    right = {"dog": DOG, "cat": CAT_RIGHT}
    assert judge(right, CAT_RIGHT_OF_DOG, position_bug_compat=False).score == 1
    crowd = {"dog": things(*[None] * 5)}
    assert judge(crowd, rule(clause("dog")), clip_min=0.0).score == 0
    assert judge(crowd, rule(clause("dog")), clip_min=-1.0).score == -1


@pytest.mark.parametrize("case", POSITIONS, ids=[case["name"] for case in POSITIONS])
def test_the_reference_positions_are_reproduced(case):
    assert relative_position(case["a"], case["b"], CASES["geneval_relative_position"]["threshold"]) == set(
        case["expected"]
    )


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0, 100, 100, 200], [300, 100, 400, 200], {"left of"}),
        ([300, 100, 400, 200], [0, 100, 100, 200], {"right of"}),
        ([100, 0, 200, 100], [100, 300, 200, 400], {"above"}),
        ([100, 300, 200, 400], [100, 0, 200, 100], {"below"}),
        ([0, 0, 100, 100], [300, 300, 400, 400], {"left of", "above"}),
        ([5, 5, 10, 10], [5, 5, 10, 10], set()),
        ([0, 0, 100, 100], [40, 0, 140, 100], set()),
        ([0, 0, 100, 100], [41, 0, 141, 100], {"left of"}),
        ([300, 60, 400, 160], [0, 0, 100, 100], {"right of"}),
        ([0, 0, 400, 400], [420, 150, 470, 200], {"left of"}),
        ([100, 100, 150, 150], [0, 0, 400, 400], set()),
        ([0, 0, 0, 0], [0.0005, 0, 0.0005, 0], set()),  # a thousandth of a pixel is no offset
    ],
)
def test_positions_by_the_published_table(a, b, expected):
    assert relative_position(a, b) == expected


boxes = st.tuples(st.integers(0, 300), st.integers(0, 300), st.integers(1, 200), st.integers(1, 200)).map(
    lambda box: [box[0], box[1], box[0] + box[2], box[1] + box[3]]
)
MIRROR = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@given(a=boxes, b=boxes)
def test_positions_mirror_when_the_boxes_change_places(a, b):
    assert {MIRROR[relation] for relation in relative_position(a, b)} == relative_position(b, a)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0, 0, 9, 9], [5, 0, 14, 9], 1 / 3),  # 10 x 10 pixels each, 50 shared
        ([0, 0, 9, 9], [0, 0, 9, 9], 1.0),
        ([0, 0, 9, 9], [10, 0, 19, 9], 0.0),  # side by side: no pixel in common
        ([0, 0, 9, 9], [9, 9, 18, 18], 1 / 199),  # the corner pixel
        ([0, 0, 9, 9], [100, 100, 110, 110], 0.0),
        ([0, 0, 9, 9], [0, 0, 4, 9], 0.5),
    ],
)
def test_the_overlap_counts_pixels(a, b, expected):
    assert iou(a, b) == pytest.approx(expected)
    assert iou(b, a) == pytest.approx(expected)


def scored(*scores, step=0):
    return [{"box": [step * i, 0, step * i + 9, 9], "score": score} for i, score in enumerate(scores)]


def test_objects_are_thresholded_sorted_and_limited():
    found = {"dog": scored(0.3, 0.31, 0.95, 0.9), "cat": scored(0.1)}
    selected = select_objects(found, "single_object")
    assert [item["score"] for item in selected["dog"]] == [0.95, 0.9, 0.31]
    assert "cat" not in selected
    assert [item["score"] for item in select_objects(found, "counting")["dog"]] == [0.95]
    crowd = select_objects({"dog": scored(*[0.5 + i / 100 for i in range(20)])}, "counting_not")["dog"]
    assert len(crowd) == MAX_OBJECTS == 16
    assert crowd[0]["score"] == pytest.approx(0.69)
    assert crowd[-1]["score"] == pytest.approx(0.54)


def test_overlapping_objects_are_dropped_only_when_asked_for():
    found = {"dog": scored(0.5, 0.9, 0.7, step=5)}  # neighbours overlap by 1/3, the outer ones not at all
    assert len(select_objects(found, "single_object")["dog"]) == 3
    assert [item["score"] for item in select_objects(found, "x", nms_threshold=0.3)["dog"]] == [0.9]
    assert len(select_objects(found, "x", nms_threshold=0.4)["dog"]) == 3
    with pytest.raises(ValueError, match=r"nms_threshold must lie in \(0, 1\]"):
        select_objects(found, "x", nms_threshold=0)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tag": "x"}, "at least one clause under 'include'"),
        (rule({"count": 1}), r"metadata\['include'\]\[0\] must have a 'class'"),
        (rule({"class": "dog", "count": "1"}), "a 'count'"),
        (rule(clause("dog", 0)), "must be at least 1, but is 0"),
        (rule(clause("dog"), exclude=[clause("dog", 0)]), r"metadata\['exclude'\]\[0\]\['count'\]"),
        (rule(clause("dog"), clause("cat", position=["near", 0])), "a relation of left of, right of, above, below"),
        (rule(clause("dog"), clause("cat", position=["above", 1])), "an earlier clause, below 1"),
        (rule(clause("dog"), clause("cat", position=["above", -1])), "an earlier clause"),
        (rule(clause("dog", position=["above", 0])), "an earlier clause, below 0"),
        (rule(clause("dog"), clause("cat", position="above")), r"must be \[relation, index\]"),
    ],
)
def test_bad_metadata_is_named(metadata, message):
    with pytest.raises(ValueError, match=message):
        judge({"dog": DOG, "cat": CAT_RIGHT}, metadata)


@pytest.mark.parametrize("box", [[0, 0, 1], [0, 0, float("nan"), 1], [5, 0, 1, 1], [0, 5, 1, 1]])
def test_bad_boxes_are_named(box):
    with pytest.raises(ValueError, match="box_b must be x1, y1, x2, y2"):
        relative_position([0, 0, 1, 1], box)
