import multiprocessing
import os
import signal
import time

import pytest

from mogb.compare.pool import run_jobs


def work(job, progress):
    """What the job says: a number to double, a file to die for once, a way to fail."""
    progress(0.5)
    if isinstance(job, int):
        return 2 * job, os.environ["OMP_NUM_THREADS"]
    if job == "die":
        os._exit(7)
    if job == "fail":
        raise LookupError("no such thing")
    if job == "sleep":
        time.sleep(600)
    if not job.exists():
        job.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


def test_jobs_are_done_in_a_process_of_one_thread_and_again_if_it_is_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    events = list(run_jobs(work, [1, tmp_path / "mark", 3], 1))
    done = {event.index: event.value for event in events if event.kind == "done"}
    assert done == {0: (2, "1"), 1: "survived", 2: (6, "1")}
    assert [event.value for event in events if event.kind == "progress"] == [0.5, 0.5, 0.0, 0.5, 0.5]
    assert os.environ["OMP_NUM_THREADS"] == "5"
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_job_that_always_kills_its_worker_is_lost_and_the_others_are_not():
    found = {event.index: event for event in run_jobs(work, [0, "die", 2], 2) if event.kind != "progress"}
    assert [found[i].kind for i in range(3)] == ["done", "lost", "done"]
    assert "status 7, 2 times" in found[1].value


@pytest.mark.slow
def test_an_exception_of_the_work_itself_reaches_the_parent():
    with pytest.raises(RuntimeError, match="LookupError: no such thing"):
        list(run_jobs(work, ["fail"], 1))


@pytest.mark.slow
def test_leaving_early_ends_the_workers():
    events = run_jobs(work, ["sleep"], 1)
    next(events)
    assert len(multiprocessing.active_children()) == 1
    events.close()
    assert multiprocessing.active_children() == []


def test_no_jobs_start_no_process():
    assert list(run_jobs(work, [], 4)) == []
