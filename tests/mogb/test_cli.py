"""The command line: exit statuses, messages of one line, resuming, merging, the report."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mogb
from mogb.cli import main
from mogb.compare import LAUNCH_METHODS
from mogb.problems import registered_problems

SMALL = ["--methods", "weighted_sum,cagrad(c=0.2),rlw", "--problems", "quadratic_scaled,specialists", "--steps", "4"]
COMPARE = ["compare", *SMALL, "--seeds", "2", "--workers", "0", "--no-figures"]
SUMMARIES = ("summary.csv", "summary.md")


def call(*arguments):
    """The exit status, whether it was returned or raised by argparse."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as error:
        return error.code


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "out"
    assert call(*COMPARE, "--out", folder) == 0
    return folder


def same_summaries(one, other):
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in SUMMARIES)


# --- listing --------------------------------------------------------------------------------------------------------


def test_list_names_every_method(capsys):
    assert call("list") == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^{name} ", printed, re.MULTILINE) for name in mogb.registered())


def test_list_as_json_is_one_array_with_what_a_method_reads_promises_and_its_reference(capsys):
    assert call("list", "aggregators", "--json") == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert sorted(entries) == list(mogb.registered())
    assert entries["mgda"]["reads"] == mogb.make("mgda").reads
    assert entries["upgrad"]["promises"] == sorted(promise.value for promise in mogb.make("upgrad").promises)
    assert entries["cagrad"]["reference"]["arxiv"] == "2110.14048"
    assert "c" in entries["cagrad"]["options"]


def test_list_problems(capsys):
    assert call("list", "problems", "--json") == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert sorted(entries) == list(registered_problems())
    assert (entries["valley"]["objectives"], entries["valley"]["dim"], entries["valley"]["starts"]) == (2, 2, 5)
    assert call("list", "problems") == 0
    assert "valley_scaled" in capsys.readouterr().out


def test_cite_prints_bibtex(capsys):
    assert call("cite", "mgda", "nash_mtl") == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^@(\w+){(.*),$", printed, re.MULTILINE) == [
        ("inproceedings", "mgda"),
        ("inproceedings", "nash_mtl"),
    ]
    assert "Bargaining" in printed


@pytest.mark.parametrize("name", ["cagrad", "smoothed", "valley_scaled"])
def test_show_tells_what_it_is_and_what_can_be_set(capsys, name):
    assert call("show", name) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{name}: ")
    assert {"cagrad": "  c = 0.", "smoothed": "  decay = 0.9", "valley_scaled": "  steps: 50000"}[name] in printed


@pytest.mark.parametrize(
    "command", [[], ["list"], ["show"], ["cite"], ["compare"], ["report"], ["front"], ["recommend"]]
)
def test_every_command_has_help_with_an_example(capsys, command):
    assert call(*command, "--help") == 0
    printed = capsys.readouterr().out
    assert not command or f"mogb {command[0]}" in printed.split("example", 1)[1]


