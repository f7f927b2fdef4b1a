"""The table of ``reward_figures`` can be made, and nothing in it deviates."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rapidocr")

import reward_figures


def test_the_rules_have_no_mismatch():
    counts = reward_figures.rule_counts()
    assert all(count.cases >= 4 and count.mismatches == 0 for count in counts), counts


def test_a_wrong_answer_would_be_counted(monkeypatch):
    monkeypatch.setattr(reward_figures, "iou", lambda a, b: 0.5)
    counts = {count.what: count for count in reward_figures.rule_counts()}
    assert counts["GenEval: overlap of boxes (IoU), by hand"].mismatches == 5


def test_the_scores_are_those_of_other_code(tmp_path):
    rows = reward_figures.deviations(tmp_path, count=2)
    assert [row.reward for row in rows] == ["pickscore", "clipscore", "hpsv2", "aesthetic", "imagereward"]
    for row in rows:
        assert row.largest <= 1e-4 * max(1, row.spread), row
        assert row.spread > 1e-3, row
    assert reward_figures.detector_count(tmp_path).mismatches == 0


@pytest.mark.slow
def test_the_table_is_printed(capsys):
    assert reward_figures.main() == 0
    assert "| OCR: rendered pictures, read by rapidocr | 8 | 0 |" in capsys.readouterr().out
