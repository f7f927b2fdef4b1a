import csv
import io
import json
import math

import pytest

from mogb_diffusion import comparison, results
from mogb_diffusion.errors import InputError

# Three models, two rewards, by hand: the column 1, 2, 3 has mean 2 and population deviation sqrt(2/3); the column
# 0, 0, 3 has mean 1 and deviation sqrt(2).
ROWS = {
    "a": {"geneval": 1.0, "ocr": 0.0},
    "b": {"geneval": 2.0, "ocr": 0.0},
    "c": {"geneval": 3.0, "ocr": 3.0},
}
COMPOSITE = {
    "a": (-math.sqrt(1.5) - math.sqrt(0.5)) / 2,
    "b": (0 - math.sqrt(0.5)) / 2,
    "c": (math.sqrt(1.5) + math.sqrt(2)) / 2,
}


def test_the_composite_is_the_mean_of_the_columns_z_scores():
    table = comparison.compare(ROWS)
    assert table.composite == pytest.approx(COMPOSITE, abs=1e-15)
    assert table.z["c"] == pytest.approx({"geneval": math.sqrt(1.5), "ocr": math.sqrt(2)})
    assert sum(table.composite.values()) == pytest.approx(0, abs=1e-15)


def test_units_and_constant_columns_do_not_matter():
    scaled = {name: {"geneval": 7 + 26 * row["geneval"], "ocr": row["ocr"]} for name, row in ROWS.items()}
    assert comparison.compare(scaled).composite == pytest.approx(COMPOSITE)
    constant = {name: row | {"clip": 0.1 + 0.2} for name, row in ROWS.items()}
    constant["b"]["clip"] = 0.3  # equal but for rounding
    assert comparison.compare(constant).composite == pytest.approx({n: c * 2 / 3 for n, c in COMPOSITE.items()})


def test_a_column_that_a_row_lacks_takes_no_part():
    rows = {name: row | {"aesthetic": 5.0 + len(name)} for name, row in ROWS.items()}
    rows["b"]["aesthetic"] = math.nan
    table = comparison.compare(rows)
    assert table.composite == pytest.approx(COMPOSITE)
    assert table.left_out == ("aesthetic",)
    assert "without Aesthetic" in comparison.as_text(table)
    assert comparison.as_markdown(table).splitlines()[3] == "| b | 2.00 | 0.00 | - | -0.354 |"


def test_one_row_has_no_composite():
    table = comparison.compare({"a": {"clip": 0.2861, "x": 1.0}})
    assert table.composite == {}
    assert comparison.as_markdown(table) == "| model | CLIPScore | x |\n| --- | ---: | ---: |\n| a | 0.286 | 1.000 |\n"
    with pytest.raises(InputError, match="nothing to compare"):
        comparison.compare({})


def test_the_layout_is_that_of_the_papers_table():
    scores = {"hpsv2": 0.355, "mine": 2.0, "unifiedreward": 3.52 / 5, "ocr": 0.96, "pickscore": 22.83 / 26,
              "geneval": 0.94, "aesthetic": 6.59, "imagereward": 1.53, "clip": 0.286}  # fmt: skip
    other = dict.fromkeys(scores, 0.0)
    header, rows = comparison.cells(comparison.compare({"MARBLE": scores, "base": other}))
    assert header == ["model", "GenEval", "OCR", "PickScore", "CLIPScore", "HPSv2.1", "Aesthetic", "ImageReward",
                      "UnifiedReward", "mine", "composite"]  # fmt: skip
    assert rows[0] == ["MARBLE", "0.94", "0.96", "22.83", "0.286", "0.355", "6.59", "1.53", "3.52", "2.000", "+1.000"]


def test_the_csv_has_numbers_as_they_are():
    rows = list(csv.DictReader(io.StringIO(comparison.as_csv(comparison.compare(ROWS)))))
    assert [row["model"] for row in rows] == ["a", "b", "c"]
    assert float(rows[2]["z ocr"]) == pytest.approx(math.sqrt(2), abs=1e-15)
    assert float(rows[0]["composite"]) == pytest.approx(COMPOSITE["a"], abs=1e-15)


def record(name, trained=None, base=None, model="m", guidance=1.0):
    found = {"name": name, "model": model, "sampling": {"guidance": guidance}, "trained_on": ["x"]}
    for which, scores in (("base", base), ("trained", trained)):
        if scores is not None:
            found[which] = {reward: {"mean": mean, "error": 0.1, "count": 4} for reward, mean in scores.items()}
    return found


def test_rows_have_each_base_model_once_and_put_parts_together():
    records = [record("a", {"x": 1.0}, {"x": 0.0}), record("b", {"x": 2.0}, {"x": 0.0}), record("a", {"y": 3.0})]
    assert results.rows_of(records) == {"base": {"x": 0.0}, "a": {"x": 1.0, "y": 3.0}, "b": {"x": 2.0}}
    records = [record("with guidance", base={"x": 0.5}, guidance=4.5), record("a", {"x": 1.0}, {"x": 0.0})]
    assert list(results.rows_of(records)) == ["with guidance", "base m, guidance 1", "a"]
    with pytest.raises(InputError, match="'a' has two scores of x"):
        results.rows_of([record("a", {"x": 1.0}), record("a", {"x": 1.5})])


def test_a_record_is_written_and_read(tmp_path):
    found = record("a", {"x": 1.0, "held": None}, {"x": 0.25, "held": 2.0})
    found["trained"]["x"]["categories"] = {"colors": {"mean": 1.0, "error": None, "count": 2}}
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(found))
    assert results.read_record(path) == found
    text = results.as_markdown(found)
    assert "| x | yes | 0.250 ± 0.100 | 1.000 ± 0.100 | +0.750 | 4 |" in text
    assert "| held | no | 2.000 ± 0.100 | - | - | 4 |" in text
    assert "| colors | - | 1.000 | 2 |" in text
    rows = list(csv.DictReader(io.StringIO(results.as_csv([found]))))
    assert [(row["weights"], row["reward"], row["category"], row["mean"]) for row in rows] == [
        ("base", "x", "", "0.25"), ("base", "held", "", "2.0"), ("trained", "x", "", "1.0"),
        ("trained", "x", "colors", "1.0"), ("trained", "held", "", ""),
    ]  # fmt: skip
    assert "held *" in results.as_text(found)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "a"}', '{"name": "a", "trained": {"x": 1}}'])
def test_other_files_are_no_records(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"x\.json (is no|cannot be read as an) evaluation"):
        results.read_record(path)
