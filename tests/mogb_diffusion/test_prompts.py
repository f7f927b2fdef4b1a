import collections
import json

import pytest

from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import Prompt, PromptMixture, read_prompts, write_prompts


def written(tmp_path, name, *lines):
    path = tmp_path / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_text_files_give_one_prompt_a_line_and_the_quoted_words(tmp_path):
    path = written(tmp_path, "train.txt", "a red dog", "", '  a sign that says "OPEN" and "CLOSED"  ')
    assert read_prompts(path) == [
        Prompt("a red dog"),
        Prompt('a sign that says "OPEN" and "CLOSED"', target_text="OPEN"),
    ]


def test_geneval_lines_keep_their_metadata(tmp_path):
    row = {"tag": "counting", "include": [{"class": "dog", "count": 3}], "exclude": [{"class": "dog", "count": 4}]}
    path = written(tmp_path, "test_metadata.jsonl", row | {"prompt": "a photo of three dogs"})
    assert read_prompts(path, rewards=["geneval"]) == [Prompt("a photo of three dogs", ("geneval",), row)]


def test_generic_lines_name_their_rewards_and_survive_a_round_trip(tmp_path):
    prompts = [
        Prompt("für alle", None),
        Prompt("a sign", ("ocr",), {"source": {"row": 3}}, "OPEN"),
        Prompt("a cat", (), {}),
    ]
    path = tmp_path / "mixed.jsonl"
    write_prompts(prompts, path)
    assert read_prompts(path) == prompts


def test_rewards_of_the_source_apply_where_a_line_names_none(tmp_path):
    path = written(tmp_path, "a.jsonl", {"prompt": "x"}, {"prompt": "y", "rewards": ["clip"]})
    assert [p.rewards for p in read_prompts(path, rewards=["ocr"])] == [("ocr",), ("clip",)]
    assert [p.allows("ocr") for p in read_prompts(path)] == [True, False]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("{",), "no JSON"),
        (("[1]",), "must be a JSON object"),
        (({"text": "x"},), "unknown key 'text'"),
        (({"prompt": " "},), "prompt must be a text"),
        (({"prompt": "x", "rewards": "ocr"},), "rewards must be a list"),
        (({"prompt": "x", "metadata": 3},), "metadata must be an object"),
        (({"prompt": "x", "tag": "other", "include": []},), "tag must be one of"),
        (({"prompt": "x", "tag": "colors", "include": []},), "include must be a list"),
        (({"prompt": "x", "tag": "colors", "include": [{"class": "dog", "count": 0}]},), "count >= 1"),
        (
            ({"prompt": "x", "tag": "colors", "include": [{"class": "dog", "count": 1, "position": "left"}]},),
            "relation",
        ),
    ],
)
def test_malformed_lines_are_named_by_file_and_number(tmp_path, lines, words):
    good = (
        {"prompt": "x", "tag": "colors", "include": [{"class": "dog", "count": 1}]}
        if '"tag"' in json.dumps(lines)
        else {"prompt": "x"}
    )
    path = written(tmp_path, "bad.jsonl", good, "", *lines)
    with pytest.raises(InputError, match=words) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    with pytest.raises(InputError, match="no UTF-8"):
        read_prompts(tmp_path / "latin.txt")
    with pytest.raises(InputError, match="is empty"):
        read_prompts(written(tmp_path, "empty.txt", "", " "))
    with pytest.raises(InputError, match="must be one of auto, text"):
        read_prompts(written(tmp_path, "a.txt", "x"), "csv")


def test_a_draw_has_each_row_once_until_a_source_is_exhausted():
    mixture = PromptMixture([[Prompt(str(i)) for i in range(10)]])
    assert len(set(mixture.draw(10, 0))) == 10
    assert collections.Counter(mixture.draw(25, 0)).most_common()[-1][1] == 2


def test_quotas_follow_the_weights():
    mixture = PromptMixture([[Prompt("a")] * 40, [Prompt("b")] * 40, [Prompt("c")] * 40], [1, 1, 2])
    for epoch in range(50):
        rows = mixture.draw(8, 7, epoch)
        assert collections.Counter(row // 40 for row in rows) == {0: 2, 1: 2, 2: 4}
    # Shares that are no whole numbers hold on average: 3 of 8 groups, a third each.
    thirds = PromptMixture([[Prompt("a")] * 40, [Prompt("b")] * 40, [Prompt("c")] * 40])
    counts = collections.Counter(row // 40 for epoch in range(600) for row in thirds.draw(8, 7, epoch))
    assert all(abs(count / 600 - 8 / 3) < 0.1 for count in counts.values())
    assert {2, 3} >= {
        sum(row // 40 == part for row in thirds.draw(8, 7, epoch)) for epoch in range(30) for part in range(3)
    }


def test_a_draw_can_leave_sources_out():
    mixture = PromptMixture([[Prompt(f"{part}{n}") for n in range(20)] for part in "abcd"], weights=[1, 2, 5, 1])
    for chosen in ((0,), (2,), (3,), (0, 2), (1, 3)):
        drawn = collections.Counter(row // 20 for epoch in range(200) for row in mixture.draw(6, epoch, sources=chosen))
        assert set(drawn) == set(chosen)
        weights = [(1, 2, 5, 1)[source] for source in chosen]
        for source, weight in zip(chosen, weights, strict=True):
            assert drawn[source] / 1200 == pytest.approx(weight / sum(weights), abs=0.03)
    assert mixture.draw(6, 0, sources=(0, 1, 2, 3)) == mixture.draw(6, 0)


def test_draws_depend_on_their_key_alone():
    mixture = PromptMixture([[Prompt(str(i)) for i in range(100)]])
    assert mixture.draw(8, 0, "epoch", 1) == mixture.draw(8, 0, "epoch", 1)
    assert mixture.draw(8, 0, "epoch", 1) != mixture.draw(8, 0, "epoch", 2)


def test_sources_without_prompts_or_weight_are_refused():
    with pytest.raises(InputError, match="at least one prompt"):
        PromptMixture([[]])
    with pytest.raises(InputError, match="weight > 0"):
        PromptMixture([[Prompt("a")]], [0])
