import json

import numpy as np
import pytest
import torch
from PIL import Image

from mogb_diffusion.cli import main
from mogb_diffusion.errors import InputError
from mogb_diffusion.pictures import find_pictures, read_in_batches, read_picture

DOG = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}


class Brightness:
    """The mean of the pixels."""

    def __init__(self, factor=1.0):
        self.factor = factor

    def __call__(self, images, prompts):
        return self.factor * images.mean(dim=(1, 2, 3))


class Named:
    """1 where a picture is bright and its prompt has a target text; GenEval's way of averaging."""

    per_category = True

    def __call__(self, images, prompts):
        return (images.mean(dim=(1, 2, 3)) > 0.5).double()


class Broken:
    """Cannot score pictures of 8 pixels."""

    def __call__(self, images, prompts):
        if images.shape[-1] == 8:
            raise RuntimeError("eight pixels are too few")
        return images.mean(dim=(1, 2, 3))


def paint(path, level=128, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (level, level, level)).save(path)
    return path


def test_a_text_beside_each_picture(tmp_path):
    for name in ("b.png", "a.jpg", "deep/c.webp"):
        paint(tmp_path / name).with_suffix(".txt").write_text(f'prompt of "{name}"\n')
    found = find_pictures(tmp_path)
    assert [(p.name, p.prompt.text, p.prompt.target_text) for p in found] == [
        (name, f'prompt of "{name}"', name) for name in ("a.jpg", "b.png", "deep/c.webp")
    ]
    (tmp_path / "b.txt").unlink()
    with pytest.raises(InputError, match=r"b\.png in .* have no prompt"):
        find_pictures(tmp_path)


@pytest.mark.parametrize("key", ["file_name", "file", "image"])
def test_lines_of_json(tmp_path, key):
    paint(tmp_path / "x.png")
    paint(tmp_path / "y.png")
    lines = [{key: "y.png", "prompt": "why"}, {key: "x.png", "prompt": "a dog", "metadata": DOG, "seed": 3}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = find_pictures(tmp_path)
    assert (first.name, first.prompt.text, first.prompt.metadata["seed"]) == ("x.png", "a dog", 3)
    assert first.prompt.metadata["tag"] == "single_object"
    assert (second.name, second.prompt.text) == ("y.png", "why")


def test_lines_of_csv_from_elsewhere(tmp_path):
    paint(tmp_path / "in" / "x.png")
    mapping = tmp_path / "list.csv"
    mapping.write_text('file_name,prompt,target_text\nx.png,"a sign, red",STOP\n')
    [found] = find_pictures(tmp_path / "in", mapping)
    assert (found.prompt.text, found.prompt.target_text) == ("a sign, red", "STOP")
    paint(tmp_path / "in" / "other.png")
    with pytest.raises(InputError, match=r"list\.csv has no prompt for other\.png"):
        find_pictures(tmp_path / "in", mapping)


def test_folders_of_geneval(tmp_path):
    for number in range(2):
        for sample in range(2):
            paint(tmp_path / f"{number:05d}" / "samples" / f"{sample:04d}.png")
        paint(tmp_path / f"{number:05d}" / "grid.png")
        (tmp_path / f"{number:05d}" / "metadata.jsonl").write_text(json.dumps(DOG) + "\n")
    found = find_pictures(tmp_path)
    assert [picture.name for picture in found] == [f"0000{n}/samples/000{m}.png" for n in (0, 1) for m in (0, 1)]
    assert all(picture.prompt.metadata["include"] == DOG["include"] for picture in found)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('{"prompt": "x"}', "1: names no picture"),
        ('{"file_name": "x.png"}', "1: prompt must be a text"),
        ('{"file_name": "x.png", "prompt": "x", "rewards": "ocr"}', "rewards must be a list of names"),
        ('{"file_name": "x.png", "prompt": "x", "target_text": 3}', "target_text must be a text"),
        ('{"file_name": "x.png", "prompt": "x", "metadata": 3}', "metadata must be an object"),
        ('{"file_name": "x.png", "prompt": "x"}\n{"file_name": "z.png", "prompt": "x"}', "2: there is no picture"),
        ("x", "1: this is no JSON"),
        ("[]", "1: a line must be a JSON object"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path, lines, words):
    paint(tmp_path / "x.png")
    (tmp_path / "prompts.jsonl").write_text(lines)
    with pytest.raises(InputError, match=words):
        find_pictures(tmp_path)


def test_pixels_are_those_of_the_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert torch.equal(read_picture(tmp_path / "x.png") * 255, torch.from_numpy(pixels).permute(2, 0, 1).float())
    Image.fromarray(np.dstack([pixels, np.zeros((4, 6), np.uint8)])).save(tmp_path / "clear.png")
    assert torch.equal(read_picture(tmp_path / "clear.png"), torch.ones(3, 4, 6))
    turned = Image.fromarray(pixels)
    turned.getexif()[0x0112] = 6  # to be turned clockwise by a quarter
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    assert torch.equal(
        read_picture(tmp_path / "turned.png") * 255,
        torch.from_numpy(np.rot90(pixels, -1).copy()).permute(2, 0, 1).float(),
    )


def test_batches_hold_pictures_of_one_size(tmp_path):
    for number, size in enumerate((8, 8, 8, 6, 6, 8)):
        paint(tmp_path / f"{number}.png", size=size).with_suffix(".txt").write_text("x")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:40])
    (tmp_path / "4.png").write_text("no picture")
    damaged = {}
    shapes = [(tuple(images.shape), [p.name for p in part])
              for images, part in read_in_batches(find_pictures(tmp_path), 2, damaged)]  # fmt: skip
    assert shapes == [((2, 3, 8, 8), ["0.png", "1.png"]), ((1, 3, 6, 6), ["3.png"]), ((1, 3, 8, 8), ["5.png"])]
    assert sorted(damaged) == ["2.png", "4.png"]


