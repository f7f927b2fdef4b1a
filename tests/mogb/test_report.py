"""Figures and report.html, drawn from a comparison of a few steps."""

import html.parser
import re

import numpy as np
import pytest

from mogb.cli import main
from mogb.compare.merge import read_summary
from mogb.plotting.paths import draw_paths
from mogb.plotting.style import styled
from mogb.report import to_html, write_report

matplotlib_image = pytest.importorskip("matplotlib.image")

METHODS = "mgda,graddrop,smoothed(mgda,decay=0.5),weighted_sum(weights=[1.0,1.0,1.0])"
PROBLEMS = "valley,valley_scaled,dtlz2,specialists"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Two coordinates, three objectives, mini-batches; a method that fails, and one without weights."""
    folder = tmp_path_factory.mktemp("drawn") / "out"
    arguments = ["--steps", "3", "--seeds", "1", "--workers", "0", "--out", str(folder)]
    assert main(["compare", "--methods", METHODS, "--problems", PROBLEMS, *arguments]) == 0
    return folder


class Page(html.parser.HTMLParser):
    """Collects tags; complains about what is not closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_every_kind_of_figure_is_drawn_and_shows_something(drawn):
    names = {path.name for path in drawn.glob("*.png")}
    assert names == {
        "ranking.png", "ranks_distance.png", "ranks_coverage.png", "invariance_valley.png",
        "trajectories_valley.png", "trajectories_valley_scaled.png",
        "objectives_valley.png", "objectives_valley_scaled.png", "objectives_dtlz2.png",
        "conflicts.png", "conflicts_specialists.png",
        "weights_valley_scaled.png", "weights_specialists.png",
    }  # fmt: skip
    for path in drawn.glob("*.png"):
        pixels = (matplotlib_image.imread(path)[:, :, :3] * 255).astype(np.uint32)
        height, width = pixels.shape[:2]
        assert min(height, width) > 300, path.name
        packed = pixels @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
        assert len(np.unique(packed[::3, ::3])) > 50, path.name
        ink = (pixels < 230).any(2)
        assert 0.01 < ink.mean() < 0.95, path.name
        border = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
        assert not border.any(), f"{path.name}: something is cut off at the edge"


def test_the_paths_are_where_the_records_say(drawn, tmp_path):
    summary = read_summary(drawn)
    with styled():
        draw_paths(summary, "valley", tmp_path)
        names = {"trajectories_valley.png", "objectives_valley.png"}
        assert {path.name for path in tmp_path.iterdir()} == names
        assert all((tmp_path / name).read_bytes() == (drawn / name).read_bytes() for name in names)
        trajectory = summary.records["valley/0/mgda"]["trajectory"]
        trajectory["x"] = (np.array(trajectory["x"]) * 0.9).tolist()
        trajectory["losses"] = (np.array(trajectory["losses"]) * 0.9).tolist()
        draw_paths(summary, "valley", tmp_path)
        assert all((tmp_path / name).read_bytes() != (drawn / name).read_bytes() for name in names)


def test_the_report_is_one_file_that_loads_nothing(drawn):
    text = (drawn / "report.html").read_text()
    page = Page(text)
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == len(list(drawn.glob("*.png")))
    assert all(source.startswith("data:image/png;base64,") for source in images)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "video", "audio"})
    assert all(attributes["href"].startswith("#") for tag, attributes in page.tags if tag == "a")
    assert not re.search(r"url\(|@import|srcset", text.split("</style>")[0])
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"} == targets


def test_the_report_says_what_was_run_found_and_how_to_cite(drawn):
    text = (drawn / "report.html").read_text()
    for expected in (
        "4 methods on 4 problems with 1 seed, 3 steps on every problem", "<li>By distance to the front, ",
        "smoothed(mgda,decay=0.5)", "Failed runs", "step 1, start 0: weights must have one number per objective",
        "@inproceedings{mgda,", "Chen", "settings.json", "Against the exact gradients",
    ):  # fmt: skip
        assert expected in text, expected
    assert text.count("@inproceedings{mgda,") == 1


def test_markup_in_a_message_is_text_in_the_report(drawn):
    summary = read_summary(drawn)
    key = "valley/0/weighted_sum(weights=[1.0,1.0,1.0])"
    summary.records[key]["error"] = "<script>alert(1)</script> & more"
    text = to_html(summary, [])
    Page(text)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text


def test_without_figures_the_tables_are_there(drawn, tmp_path):
    written = write_report(read_summary(drawn), tmp_path, figures=False)
    assert sorted(path.name for path in written) == ["report.html", "summary.csv", "summary.md"]
    assert "<img" not in (tmp_path / "report.html").read_text()
    assert (tmp_path / "summary.csv").read_bytes() == (drawn / "summary.csv").read_bytes()


@pytest.mark.slow
def test_workers_draw_the_same_pictures(drawn):
    before = {path.name: path.read_bytes() for path in drawn.glob("*.png")}
    assert main(["report", str(drawn), "--workers", "2"]) == 0
    assert {path.name: path.read_bytes() for path in drawn.glob("*.png")} == before
