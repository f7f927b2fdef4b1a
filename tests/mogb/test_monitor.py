"""A monitor's lines against numbers computed from the gradients; files torn, resumed or foreign; dashboards."""

import json
import os
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import mogb
from mogb.metrics.stationarity import stationarity

ROWS = torch.tensor([[3.0, 0.0, 1.0], [-1.0, 2.0, 0.0], [0.5, -0.5, 4.0]], dtype=torch.float64)


def step(rows=ROWS, method="upgrad", names=None, params=None):
    weight = torch.zeros(rows.shape[1], dtype=rows.dtype, requires_grad=True)
    losses = rows @ weight + torch.arange(1.0, len(rows) + 1, dtype=rows.dtype)
    losses = losses if names is None else dict(zip(names, losses, strict=True))
    report = mogb.backward(losses, [weight], mogb.make(method))
    return report, weight.grad


def test_a_line_holds_what_the_gradients_say():
    report, direction = step(names=["a", "b", "c"])
    record = mogb.Monitor().log(report)
    rows, d = ROWS.numpy(), direction.numpy()
    norms = np.linalg.norm(rows, axis=1)
    unit = rows / norms[:, None]
    cosines = unit @ d / np.linalg.norm(d)
    assert record["names"] == ["a", "b", "c"]
    assert record["losses"] == [1.0, 2.0, 3.0]
    assert_close(record["weights"], report.weights.tolist(), rtol=1e-6, atol=0)
    assert_close(record["norms"], norms.tolist(), rtol=1e-6, atol=0)
    assert_close(record["cosines"], [unit[0] @ unit[1], unit[0] @ unit[2], unit[1] @ unit[2]], rtol=1e-6, atol=1e-9)
    assert_close(record["direction_cosines"], cosines.tolist(), rtol=1e-6, atol=1e-7)
    assert record["min_cosine"] == pytest.approx(cosines.min(), abs=1e-6)
    assert record["mean_cosine"] == pytest.approx(cosines.mean(), rel=1e-6)
    assert record["var_cosine"] == pytest.approx(cosines.var(), rel=1e-5)
    assert record["conflict_rate"] == pytest.approx(2 / 3, rel=1e-6)  # a-b and b-c
    assert record["stationarity"] == pytest.approx(stationarity(rows, unit=True).relative, rel=1e-6)
    assert record["balanced"] is True
    assert record["left_out"] == []
    assert record["backward_passes"] == 3


def test_a_gradient_of_zero_has_no_angle_and_is_named_where_it_is_left_out():
    rows = torch.cat([ROWS[:2], torch.zeros(1, 3, dtype=torch.float64)])
    record = mogb.Monitor(names=["a", "b", "gone"]).log(step(rows, "nash_mtl")[0])
    assert record["left_out"] == ["gone"]
    assert record["direction_cosines"][2] == 0
    assert record["min_cosine"] == min(record["direction_cosines"][:2])
    assert record["stationarity"] == pytest.approx(stationarity(rows[:2], unit=True).relative, rel=1e-6)
    assert record["norms"][2] == 0
    assert "left out: gone" in mogb.monitor.as_line(record)


def test_steps_that_form_no_gradients_say_nothing_about_them():
    monitor = mogb.Monitor()
    record = monitor.log(step(method="weighted_sum")[0])
    assert "norms" not in record
    assert "cosines" not in record
    assert record["weights"] == pytest.approx([1 / 3] * 3)
    assert "cos" not in str(monitor)
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    balancer = mogb.Balancer(mogb.make("mgda"), [weight], refresh_every=2)
    first, second = (mogb.Monitor().log(balancer.backward(ROWS @ weight)) for _ in range(2))
    assert (first["balanced"], second["balanced"]) == (True, False)
    assert "stationarity" in first
    assert "stationarity" not in second
    assert second["backward_passes"] == 1


def test_methods_without_weights_have_angles_alone():
    record = mogb.Monitor().log(step(method="graddrop")[0])
    assert record["weights"] is None
    assert len(record["direction_cosines"]) == 3
    assert "(w" not in mogb.monitor.as_line(record)