def test_score_writes_what_each_picture_got(tmp_path, capsys):
    for number, level in enumerate((51, 102, 204)):
        paint(tmp_path / f"{number}.png", level, size=8 + number).with_suffix(".txt").write_text("x")
    (tmp_path / "bad.png").write_text("no picture")
    (tmp_path / "bad.txt").write_text("x")
    rewards = "test_pictures:Brightness,test_pictures:Named"
    option = "test_pictures:Brightness.factor=10"
    assert main(["score", str(tmp_path), "--rewards", rewards, "--option", option]) == 2  # keys are the class names
    assert "for one of Brightness, Named" in capsys.readouterr().err
    assert main(["score", str(tmp_path), "--rewards", rewards, "--option", "Brightness.factor=10"]) == 0
    told = capsys.readouterr()
    assert "bad.png cannot be read" in told.err
    assert "3 pictures, 1 damaged" in told.out
    summary = json.loads((tmp_path / "scores.json").read_text())
    assert summary["damaged"] == ["bad.png"]
    assert summary["scores"]["Brightness"]["mean"] == pytest.approx((2 + 4 + 8) / 3)
    assert summary["scores"]["Brightness"]["count"] == 3
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert lines[0] == "file_name,prompt,Brightness,Named,problem"
    assert [line.split(",")[0] for line in lines[1:]] == ["0.png", "1.png", "2.png", "bad.png"]
    assert [float(line.split(",")[2]) for line in lines[1:4]] == pytest.approx([2, 4, 8])
    for path in tmp_path.glob("*.png"):
        path.write_text("no picture")
    assert main(["score", str(tmp_path), "--rewards", "test_pictures:Brightness"]) == 2
    assert "none of the 4 pictures" in capsys.readouterr().err


def test_a_reward_that_fails_is_told_and_status_1(tmp_path, capsys):
    paint(tmp_path / "a.png", size=8).with_suffix(".txt").write_text("x")
    paint(tmp_path / "b.png", size=9).with_suffix(".txt").write_text("x")
    where = tmp_path / "out" / "s"
    command = ["score", str(tmp_path), "--rewards", "test_pictures:Broken", "--json", f"{where}.json"]
    assert main([*command, "--csv", f"{where}.csv"]) == 1
    assert "eight pixels are too few" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "s.json").read_text())
    assert found["scores"]["Broken"]["count"] == 1
    assert found["failures"] == {"Broken": {"errors": 1}}


def test_geneval_is_the_mean_over_its_categories(tmp_path):
    # colors: 1 of 1; counting: 1 of 3. The mean over pictures would be 1/2, that over categories is 2/3.
    for number, (tag, level) in enumerate((("colors", 200), ("counting", 200), ("counting", 9), ("counting", 9))):
        paint(tmp_path / f"{number:05d}" / "samples" / "0000.png", level)
        (tmp_path / f"{number:05d}" / "metadata.jsonl").write_text(json.dumps(DOG | {"tag": tag}) + "\n")
    assert main(["score", str(tmp_path), "--rewards", "test_pictures:Named"]) == 0
    score = json.loads((tmp_path / "scores.json").read_text())["scores"]["Named"]
    assert score["mean"] == pytest.approx(2 / 3)
    assert {tag: part["mean"] for tag, part in score["categories"].items()} == pytest.approx(
        {"colors": 1, "counting": 1 / 3}
    )
    assert score["count"] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rewards", "clip,clip"], "each once"),
        (["--rewards", ","], "must name rewards"),
        (["--rewards", "clip", "--option", "ocr.x=1"], "for one of clip"),
        (["--rewards", "beauty"], "There is no reward 'beauty'"),
        (["--rewards", "test_pictures:Brightness", "--timeout", "0"], "--timeout: must be a number > 0"),
    ],
)
def test_score_refuses_in_one_line(tmp_path, arguments, words, capsys):
    paint(tmp_path / "a.png").with_suffix(".txt").write_text("x")
    assert main(["score", str(tmp_path), *arguments]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1
