import json
import os
import re
from pathlib import Path

import pytest

from mogb import plotting
from mogb.compare import InputError, Plan, run_plan
from mogb.compare.merge import merge_folders, read_summary
from mogb.compare.pool import Event
from mogb.compare.store import FIGURES, FIGURES_OF, merge, open_store, read_results

PLAN = Plan(("mgda", "pcgrad"), ("valley",), steps=3)
RECORD = {
    "key": "valley/0/mgda", "method": "mgda", "problem": "valley", "seed": 0, "status": "ok", "error": None,
    "steps": 3, "starts": 2, "optimizer": "sgd", "lr": 0.1, "wall_seconds": 1.0, "versions": {"mogb": "0"},
    "distance": [0.5, 1.0], "stationarity": [0.0, 0.0], "igd_plus": 0.5, "hypervolume_ratio": None,
    "steps_to_tolerance": [None, 2], "conflict_rate": [0.0, 0.0], "cosine_min": [0.1, 0.1], "cosine_mean": [0.2, 0.2],
    "cosine_variance": [0.0, 0.0], "cosine_worst": [0.1, 0.1], "weights_over_time": None, "ends": None,
    "trajectory": None, "unconverged": 0, "max_residual": 0.0, "left_out": {},
}  # fmt: skip


def test_what_is_appended_is_read_again(tmp_path):
    with open_store(tmp_path / "new" / "folder", PLAN) as store:
        store.append(RECORD)
    assert read_results(tmp_path / "new" / "folder") == ({RECORD["key"]: RECORD}, False)
    with open_store(tmp_path / "new" / "folder", PLAN, resume=True) as store:
        assert store.done == {RECORD["key"]: RECORD}


def test_a_record_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with open_store(tmp_path, PLAN) as store:
        store.append(RECORD)
    assert synced == [(tmp_path / "results.jsonl").stat().st_size]


def test_a_torn_last_line_is_cut_off_and_counted(tmp_path):
    with open_store(tmp_path, PLAN) as store:
        store.append(RECORD)
    whole = (tmp_path / "results.jsonl").read_bytes()
    (tmp_path / "results.jsonl").write_bytes(whole + b'{"key": "valley/0/pcg')
    assert read_results(tmp_path) == ({RECORD["key"]: RECORD}, True)
    with open_store(tmp_path, PLAN, resume=True) as store:
        assert store.torn == 21
        store.append(RECORD | {"key": "valley/0/pcgrad"})
    assert len(read_results(tmp_path)[0]) == 2
    assert (tmp_path / "results.jsonl").read_bytes().startswith(whole)


@pytest.mark.parametrize("line", [b'{"key": "valley', b"[1, 2]", b'{"key": "x"}', b"\xff\xfe"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line):
    with open_store(tmp_path, PLAN) as store:
        store.append(RECORD)
    path = tmp_path / "results.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.raises(InputError, match=r"results.jsonl line 1 is damaged .*delete that line.*--resume"):
        open_store(tmp_path, PLAN, resume=True)


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty: add --resume .*--overwrite"):
        open_store(tmp_path, PLAN)


def test_overwrite_removes_its_own_files_and_nothing_else(tmp_path):
    with open_store(tmp_path, PLAN) as store:
        store.append(RECORD)
    (tmp_path / "notes.txt").write_text("mine")
    for name in ("ranking.png", "ranks_coverage.png", "trajectories_valley.png", "conflicts.png", "holiday.png"):
        (tmp_path / name).write_bytes(b"old")
    with open_store(tmp_path, PLAN, overwrite=True) as store:
        assert store.done == {}
    left = [".lock", "holiday.png", "notes.txt", "results.jsonl", "settings.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


@pytest.mark.parametrize("settings", [None, '{"editor.fontSize": 12}'])
def test_overwrite_refuses_a_folder_that_no_comparison_wrote(tmp_path, settings):
    (tmp_path / "ranking.png").write_bytes(b"mine")
    if settings is not None:
        (tmp_path / "settings.json").write_text(settings)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match=rf"--overwrite: {tmp_path} is not empty .*name another folder"):
        open_store(tmp_path, PLAN, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_overwrite_knows_every_figure_that_a_report_draws():
    """Names of figures come from the drawing modules: each of them must be known here."""
    others = ("front.py", "monitor.py")  # figures of other commands, which have folders of their own
    modules = [path for path in Path(plotting.__file__).parent.glob("*.py") if path.name not in others]
    source = "".join(path.read_text() for path in modules)
    names = set(re.findall(r'"(\w+)\.png"', source)) | set(re.findall(r'"(ranks_\w+)", folder', source))
    assert names == set(FIGURES)
    assert set(re.findall(r'f"(\w+)_\{[\w.]+\}\.png"', source)) == set(FIGURES_OF)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (Plan(("mgda",), ("valley",), steps=3), "methods was mgda,pcgrad, is mgda"),
        (Plan(("mgda", "pcgrad"), ("zdt1",), steps=3), "problems was valley, is zdt1"),
        (Plan(("mgda", "pcgrad"), ("valley",), steps=4), "steps was 3, is 4"),
        (Plan(("mgda", "pcgrad"), ("valley",), steps=3, seeds=2), "seeds was 1, is 2"),
        (Plan(("mgda", "pcgrad"), ("valley",), steps=3, quick=True), "quick was False, is True"),
        (Plan(("mgda", "pcgrad"), ("valley",), steps=3, shard=(1, 2)), "shard was 1/1, is 1/2"),
    ],
)
def test_resuming_with_other_settings_is_refused(tmp_path, other, named):
    with open_store(tmp_path, PLAN):
        pass
    with pytest.raises(InputError, match=named):
        open_store(tmp_path, other, resume=True)


