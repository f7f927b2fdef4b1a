import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mogb_diffusion import checkpoint, config
from mogb_diffusion.errors import CheckpointError, InputError
from mogb_diffusion.tracking import Tracker, read_metrics, save_grid


def test_lines_are_valid_json_and_go_on_where_they_were(tmp_path):
    tracker = Tracker(tmp_path, config.Tracking())
    tracker.log("epoch", 0, 1, {"rewards": {"a": math.nan, "b": 1.5}, "list": [math.inf, 2]})
    tracker.log("epoch", 1, 2, {})
    assert tracker.lines == 2
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "ep')
    again = Tracker(tmp_path, config.Tracking(), keep=1)
    again.log("epoch", 1, 2, {"new": True})
    again.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"kind": "epoch", "epoch": 0, "step": 1, "rewards": {"a": None, "b": 1.5}, "list": [None, 2]},
        {"kind": "epoch", "epoch": 1, "step": 2, "new": True},
    ]


def test_torn_lines_are_left_out_and_wrong_ones_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "epoch"}\n{"kind": "st')
    assert read_metrics(tmp_path) == [{"kind": "epoch"}]
    (tmp_path / "metrics.jsonl").write_text("{x}\n")
    with pytest.raises(InputError, match=r"metrics.jsonl:1: this is no JSON"):
        read_metrics(tmp_path)


def test_grids_show_every_pixel(tmp_path):
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    save_grid(images, tmp_path / "grid.png", columns=2, scale=2)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (2 * 10 + 2, 2 * 10 + 2, 3)
    second = sheet[2:10, 12:20]  # behind the first and two gaps
    expected = (images[1] * 255).round().byte().permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
    assert (second == expected).all()
    third = sheet[12:20, 2:10]
    assert (third == (images[2] * 255).round().byte().permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)).all()


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    tracker = Tracker(tmp_path, config.Tracking(tensorboard=True))
    tracker.log("epoch", 0, 3, {"rewards": {"a": 0.25, "b": math.nan}, "note": "x"})
    tracker.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["epoch/rewards/a"]
    assert [(e.step, e.value) for e in events.Scalars("epoch/rewards/a")] == [(3, 0.25)]


def test_missing_trackers_name_the_extra_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"mogb\[wandb\]"):
        Tracker(tmp_path / "a", config.Tracking(wandb="project"))
    with pytest.raises(InputError, match=r"mogb\[tensorboard\]"):
        Tracker(tmp_path / "b", config.Tracking(tensorboard=True))


STATE = {
    "number": 0.1, "text": "x", "none": None, "flag": True, "list": [1, {"deep": torch.arange(3)}], "pair": (0.9, 0.99),
    "by number": {0: {"exp_avg": torch.rand(2, 2, dtype=torch.float64)}, 1: {}}, "shared": torch.ones(2).expand(3, 2),
    "nan": math.nan,
}  # fmt: skip


def test_states_come_back_as_they_were(tmp_path):
    folder = checkpoint.save(tmp_path, 12, STATE, lambda path: (path / "weights").write_text("w"))
    found = checkpoint.load(folder)
    assert folder.name == "checkpoint-000012"
    assert found["pair"] == (0.9, 0.99)
    assert found["list"][0] == 1
    assert found["flag"] is True
    assert math.isnan(found["nan"])
    assert set(found["by number"]) == {0, 1}
    assert torch.equal(found["by number"][0]["exp_avg"], STATE["by number"][0]["exp_avg"])
    assert found["list"][1]["deep"].dtype == torch.int64
    assert torch.equal(found["shared"], torch.ones(3, 2))
    with pytest.raises(TypeError, match="/x is Generator"):
        checkpoint.save(tmp_path, 13, {"x": torch.Generator()}, lambda path: None)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors", "weights", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_every_damage_is_found(tmp_path, name, damage):
    folder = checkpoint.save(tmp_path, 1, STATE, lambda path: (path / "weights").write_text("weights"))
    path = folder / name
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-3])
    else:
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load(folder)


def test_the_newest_whole_one_is_found(tmp_path):
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, {"step": step}, lambda path: None, keep_last=2)
    assert [path.name for path in checkpoint.found(tmp_path)] == ["checkpoint-000010", "checkpoint-000002"]
    (tmp_path / "checkpoint-000010" / "state.json").unlink()
    told = []
    assert checkpoint.newest(tmp_path, told.append)[1] == {"step": 2}
    assert len(told) == 1
    assert checkpoint.newest(tmp_path / "nothing", told.append) is None


def test_a_second_save_of_a_step_replaces_the_first_one_and_a_kill_between_leaves_one(tmp_path):
    checkpoint.save(tmp_path, 1, {"n": 1}, lambda path: None)
    checkpoint.save(tmp_path, 1, {"n": 2}, lambda path: None)
    assert checkpoint.newest(tmp_path, print)[1] == {"n": 2}
    (tmp_path / "checkpoint-000001").rename(tmp_path / ".aside-checkpoint-000001")  # killed between two renames
    before = sorted(path.name for path in tmp_path.iterdir())
    assert checkpoint.newest(tmp_path, print)[1] == {"n": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == before  # who reads, writes nothing
    checkpoint.restore(tmp_path)
    checkpoint.restore(tmp_path)
    assert checkpoint.newest(tmp_path, print)[1] == {"n": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000001", "latest"]
