import json

import numpy as np
import pytest
from PIL import Image

from mogb_diffusion.cli import main
from mogb_diffusion.config import to_yaml
from mogb_diffusion.errors import InputError
from mogb_diffusion.recipes import recipe
from mogb_diffusion.report_runs import write_comparison


def score(mean):
    return {"mean": mean, "error": 0.1, "count": 8}


def folder(path, last, seed=0, rollouts=(0.1, 0.2, 0.3), first=0.0):
    """A run as it is on the disk."""
    path.mkdir(parents=True)
    run = recipe("tiny_smoke")
    (path / "config.yaml").write_text(to_yaml(run).replace("seed: 0", f"seed: {seed}", 1))
    rows = [{"kind": "evaluation", "epoch": 0, "step": 0, "name": "before", "scores": {"text": score(first)}}]
    rows += [{"kind": "epoch", "epoch": n + 1, "step": n + 1, "rewards": {"text": value, "a/b": None if n else 1.0},
              "seconds": {}} for n, value in enumerate(rollouts)]  # fmt: skip
    rows.append({"kind": "evaluation", "epoch": 3, "step": 3, "name": "after", "scores": {"text": score(last)}})
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def colored(path, rgb):
    """Pixels of about this color."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(pixels - np.array(rgb)).max(axis=2) < 8).sum())


BLUE, VERMILION, GREEN = (0, 114, 178), (213, 94, 0), (0, 158, 115)


def test_several_runs_are_on_one_page(tmp_path, capsys):
    one, two = folder(tmp_path / "one", 1.0), folder(tmp_path / "two", 2.0)
    out = tmp_path / "out"
    assert main(["report", str(one), str(two), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "comparison.html", "comparison.csv", "comparison.md", "compare-text.png", "compare-a_b.png",
    }  # fmt: skip
    assert (one / "report.html").exists()
    # Scores 0, 1, 2: z-scores -sqrt(3/2), 0, sqrt(3/2).
    for text in (told, (out / "comparison.md").read_text(), (out / "comparison.html").read_text()):
        assert "-1.225" in text
        assert "+1.225" in text
    assert told.splitlines()[-1] == str(out / "comparison.html")
    page = (out / "comparison.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "<td>one<td>marble_exact<td>3<td>3" in page
    assert "not measured alike" not in page


def test_every_run_has_its_own_line(tmp_path):
    runs = [folder(tmp_path / "one", 1.0, rollouts=(0.1, 0.2, 0.3)), folder(tmp_path / "two", 2.0, rollouts=(1, 2, 3))]
    write_comparison(runs, tmp_path / "out")
    picture = tmp_path / "out" / "compare-text.png"
    counts = [colored(picture, color) for color in (BLUE, VERMILION, GREEN)]
    assert counts[0] > 300
    assert counts[1] > 300
    assert counts[2] == 0
    write_comparison([*runs, folder(tmp_path / "three", 3.0, rollouts=(3, 2, 1))], tmp_path / "out")
    assert colored(picture, GREEN) > 300


def test_evaluations_of_elsewhere_join_and_differences_are_told(tmp_path, capsys):
    one, two = folder(tmp_path / "x" / "run", 1.0), folder(tmp_path / "y" / "run", 2.0, seed=5)
    (two / "evaluation.json").write_text(
        json.dumps({"name": "z", "model": "tiny-random", "seed": 5, "trained": {"text": score(4.0)}})
    )
    other = tmp_path / "peer.json"
    other.write_text(json.dumps({"name": "peer", "trained": {"text": score(7.0), "ocr": score(0.5)}}))
    assert main(["report", str(one), str(two), str(other), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    rows = [line.split() for line in told.splitlines() if line.startswith(("base", "x/run", "y/run", "peer"))]
    assert [(row[0], row[2]) for row in rows] == [
        ("base", "0.000"), ("x/run", "1.000"), ("y/run", "4.000"), ("peer", "7.000"),
    ]  # fmt: skip
    assert "without OCR" in told
    assert "not measured alike: they differ in prompts, pictures, seed, sampling" in told


def test_what_cannot_be_compared(tmp_path, capsys):
    one = folder(tmp_path / "one", 1.0)
    with pytest.raises(InputError, match="named twice"):
        write_comparison([one, one], tmp_path / "out")
    with pytest.raises(InputError, match="is no folder of a run"):
        write_comparison([one, tmp_path], tmp_path / "out")
    assert main(["report", str(one), "--out", str(tmp_path / "x")]) == 2
    assert "name several runs" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="nothing to compare"):
        write_comparison([empty, folder_without_rows(tmp_path / "other")], tmp_path / "out")


def folder_without_rows(path):
    path.mkdir()
    (path / "metrics.jsonl").write_text("")
    return path


def test_a_run_that_goes_on_is_shown_without_scores(tmp_path):
    one = folder(tmp_path / "one", 1.0)
    lines = [line for line in (one / "metrics.jsonl").read_text().splitlines() if '"epoch", ' in line]
    (one / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    two = folder_without_rows(tmp_path / "two")
    (two / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page, table = write_comparison([one, two], tmp_path / "out")
    assert table == ""
    assert "Final scores" not in page.read_text()
    assert not (tmp_path / "out" / "comparison.csv").exists()


def test_an_evaluation_of_an_earlier_step_is_not_taken(tmp_path, capsys):
    one, two = folder(tmp_path / "one", 1.0), folder(tmp_path / "two", 2.0)
    evaluation = {"name": "z", "model": "tiny-random", "epoch": 1, "step": 1, "trained": {"text": score(9.0)}}
    (two / "evaluation.json").write_text(json.dumps(evaluation))
    assert main(["report", str(one), str(two), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert [line.split()[1] for line in told.splitlines() if line.startswith("two ")] == ["2.000"]
    remark = (
        "two: evaluation.json is of step 1, but the run is at step 3: left out for the run's own evaluation of step 3."
    )
    assert remark in told
    assert "two: evaluation.json is of step 1" in (tmp_path / "out" / "comparison.html").read_text()
    lines = [line for line in (two / "metrics.jsonl").read_text().splitlines() if '"after"' not in line]
    (two / "metrics.jsonl").write_text("\n".join(lines) + "\n")  # it has no later one of its own
    _, told = write_comparison([one, two], tmp_path / "out")
    assert "9.000" in told
    assert "two: evaluation.json is of step 1, but the run is at step 3." in told


def test_scores_of_one_name_that_measure_different_things_are_told(tmp_path):
    records = []
    for name, metric in (("a", "score"), ("b", "correct")):
        path = tmp_path / f"{name}.json"
        metrics = {"geneval": f"geneval, metric {metric}", "ocr": "ocr"}
        path.write_text(
            json.dumps({"name": name, "trained": {"geneval": score(0.5), "ocr": score(1.0)}, "metrics": metrics})
        )
        records.append(path)
    _, told = write_comparison(records, tmp_path / "out")
    assert "what they measure (geneval: geneval, metric correct | geneval, metric score)." in told
    records[1].write_text(records[0].read_text().replace('"a"', '"b"'))
    assert "measured alike" not in write_comparison(records, tmp_path / "out")[1]
