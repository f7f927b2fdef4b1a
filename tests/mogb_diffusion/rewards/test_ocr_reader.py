"""The OCR reward on rendered text, read for real."""

import os
import threading

import numpy as np
import pytest
import torch

from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rewards import load
from mogb_diffusion.rewards.ocr import reading_order
from mogb_diffusion.rewards.throughput import measure


def rendered(*lines, turn=0.0, ink="black", paper="white", size=44):
    image_module, draw_module = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageDraw")
    matplotlib, fonts = pytest.importorskip("matplotlib"), pytest.importorskip("PIL.ImageFont")
    font = fonts.truetype(os.path.join(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)
    image = image_module.new("RGB", (448, 224), paper)
    for index, line in enumerate(lines):
        draw_module.Draw(image).text((40, 40 + 80 * index), line, fill=ink, font=font)
    array = np.asarray(image.rotate(turn, fillcolor=paper)).copy()
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def ocr():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    return load("ocr")


def wanted(text):
    return [Prompt(f'a sign that says "{text}"', target_text=text)]


@pytest.mark.parametrize(
    ("picture", "text", "reward"),
    [
        ({"lines": ["Hello World"]}, "Hello World", 1.0),
        ({"lines": ["Hello World"]}, "hello  world", 1.0),  # case and spaces do not count
        ({"lines": ["Hello World"]}, "Hallo World", 0.9),  # one letter of ten
        ({"lines": ["Hello", "World"]}, "Hello World", 1.0),
        ({"lines": ["OPEN 24"], "turn": 12}, "OPEN 24", 1.0),
        ({"lines": ["NASA"], "ink": "white", "paper": "navy"}, "NASA", 1.0),
        ({"lines": []}, "NASA", 0.0),
        ({"lines": ["bread"]}, "NASA", 0.0),
    ],
)
def test_rendered_text_is_read(ocr, picture, text, reward):
    picture = dict(picture)
    assert ocr(rendered(*picture.pop("lines"), **picture), wanted(text)).tolist() == pytest.approx([reward], abs=1e-6)


def test_a_prompt_without_text_does_not_apply(ocr):
    prompts = [Prompt("a cat"), Prompt("a cat", target_text=" "), *wanted("NASA")]
    assert [ocr.applies(prompt) for prompt in prompts] == [False, False, True]
    assert ocr(rendered("NASA").repeat(3, 1, 1, 1), prompts).isnan().tolist() == [True, True, False]


def box(left, top, width=50, height=20):
    return [[left, top], [left + width, top], [left + width, top + height], [left, top + height]]


def test_lines_are_ordered_as_they_are_read():
    boxes = [box(200, 104), box(10, 200), box(20, 100), box(10, 10)]
    lines = [("right", 1.0), ("below", 1.0), ("left", 1.0), ("above", 1.0)]
    assert [text for text, _ in reading_order(boxes, lines)] == ["above", "left", "right", "below"]
    assert reading_order([], []) == []


def always_seven(picture):
    assert picture.dtype == np.uint8
    assert picture.shape == (224, 448, 3)
    return [("seven", 0.9)]


def test_a_reader_of_your_own():
    reward = load("ocr", backend=f"{__name__}:always_seven")
    assert reward(rendered("x"), wanted("seven")).tolist() == [1.0]


class Meeting:
    """Readers that wait for each other: it takes three at once."""

    barrier = threading.Barrier(3, timeout=10)


def met(picture):
    Meeting.barrier.wait()
    return [(str(int(picture[0, 0, 0])), 0.9)]


def test_pictures_are_read_at_once_and_keep_their_order():
    reward = load("ocr", backend=f"{__name__}:met", workers=3)
    pictures = (torch.arange(6).view(6, 1, 1, 1).expand(6, 3, 4, 4)).to(torch.uint8)
    prompts = [Prompt("a", target_text=str(number if number != 4 else 9)) for number in range(6)]
    assert reward(pictures, prompts).tolist() == [1, 1, 1, 1, 0, 1]


def test_the_built_in_picture_for_measuring_says_what_it_should(ocr):
    assert measure(ocr, pictures=1).scores.tolist() == [1.0]


def test_two_readers_read_as_one_does(ocr):
    pytest.importorskip("rapidocr")
    two = load("ocr", workers=2)
    pictures = torch.cat([rendered(text) for text in ("NASA", "bread", "OPEN 24")])
    prompts = [prompt for text in ("NASA", "NASA", "OPEN 42") for prompt in wanted(text)]
    assert torch.equal(two(pictures, prompts), ocr(pictures, prompts))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be a positive whole number"),
        ({"backend": "paddle"}, "backend must be rapidocr, or module:function"),
        ({"backend": "no_such_module:read"}, "cannot be imported"),
        ({"backend": "math:read"}, "has no function read"),
        ({"threads": -1}, "threads must be a whole number"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        load("ocr", **options)