def test_groups_are_told_apart():
    first, second = (torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    losses = ROWS @ first + ROWS.flip(0) @ second
    groups = {"one": [first], "two": [second]}
    record = mogb.Monitor().log(mogb.backward(losses, [first, second], mogb.make("upgrad"), groups=groups))
    assert record["weights"] is None
    assert list(record["groups"]) == ["one", "two"]
    assert_close(record["groups"]["one"]["weights"], record["groups"]["two"]["weights"][::-1], rtol=1e-5, atol=1e-6)


def test_one_objective_is_no_conflict():
    record = mogb.Monitor().log(step(ROWS[:1])[0])
    assert record["conflict_rate"] == 0
    assert record["cosines"] == []
    assert record["stationarity"] == pytest.approx(1)


def test_many_objectives_have_no_matrix():
    rows = torch.randn(17, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    record = mogb.Monitor().log(step(rows, "mgda")[0])
    assert record["cosines"] is None
    assert len(record["norms"]) == 17
    record = mogb.Monitor().log(step(rows[:9], "mgda")[0])
    assert len(record["cosines"]) == 36
    assert not any("mogb/cosine/" in tag for tag in mogb.monitor.as_scalars(record))


def test_the_terminal_line():
    monitor = mogb.Monitor(names=["near", "far"])
    assert str(monitor) == "nothing logged yet"
    monitor.log(step(torch.tensor([[1.0, 0.0], [-0.6, 0.8]], dtype=torch.float64), "mgda")[0], step=7)
    line = "step 7 | near 1 (w 0.5) far 2 (w 0.5) | cos(d, g) min +0.447 mean +0.447 | 1 of 1 pairs conflict"
    assert monitor.line() == line + " | stationarity 0.447"


# --- files ---


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_appended_as_they_come(tmp_path):
    path = tmp_path / "deep" / "monitor.jsonl"
    report, _ = step()
    with mogb.Monitor(path) as monitor:
        for number in range(3):
            monitor.log(report)
            assert [record["step"] for record in lines(path)] == list(range(number + 1))
        assert monitor.records() == lines(path)
    assert not monitor._kept  # what is on disk is not held in memory


def test_numbers_that_do_not_exist_are_null(tmp_path):
    report = mogb.Report(
        weights=torch.tensor([float("nan"), 1.0]), gramian=None, cosines=None, min_cosine=float("nan"), conflicts=None,
        losses=torch.tensor([float("inf"), 1.0]), names=None, left_out=(), residual=float("nan"), converged=False,
        note="", backward_passes=1,
    )  # fmt: skip
    mogb.Monitor(tmp_path / "m.jsonl").log(report)
    (record,) = lines(tmp_path / "m.jsonl")
    assert record["weights"] == [None, 1.0]
    assert record["losses"] == [None, 1.0]
    assert record["residual"] is None
    assert "NOT CONVERGED" in mogb.monitor.as_line(record)


def test_a_skipped_step_says_so():
    weight = torch.zeros(3, requires_grad=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    losses = ROWS.float() @ weight * 1e6
    record = mogb.Monitor().log(mogb.backward(losses, [weight], mogb.make("mgda"), scaler=scaler))
    assert record["skipped"] is True
    assert record["balanced"] is False
    assert "skipped" in mogb.monitor.as_line(record)


def test_resuming_goes_on_and_repeats_nothing(tmp_path):
    path, (report, _) = tmp_path / "m.jsonl", step()
    monitor = mogb.Monitor(path)
    for _ in range(5):
        monitor.log(report)
    with path.open("a") as file:
        file.write('{"step": 5, "names": ["torn')  # the machine lost its power
    again = mogb.Monitor(path, resume=True)
    assert again.step == 5
    assert again.last["step"] == 4
    again.load_state_dict({"step": 3})  # of an older checkpoint
    again.log(step(names=["a", "b", "c"])[0])
    again.log(report)
    found = lines(path)
    assert [record["step"] for record in found] == [0, 1, 2, 3, 4]
    assert found[3]["names"] == ["a", "b", "c"]
    fourth = mogb.Monitor(path, resume=True)
    fourth.log(report, step=2)
    assert [record["step"] for record in lines(path)] == [0, 1, 2]
    fifth = mogb.Monitor(path, resume=True)
    fifth.log(report)
    assert [record["step"] for record in lines(path)] == [0, 1, 2, 3]


def test_a_state_survives_a_checkpoint(tmp_path):
    monitor = mogb.Monitor()
    for _ in range(3):
        monitor.log(step()[0])
    fresh = mogb.Monitor()
    fresh.load_state_dict(monitor.state_dict())
    assert fresh.log(step()[0])["step"] == 3
    monitor.load_state_dict({"step": 1})
    monitor.log(step()[0])
    assert [record["step"] for record in monitor.records()] == [0, 1]


KILLED = """
import os, signal, sys, torch, mogb
weight = torch.zeros(2, requires_grad=True)
monitor = mogb.Monitor(sys.argv[1])
for number in range(1000):
    monitor.log(mogb.backward(torch.stack([weight.sum(), -weight.sum() / 2]), [weight], mogb.make("mgda")))
    if number == 20:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_run_keeps_every_line(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "m.jsonl")], cwd=os.getcwd(), check=False)
    assert done.returncode == -signal.SIGKILL
    assert [record["step"] for record in lines(tmp_path / "m.jsonl")] == list(range(21))


# --- what is refused ---


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    path = tmp_path / "m.jsonl"
    mogb.Monitor(path).log(step()[0])
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="resume=True"):
        mogb.Monitor(path)
    path.write_text("not ours\n" + before.decode())
    with pytest.raises(ValueError, match="line 1, is no line of a Monitor"):
        mogb.Monitor(path, resume=True)
    with pytest.raises(ValueError, match="is a folder"):
        mogb.Monitor(tmp_path)


@pytest.mark.parametrize("names", [["a", "a"], [], "ab"])
def test_names_must_tell_objectives_apart(names, unchecked):
    with pytest.raises(ValueError, match="names must be different names"):
        mogb.Monitor(names=names)


def test_what_is_no_step_is_refused(unchecked):
    monitor = mogb.Monitor(names=["a", "b"])
    with pytest.raises(TypeError, match="report must be"):
        monitor.log({"loss": 1.0})
    with pytest.raises(ValueError, match="names has 2 entries, a, b, but there are 3 losses"):
        monitor.log(step()[0])
    monitor = mogb.Monitor()
    monitor.log(step()[0], step=4)
    for bad, match in ((4, "comes after step 4"), (-1, "whole number"), (5.5, "whole number"), (True, "whole number")):
        with pytest.raises(ValueError, match=match):
            monitor.log(step()[0], step=bad)
    with pytest.raises(ValueError, match="no state of a Monitor"):
        monitor.load_state_dict({"steps": 3})
    assert [record["step"] for record in monitor.records()] == [4]


# --- dashboards ---


class Board:
    """Takes what TensorBoard and Weights & Biases take."""

    def __init__(self):
        self.seen = {}

    def add_scalar(self, tag, value, step):
        self.seen[tag, step] = value

    def flush(self):
        self.seen["flushed"] = True

    def log(self, scalars, step):
        self.seen |= {(tag, step): value for tag, value in scalars.items()}


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_dashboards_get_the_numbers(kind):
    board = Board()
    monitor = mogb.Monitor(names=["a", "b", "c"], **{kind: board})
    record = monitor.log(step()[0], step=3)
    monitor.close()
    assert board.seen["mogb/loss/b", 3] == 2.0
    assert board.seen["mogb/cosine/a, c", 3] == record["cosines"][1]
    assert board.seen["mogb/stationarity", 3] == record["stationarity"]
    assert board.seen["mogb/left_out", 3] == 0
    assert all(value is not None for value in board.seen.values())


def test_tensorboard_writes_its_files(tmp_path):
    pytest.importorskip("tensorboard", reason="needs TensorBoard: pip install tensorboard")
    with mogb.Monitor(tensorboard=tmp_path / "board") as monitor:
        monitor.log(step()[0])
    assert any((tmp_path / "board").iterdir())


@pytest.mark.parametrize(("kind", "given"), [("tensorboard", "folder"), ("wandb", True)])
def test_missing_packages_are_named(kind, given, monkeypatch):
    for module in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {kind}"):
        mogb.Monitor(**{kind: given})


def test_weights_and_biases_needs_a_run(monkeypatch):
    module = types.ModuleType("wandb")
    module.run = None
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ValueError, match=r"wandb\.init"):
        mogb.Monitor(wandb=True)
    module.run = Board()
    mogb.Monitor(wandb=True).log(step()[0])
    assert module.run.seen["mogb/loss/0", 0] == 1.0
    for kind in ("wandb", "tensorboard"):
        with pytest.raises(TypeError, match=f"{kind} must be"):
            mogb.Monitor(**{kind: 3})


# --- the picture ---


@pytest.mark.parametrize("size", [1, 2, 9])
def test_the_picture_is_drawn_for_few_and_many_objectives(size, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'mogb[plot]'")
    generator = torch.Generator().manual_seed(0)
    monitor = mogb.Monitor(tmp_path / "m.jsonl")
    for number in range(5):
        rows = torch.randn(size, 6, dtype=torch.float64, generator=generator)
        monitor.log(step(rows * (number != 2), "nash_mtl" if number % 2 else "weighted_sum")[0])
    path = monitor.plot(tmp_path / "m.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_an_empty_monitor_draws_nothing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nothing to draw"):
        mogb.Monitor(tmp_path / "m.jsonl").plot(tmp_path / "m.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'mogb\[plot\]'"):
        mogb.Monitor().plot(tmp_path / "m.png")