def test_the_version(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out == f"mogb {mogb.__version__}\n"


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "COMMAND"),
        (["lsit"], "invalid choice: 'lsit'"),
        (["list", "methods"], "invalid choice: 'methods'"),
        (["cite"], "NAME"),
        (["cite", "mgdaa"], "unknown name 'mgdaa'. Known ones: .*mgda"),
        (["show", "mgdaa"], "unknown name 'mgdaa'. Known ones: .*smoothed.*valley"),
        (["compare", "--methods", "mgdaa"], "methods: unknown method 'mgdaa'"),
        (["compare", "--methods", ""], "methods: .*the text ends"),
        (["compare", "--methods", "cagrad(c=0.2"], "methods: .*the text ends"),
        (["compare", "--methods", "cagrad(d=1)"], "methods: 'cagrad' has no option 'd'. Its options: c"),
        (["compare", "--methods", "mgda,mgda"], "methods: 'mgda' is named twice"),
        (["compare", "--problems", "vally"], "problems: unknown problem 'vally'"),
        (["compare", "--problems", ""], "problems: unknown problem ''"),
        (["compare", "--problems", "valley,valley"], "problems names 'valley' twice"),
        (["compare", "--steps", "-5"], "--steps: must be a whole number of at least 1, but got '-5'"),
        (["compare", "--steps", "0"], "--steps: must be a whole number of at least 1, but got '0'"),
        (["compare", "--seeds", "-1"], "--seeds: must be a whole number of at least 1, but got '-1'"),
        (["compare", "--seeds", "two"], "--seeds: must be a whole number of at least 1, but got 'two'"),
        (["compare", "--workers", "-2"], "--workers: must be a whole number of at least 0, but got '-2'"),
        (["compare", "--shard", "3/2"], "--shard: must be i/n with i from 1 to n, such as 1/4, but got '3/2'"),
        (["compare", "--shard", "0/2"], "--shard: must be i/n"),
        (["compare", "--shard", "2"], "--shard: must be i/n"),
        (["compare", "--shard", "-1/2"], "--shard"),
        (["compare", "--resume", "--overwrite"], "--resume .*--overwrite .*one of the two"),
        (["compare", "--stepz", "3"], "unrecognized arguments: --stepz 3"),
        (["compare", "--out", "/proc/nothing"], "--out /proc/nothing cannot be written"),
        (["report", "/nowhere/at/all"], "/nowhere/at/all holds no settings.json"),
        (["report", "a", "b"], "--out is missing"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert re.search(complaint, captured.err), captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_left_alone(capsys, finished):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    assert call(*COMPARE, "--out", finished) == 2
    assert re.fullmatch(r"mogb compare: --out \S+ is not empty: add --resume .*\n", capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_resuming_with_other_settings_is_status_2(capsys, finished):
    assert call(*COMPARE, "--out", finished, "--resume", "--steps", "5") == 2
    assert re.search(r"other settings \(steps was 4, is 5\)", capsys.readouterr().err)


def test_a_damaged_results_file_is_status_2(capsys, finished, tmp_path):
    lines = (finished / "results.jsonl").read_text().splitlines()
    (tmp_path / "settings.json").write_bytes((finished / "settings.json").read_bytes())
    (tmp_path / "results.jsonl").write_text("\n".join([lines[0], "{broken", *lines[1:]]) + "\n")
    assert call("report", tmp_path) == 2
    assert re.search(r"results.jsonl line 2 is damaged", capsys.readouterr().err)


def test_missing_matplotlib_is_said_before_anything_is_run(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call("compare", *SMALL, "--out", tmp_path / "out") == 2
    assert re.search(r"pip install 'mogb\[plot\]', or add --no-figures", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


# --- results --------------------------------------------------------------------------------------------------------


def test_compare_writes_a_line_a_run_and_the_summaries(finished):
    records = [json.loads(line) for line in (finished / "results.jsonl").read_text().splitlines()]
    assert len(records) == 3 * 2 * 2
    assert {record["status"] for record in records} == {"ok"}
    rows = (finished / "summary.csv").read_text().splitlines()
    assert rows[0].startswith("problem,method,runs,failed,arrived,")
    assert len(rows) == 1 + 3 * 2
    text = (finished / "summary.md").read_text()
    assert "| cagrad(c=0.2) |" in text
    assert "## Problem specialists" in text
    assert "By distance to the front, " in text


def test_the_main_table_and_the_files_are_printed(capsys, finished):
    assert call("report", finished, "--no-figures") == 0
    printed = capsys.readouterr().out
    assert "cagrad(c=0.2)" in printed
    assert str(finished / "report.html") in printed


def test_the_default_is_the_fourteen_classics():
    assert len(LAUNCH_METHODS) == 14
    assert set(LAUNCH_METHODS) <= set(mogb.registered())


def test_failed_runs_are_rows_and_status_1_only_if_every_run_failed(capsys, tmp_path):
    three = "weighted_sum(weights=[1.0,1.0,1.0])"
    arguments = ["--problems", "valley", "--steps", "2", "--seeds", "1", "--workers", "0", "--no-figures"]
    assert call("compare", "--methods", f"mgda,{three}", *arguments, "--out", tmp_path / "some") == 0
    assert "1 of 2 runs failed" in capsys.readouterr().err
    assert "step 1, start 0: weights must have one number per objective" in (tmp_path / "some/summary.md").read_text()
    assert call("compare", "--methods", three, *arguments, "--out", tmp_path / "all") == 1
    assert "every run failed, the first with: step 1, start 0: weights must" in capsys.readouterr().err


@pytest.mark.parametrize("tear", [b"", b'{"key": "specialists/1/rl'])
def test_resume_after_sigkill_gives_the_same_summary(tmp_path, finished, capsys, tear):
    folder = tmp_path / "out"
    if tear:  # as if the machine had lost power in the middle of a line
        folder.mkdir()
        lines = (finished / "results.jsonl").read_bytes().splitlines(keepends=True)
        (folder / "results.jsonl").write_bytes(b"".join(lines[7:3:-1]) + tear)
        (folder / "settings.json").write_bytes((finished / "settings.json").read_bytes())
        kept = 4
    else:
        kept = kill_in_the_middle(folder)
    assert call(*COMPARE, "--out", folder, "--resume") == 0
    said = capsys.readouterr().err
    assert f"{kept} runs are finished, {12 - kept} are left." in said
    assert ("The last line of" in said) == bool(tear)
    assert len((folder / "results.jsonl").read_bytes().splitlines()) == 12
    assert same_summaries(folder, finished)


def kill_in_the_middle(folder: Path) -> int:
    """Starts the comparison in another process, kills that once a few runs are done; how many were."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mogb", *COMPARE, "--out", str(folder)], stderr=subprocess.DEVNULL
    )
    results = folder / "results.jsonl"
    try:
        while process.poll() is None and not (results.exists() and results.read_bytes().count(b"\n") >= 2):
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, "it was done before it could be killed"
    lines = results.read_bytes().split(b"\n")
    if lines[-1]:  # killed in the middle of a write
        results.write_bytes(results.read_bytes()[: -len(lines[-1])])
    assert 2 <= len(lines) - 1 < 12
    assert not (folder / "summary.csv").exists()
    return len(lines) - 1


def test_resuming_what_is_complete_changes_nothing(finished):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    assert call(*COMPARE, "--out", finished, "--resume") == 0
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_shards_merge_to_the_summary_of_one_run(tmp_path, finished, capsys):
    parts = [tmp_path / f"part-{i}" for i in (1, 2, 3)]
    for i, part in enumerate(parts, start=1):
        assert call(*COMPARE, "--out", part, "--shard", f"{i}/3") == 0
    keys = [{json.loads(line)["key"] for line in (part / "results.jsonl").read_text().splitlines()} for part in parts]
    assert [len(found) for found in keys] == [4, 4, 4]
    assert len(set.union(*keys)) == 12
    assert call("report", *parts, "--out", tmp_path / "all", "--no-figures") == 0
    assert same_summaries(tmp_path / "all", finished)
    capsys.readouterr()
    assert call("report", *parts[:2], "--out", tmp_path / "two", "--no-figures") == 0
    assert "4 planned runs have no result yet" in capsys.readouterr().err
    assert call("report", *parts, "--out", tmp_path / "all", "--no-figures") == 2
    assert "is not empty: add --overwrite" in capsys.readouterr().err
    assert call("report", *parts, "--out", tmp_path / "all", "--no-figures", "--overwrite") == 0
    assert same_summaries(tmp_path / "all", finished)


def test_parts_that_contradict_each_other_are_refused(tmp_path, finished, capsys):
    liar = tmp_path / "liar"
    liar.mkdir()
    (liar / "settings.json").write_bytes((finished / "settings.json").read_bytes())
    record = json.loads((finished / "results.jsonl").read_text().splitlines()[0])
    (liar / "results.jsonl").write_text(json.dumps(record | {"wall_seconds": 0.5, "distance": [9.0] * 4}) + "\n")
    assert call("report", finished, liar, "--out", tmp_path / "all", "--no-figures") == 2
    assert re.search(r"another result of 'quadratic_scaled/0/weighted_sum' .*distance", capsys.readouterr().err)
    (liar / "results.jsonl").write_text(json.dumps(record | {"wall_seconds": 0.5}) + "\n")
    assert call("report", finished, liar, "--out", tmp_path / "all", "--no-figures") == 0
    settings = json.loads((liar / "settings.json").read_text())
    (liar / "settings.json").write_text(json.dumps(settings | {"steps": 99}))
    assert call("report", finished, liar, "--out", tmp_path / "more", "--no-figures") == 2
    assert "different settings (steps was 4, is 99)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")
def test_workers_end_when_the_parent_is_killed(tmp_path):
    command = [sys.executable, "-m", "mogb", "compare", "--methods", "mgda", "--problems", "valley", "--seeds", "2",
               "--workers", "2", "--no-figures", "--out", str(tmp_path / "out")]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(workers := children(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    while (alive := [pid for pid in workers if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive


def children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_control_c_keeps_what_is_finished(tmp_path):
    command = [
        sys.executable,
        "-m",
        "mogb",
        *COMPARE,
        "--steps",
        "400",
        "--workers",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    results = tmp_path / "out/results.jsonl"
    while process.poll() is None and not (results.exists() and results.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted. Finished runs are kept: add --resume to go on." in said
    assert "Traceback" not in said
    assert all(json.loads(line)["status"] == "ok" for line in results.read_text().splitlines())
