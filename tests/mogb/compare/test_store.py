import json
import os

import pytest

from mogb.compare import InputError, Plan
from mogb.compare.store import merge, open_store, read_results

PLAN = Plan(("mgda", "pcgrad"), ("valley",), steps=3)
RECORD = {"key": "valley/0/mgda", "method": "mgda", "problem": "valley", "seed": 0, "status": "ok", "wall_seconds": 1.0}


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
    (tmp_path / "figure.png").write_bytes(b"old")
    with open_store(tmp_path, PLAN, overwrite=True) as store:
        assert store.done == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "results.jsonl", "settings.json"]


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
    with open_store(tmp_path, PLAN), pytest.raises(InputError, match="being written by another"):
        open_store(tmp_path, PLAN, resume=True)
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