def test_damaged_settings_are_named(tmp_path):
    with open_store(tmp_path, PLAN):
        pass
    for text in ("{", "[]", "{}"):
        (tmp_path / "settings.json").write_text(text)
        with pytest.raises(InputError, match=r"settings.json .*--overwrite"):
            open_store(tmp_path, PLAN, resume=True)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(InputError, match=r"has no settings.json beside it"):
        open_store(tmp_path, PLAN, resume=True)


def test_a_file_or_an_unwritable_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file: name a folder"):
        open_store(tmp_path / "file", PLAN)
    with pytest.raises(InputError, match=r"cannot be written: .*Name a folder that you may write to"):
        open_store(tmp_path / "file" / "below", PLAN)
    with pytest.raises(InputError, match=r"--out /proc/nothing cannot be written"):
        open_store(type(tmp_path)("/proc/nothing"), PLAN)


def test_two_writers_at_once_are_refused(tmp_path):
    pytest.importorskip("fcntl")
    with open_store(tmp_path, PLAN) as store:
        store.append(RECORD)
        with (tmp_path / "results.jsonl").open("ab") as file:
            file.write(b'{"key": "val')  # what the first is writing
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError, match="being written by another"):
                open_store(tmp_path, PLAN, **how)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with open_store(tmp_path, PLAN, resume=True):
        pass


def test_records_of_one_run_must_agree_but_for_the_clock():
    records = {RECORD["key"]: RECORD}
    merge(records, [RECORD | {"wall_seconds": 9.0}], "there")
    with pytest.raises(InputError, match=r"there holds another result of 'valley/0/mgda' .*differ in status"):
        merge(records, [RECORD | {"status": "failed"}], "there")


def test_a_record_with_nan_is_never_written(tmp_path):
    with open_store(tmp_path, PLAN) as store, pytest.raises(ValueError, match="JSON"):
        store.append(RECORD | {"distance": float("nan")})
    assert (tmp_path / "results.jsonl").read_bytes() == b""
    assert json.loads((tmp_path / "settings.json").read_text())["methods"] == ["mgda", "pcgrad"]


def without(name):
    return {key: value for key, value in RECORD.items() if key != name}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (without("starts"), "it has no 'starts'"),
        (without("distance"), "it has no 'distance'"),
        (RECORD | {"status": "failed"}, "'error' is not a text"),
        (RECORD | {"status": "fine"}, "'status' is not 'ok' or 'failed'"),
        (RECORD | {"left_out": {"0": "x"}}, "'left_out' is not an object of counts"),
        (RECORD | {"distance": [1.0]}, "'distance' does not have one number per start"),
    ],
)
def test_a_record_without_what_a_summary_reads_is_damaged(tmp_path, record, reason):
    with open_store(tmp_path, PLAN) as store:
        store.append(record)
    with pytest.raises(InputError, match=f"results.jsonl line 1 is damaged .{re.escape(reason)}"):
        read_summary(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"problems": None}, "'problems' is not a list of names"),
        ({"problems": ["hill"]}, "'problems' names the unknown 'hill'"),
        ({"seeds": "2"}, "'seeds' is not a whole number"),
    ],
)
def test_settings_without_what_a_summary_reads_are_damaged(tmp_path, change, reason):
    with open_store(tmp_path, PLAN):
        pass
    (tmp_path / "settings.json").write_text(json.dumps(PLAN.settings() | change))
    with pytest.raises(InputError, match=f"settings.json is damaged: {reason}.*--overwrite"):
        read_summary(tmp_path)


def test_a_run_whose_process_was_killed_is_a_failure_now_and_run_again_on_resume(tmp_path, monkeypatch):
    plan = Plan(("mgda",), ("valley",), steps=2)
    killed = [Event(0, "lost", "its process ended by signal 9")]
    monkeypatch.setattr("mogb.compare.execute.run_jobs", lambda work, jobs, workers: iter(killed))
    with open_store(tmp_path, plan) as store:
        run_plan(plan, store, workers=1)
    assert [record["error"] for record in read_summary(tmp_path).failures] == ["its process ended by signal 9"]
    with open_store(tmp_path, plan, resume=True) as store:
        assert store.done == {}
        run_plan(plan, store, workers=0)
    assert read_summary(tmp_path).failures == []
    with open_store(tmp_path, plan, resume=True) as store:
        assert [record["status"] for record in store.done.values()] == ["ok"]


def test_the_folder_of_a_source_is_the_same_however_it_is_written(tmp_path, monkeypatch):
    for shard in (1, 2):
        with open_store(tmp_path / str(shard), Plan(PLAN.methods, PLAN.problems, steps=3, shard=(shard, 2))) as store:
            store.append(RECORD)
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "1/results.jsonl").read_bytes()
    with pytest.raises(InputError, match="is one of the folders that are merged"):
        merge_folders(["1", "2"], str(tmp_path / "1"), overwrite=True)
    assert (tmp_path / "1/results.jsonl").read_bytes() == before
    merge_folders(["1", "2"], "all")
    assert list(read_results(tmp_path / "all")[0]) == [RECORD["key"]]
